"""Speed of every node budget on the same texts: what `"auto"` gains or loses against fixed budgets.

In bfloat16, trees of different sizes round differently. Near-ties then lead to different texts, and a budget with an
easy text looks better than it is. Here every budget must generate the target's own answer. All budgets run
concurrently, one round at a time, the one with the fewest tokens first. So a change in the speed of the machine
affects all of them equally. Needs `pip install greenlet`.

    python examples/same_text.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts --json same_text.json
"""

import statistics
from typing import Any

import torch
from replayed import load_pair, make_parser, text_sets
from transformers import LogitsProcessor, PreTrainedModel
from turns import Turns, take_turns

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.files import write_json


class Dictate(LogitsProcessor):
    """Allows only the next token of a given text."""

    def __init__(self, ids: list[int]):
        self._ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self._ids[input_ids.shape[1]]] = 0
        return allowed


def decode_together(
    target: PreTrainedModel, head: JetFlowHead, text: tuple[list[int], int], budgets: list[Any]
) -> dict[Any, Turns]:
    """Generate one text with all budgets; 1 node is plain `generate`."""
    ids, num_prompt = text
    settings = dict(max_new_tokens=len(ids) - num_prompt, do_sample=False, logits_processor=[Dictate(ids)])
    calls = {
        budget: Turns(target, ids[:num_prompt], None if budget == 1 else head, budget, **settings)
        for budget in budgets
    }
    take_turns(list(calls.values()))
    assert all(call.new_ids == ids[num_prompt:] for call in calls.values())
    return calls


def measure(
    target: PreTrainedModel, head: JetFlowHead, texts: list[tuple[list[int], int]], budgets: list[Any]
) -> list[dict[str, Any]]:
    """One row per budget; the first text is generated once more in advance, as warm-up."""
    _, *generated = [decode_together(target, head, text, budgets) for text in [texts[0], *texts]]
    num_tokens = sum(len(ids) - num_prompt for ids, num_prompt in texts)
    rows = []
    for budget in budgets:
        calls = [each[budget] for each in generated]
        speedups = [each[1].seconds / each[budget].seconds for each in generated]
        rows.append(
            {
                "node_budget": budget,
                "tokens_per_second": round(num_tokens / sum(call.seconds for call in calls), 2),
                "tokens_per_round": round((num_tokens - len(texts)) / sum(call.num_rounds for call in calls), 3),
                "speedup": round(statistics.median(speedups), 3),
            }
        )
    return rows


def margin_of_auto(rows: list[dict[str, Any]]) -> float | None:
    """Throughput of `"auto"` relative to the best fixed budget, in percent; negative if it is slower."""
    speeds = {row["node_budget"]: row["tokens_per_second"] for row in rows}
    auto = speeds.pop("auto", None)
    return None if auto is None else round(100 * (auto / max(speeds.values()) - 1), 1)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--node-budgets", nargs="+", default=["8", "16", "32", "64", "auto"])
    args = parser.parse_args()

    target, tokenizer, head = load_pair(args)
    budgets = [1] + [budget if budget == "auto" else int(budget) for budget in args.node_budgets]
    rows, margins = [], {}
    for name, texts in text_sets(args, target, tokenizer):
        set_rows = measure(target, head, [text for text in texts if len(text[0]) - text[1] > 1], budgets)
        rows += [{"prompts": name, **row} for row in set_rows]
        for row in set_rows:
            print(f"{name:12} {row['node_budget']!s:>5} nodes  {row['tokens_per_second']:6.1f} tokens/s", end="  ")
            print(f"{row['tokens_per_round']:5.2f} tokens per round  speedup {row['speedup']:.2f}")
        margins[name] = margin_of_auto(set_rows)
        if margins[name] is not None:
            print(f"{name:12}  auto against the best fixed budget: {margins[name]:+.1f} %")
    facts = {"environment": environment(head), "head": args.head, "num_prompts": args.num_prompts}
    write_json({**facts, "auto_against_best_fixed_percent": margins, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
