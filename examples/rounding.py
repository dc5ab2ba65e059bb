"""How often rounding alone changes a greedy text: plain decoding in batches, and a head, against plain decoding alone.

A forward over several rows rounds differently than one over a single row, which decides near-ties. Each text is
compared with that of plain decoding alone, batch 1, in the same dtype. Answers are stored one by one, so that the same
command continues after a kill.

    python examples/rounding.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --answers rounding.jsonl --json rounding.json
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.bench.runs import new_answers, padded_inputs
from hf_jetflow.files import write_json
from hf_jetflow.head.settings import head_settings
from hf_jetflow.jsonl import append_jsonl, read_jsonl
from hf_jetflow.prompts import encode_chat, read_prompts
from hf_jetflow.target.loading import load_target


METHODS = {  # by label: batch size and, with the head, node budget
    "plain alone": (1, None),
    "plain, batch of 4": (4, None),
    "tree of 16 nodes": (1, 16),
}
Prompts = dict[str, dict[str, list[int]]]  # token ids by prompt set and id
Answers = dict[tuple[str, str, str], list[int]]  # new ids by method, prompt set and id


def generate_answers(target: PreTrainedModel, head: JetFlowHead, sets: Prompts, path: Path, limit: int) -> Answers:
    """The answers to all prompts with all methods; those in the file are not generated again."""
    dtype = str(target.dtype).removeprefix("torch.")
    stored = [record for record in (read_jsonl(path) if path.exists() else ()) if record["dtype"] == dtype]
    answers: Answers = {(record["method"], record["set"], record["id"]): record["answer"] for record in stored}
    for method, (batch_size, node_budget) in METHODS.items():
        settings = {"max_new_tokens": limit, "do_sample": False}
        settings |= {} if node_budget is None else {"assistant_model": head}
        for name, prompts in sets.items():
            for ids in batches(list(prompts), batch_size):
                if all((method, name, each) in answers for each in ids):
                    continue
                inputs = padded_inputs(target, [prompts[each] for each in ids])
                with head_settings(head, **({} if node_budget is None else {"node_budget": node_budget})):
                    new = new_answers(target, inputs, target.generate(**inputs, **settings))
                answers |= {(method, name, each): answer for each, answer in zip(ids, new, strict=True)}
                key = {"dtype": dtype, "method": method, "set": name}
                append_jsonl(path, [{**key, "id": each, "answer": a} for each, a in zip(ids, new, strict=True)])
            print(f"{dtype}, {method}: {name}", flush=True)
    return answers


def batches(ids: list[str], size: int) -> Iterator[list[str]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))


@torch.no_grad()
def gap(target: PreTrainedModel, prompt: list[int], alone: list[int], other: list[int]) -> float:
    """Nats between the target's two best tokens where two answers differ first."""
    pairs = list(zip(alone, other, strict=False))
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    logits = target(torch.tensor([prompt + alone[:first]], device=target.device)).logits[0, -1].float()
    best = logits.topk(2).values
    return float(best[0] - best[1])


def rows(target: PreTrainedModel, sets: Prompts, answers: Answers) -> Iterator[dict[str, Any]]:
    """One row for each set and method; `target` computes in float32."""
    for name, prompts in sets.items():
        for method in list(METHODS)[1:]:
            pairs = {each: (answers["plain alone", name, each], answers[method, name, each]) for each in prompts}
            gaps = [gap(target, prompts[each], *pair) for each, pair in pairs.items() if pair[0] != pair[1]]
            counts = {"num_prompts": len(prompts), "num_same": len(prompts) - len(gaps)}
            yield {"prompts": name, "method": method, **counts, "gaps": sorted(round(each, 4) for each in gaps)}


def share_table(result: dict[str, Any], sets: dict[str, str]) -> list[list[str]]:
    """Cells of a table, heading first: equal texts by dtype and method; `sets` maps prompt sets to their headings."""
    lines = [["same text as plain decoding alone", *sets.values(), "nats apart: median, most"]]
    for dtype, method in dict.fromkeys((row["dtype"], row["method"]) for row in result["rows"]):
        found = [row for row in result["rows"] if (row["dtype"], row["method"]) == (dtype, method)]
        by_set = {row["prompts"]: f"{row['num_same']} of {row['num_prompts']}" for row in found}
        gaps = [each for row in found for each in row["gaps"]]
        spread = f"{statistics.median(gaps):.3f}, {max(gaps):.3f}" if gaps else ""
        lines.append([f"{dtype}, {method}", *(by_set[name] for name in sets), spread])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="Hub id, folder or .gguf file")
    parser.add_argument("--head", required=True, help="Hub id or folder")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSON lines files")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--num-prompts", type=int, default=8, help="prompts taken from each file")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--answers", type=Path, required=True, help="file of the answers, continued if it exists")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    args = parser.parse_args()

    result = []
    for dtype in args.dtypes:
        target, tokenizer = load_target(args.target, dtype)
        head = JetFlowHead.from_pretrained(args.head, dtype=target.dtype).to(target.device)
        sets = {
            path.stem: {
                prompt["id"]: encode_chat(tokenizer, prompt["messages"])
                for prompt in read_prompts([path])[: args.num_prompts]
            }
            for path in args.prompts
        }
        answers = generate_answers(target, head, sets, args.answers, args.max_new_tokens)
        result += [{"dtype": dtype, **row} for row in rows(target.float(), sets, answers)]
    facts = {"environment": environment(head), "max_new_tokens": args.max_new_tokens}
    write_json({**facts, "rows": result}, args.json)


if __name__ == "__main__":
    main()
