"""The cost formulas against models that are built and updates that are run."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from helpers import tiny_config
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.training.losses import chunked_forward_kl
from hf_jetflow.training.trainer import JetFlowTrainer, JetFlowTrainingConfig


sys.path.insert(0, str(EXAMPLES))
try:
    from training_cost import TrainingCost, kl_chunk
finally:
    sys.path.remove(str(EXAMPLES))


PAGE = EXAMPLES.parent / "docs" / "training-cost.md"
SHAPE = dict(batch_size=2, seq=128, anchors=8)
SMALL = dict(layers=3, hidden=128, heads=4, vocab=2000, head=dict(num_hidden_layers=2))
LARGE = dict(layers=6, hidden=512, heads=8, vocab=32768, head=dict(num_hidden_layers=3))


def configs(
    layers: int, hidden: int, heads: int, vocab: int, head: dict[str, Any]
) -> tuple[Qwen3Config, JetFlowConfig]:
    target = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        tie_word_embeddings=False,
    )
    return target, JetFlowConfig.for_target(target, **{**dict(block_size=8, mask_token_id=0), **head})


def attention_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    return 4 * query.numel() * key[-2]


def attention_backward_flops(_: torch.Size, query: torch.Size, key: torch.Size, *__: Any, **___: Any) -> int:
    return 10 * query.numel() * key[-2]


CPU_ATTENTION = {  # unknown to torch's counter
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def peak_bytes(measured: profile) -> int:
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Meter(TrainerCallback):
    """Counts the operations of the first update and the bytes allocated during the second."""

    def __init__(self):
        self.flops = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.meters = [self.flops, self.profile]

    def on_step_begin(self, args, state, control, **_):
        self.meters[state.global_step].__enter__()

    def on_step_end(self, args, state, control, **_):
        self.meters[state.global_step - 1].__exit__(None, None, None)


def run_two_updates(
    target_config: Qwen3Config, head_config: JetFlowConfig, folder: Path, batch_size: int, seq: int, anchors: int
) -> Meter:
    """Two updates in bf16 with the trainer itself; all sequences have `seq` tokens."""
    torch.manual_seed(7)
    target, head = Qwen3ForCausalLM(target_config).to(torch.bfloat16), JetFlowHead(head_config)
    ids = torch.randint(3, 1000, (2 * batch_size, seq)).tolist()
    answers = [{"id": str(i), "prompt_ids": row[:8], "answer_ids": row[8:]} for i, row in enumerate(ids)]
    args = JetFlowTrainingConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=batch_size,
        anchors_per_sequence=anchors,
        max_length=seq,
        save_strategy="no",
        use_cpu=True,
        bf16=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    meter = Meter()
    JetFlowTrainer(head, target, args, answers, callbacks=[meter]).train()
    return meter


def compare_memory(meter: Meter, memory: dict[str, int]) -> float:
    """Formula over measurement, both above what is there before the update."""
    resident = memory["target weights"] + memory["head weights"] + memory["optimizer state"]
    computed, measured = memory["peak"] - resident, peak_bytes(meter.profile)
    stage = max((name for name in memory if name.startswith("during")), key=lambda name: memory[name])
    print(f"peak {stage}: {computed / 1e6:.1f} MB computed, {measured / 1e6:.1f} MB measured")
    return computed / measured


UPDATES = pytest.mark.parametrize(
    ("head", "shape"),
    [
        ({}, {}),
        (dict(draft_vocab_size=100), dict(anchors=2)),
        (dict(branch_correction="path"), dict(anchors=16)),
    ],
    ids=["plain", "draft vocabulary, few anchors", "correction, many anchors"],
)


@UPDATES
def test_memory_and_operations_of_an_update_are_close_to_the_measured_ones(tmp_path, head, shape):
    small = {**SMALL, "head": {**SMALL["head"], **head}}
    both, shape = configs(**small), {**SHAPE, **shape}
    cost, meter = TrainingCost(*both), run_two_updates(*both, tmp_path, **shape)
    assert compare_memory(meter, cost.memory(**shape)) == pytest.approx(1, abs=0.1)
    flops = cost.flops(**shape)
    print(f"{flops['total']:.4g} operations computed, {meter.flops.get_total_flops():.4g} counted")
    assert flops["total"] == pytest.approx(meter.flops.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("num_rows", [20, 40, 60, 100])
def test_the_logits_of_several_chunks_are_counted_right(num_rows):
    rows, projection = torch.randn(num_rows, 8), torch.randn(20_000, 8)
    config = tiny_config(vocab_size=len(projection))
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        chunked_forward_kl(rows, rows, projection, chunk_size=32)
    assert kl_chunk(config, num_rows, 32) == pytest.approx(peak_bytes(measured), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "shape"),
    [
        ({}, dict(batch_size=2, seq=512, anchors=16)),
        ({}, dict(batch_size=2, seq=1024, anchors=4)),
        (dict(draft_vocab_size=2048), dict(batch_size=2, seq=512, anchors=16)),
    ],
)
def test_memory_of_a_larger_update_is_close_to_the_measured_one(tmp_path, head, shape):
    large = {**LARGE, "head": {**LARGE["head"], **head}}
    both = configs(**large)
    meter = run_two_updates(*both, tmp_path, **shape)
    assert compare_memory(meter, TrainingCost(*both).memory(**shape)) == pytest.approx(1, abs=0.05)


def test_the_page_on_training_cost_shows_what_its_code_prints(capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    page = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 20
    assert [line for line in printed if line not in page.splitlines()] == []
