"""What each process of `test_wrapped_targets.py` runs: `tensor_parallel_worker.py FOLDER SECONDS`."""

import faulthandler
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import answer_rows, build_oracle, build_target, make_prompt
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_jetflow import JetFlowHead


def generate(target: PreTrainedModel, head: JetFlowHead | None = None, do_sample: bool = False) -> torch.Tensor:
    torch.manual_seed(5)
    settings = dict(max_new_tokens=24, do_sample=do_sample, assistant_model=head)
    return target.generate(make_prompt(12), **settings)


def main(folder: Path, limit: float) -> None:
    faulthandler.dump_traceback_later(limit, exit=True)
    torch.set_num_threads(1)
    whole = build_target("llama", vocab_size=258)
    split = AutoModelForCausalLM.from_pretrained(folder / "target", tp_plan="auto").eval()
    split.generation_config.eos_token_id = None
    facts = dict(tp_size=split.tp_size, texts=[])
    for do_sample in (False, True):
        plain = generate(whole, do_sample=do_sample)
        rows = answer_rows(whole, plain)
        rows[::5] *= -1  # wrong at every fifth position
        for kind in (None, "path"):
            head = build_oracle(whole, rows, branch_correction=kind)
            texts = dict(plain=plain, split=generate(split, do_sample=do_sample))
            texts["drafted"] = generate(split, head, do_sample)
            texts = {name: text.tolist() for name, text in texts.items()}
            facts["texts"].append({**texts, "tokens_per_round": head.last_stats.tokens_per_round})
    head.generation_config.node_budget = "auto"
    with pytest.raises(ValueError, match="tensor parallel") as refusal:
        generate(split, head)
    facts["refusal"] = str(refusal.value)
    (folder / f"facts-{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
