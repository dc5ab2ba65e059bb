"""Speed of every node budget on the very same texts: what `"auto"` loses or gains against fixed budgets.

In bfloat16 trees of different sizes round differently, so that texts part where two tokens are nearly equal, and a
text that happens to be easy makes its budget look good. Here every budget has to write the target's own answer.

    python examples/same_text.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts --json same_text.json
"""

import statistics
import time
from typing import Any

import torch
from replayed import load_pair, make_parser, text_sets
from transformers import LogitsProcessor, PreTrainedModel

from hf_jetflow import JetFlowHead
from hf_jetflow.bench import environment, write_json


class Dictate(LogitsProcessor):
    """Allows the next token of a text only."""

    def __init__(self, ids: list[int]):
        self._ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self._ids[input_ids.shape[1]]] = 0
        return allowed


def seconds_of(target: PreTrainedModel, head: JetFlowHead, text: tuple[list[int], int], budget: Any) -> float:
    """Of writing one text; 1 node is plain `generate`."""
    ids, num_prompt = text
    prompt = torch.tensor([ids[:num_prompt]], device=target.device)
    head.generation_config.node_budget = budget
    start = time.perf_counter()
    output = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(ids) - num_prompt,
        do_sample=False,
        logits_processor=[Dictate(ids)],
        assistant_model=None if budget == 1 else head,
    )
    assert output[0].tolist() == ids
    return time.perf_counter() - start


def measure(
    target: PreTrainedModel, head: JetFlowHead, texts: list[tuple[list[int], int]], budgets: list[Any]
) -> list[dict[str, Any]]:
    """A row for each budget: all write each text in turn, the first one twice, of which the first time is warm-up."""
    seconds: dict[Any, list[float]] = {budget: [] for budget in budgets}
    rounds = dict.fromkeys(budgets, 0)
    for number, text in enumerate([texts[0], *texts]):
        for budget in budgets:
            spent = seconds_of(target, head, text, budget)
            if number:
                seconds[budget].append(spent)
                rounds[budget] += len(text[0]) - text[1] - 1 if budget == 1 else head.last_stats.num_rounds
    num_tokens = sum(len(ids) - num_prompt for ids, num_prompt in texts)
    return [
        {
            "node_budget": budget,
            "tokens_per_second": round(num_tokens / sum(spent), 2),
            "tokens_per_round": round((num_tokens - len(texts)) / rounds[budget], 3),
            "speedup": round(statistics.median(a / b for a, b in zip(seconds[1], spent, strict=True)), 3),
        }
        for budget, spent in seconds.items()
    ]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--node-budgets", nargs="+", default=["8", "16", "32", "64", "auto"])
    args = parser.parse_args()

    target, tokenizer, head = load_pair(args)
    budgets = [1] + [budget if budget == "auto" else int(budget) for budget in args.node_budgets]
    rows = []
    for name, texts in text_sets(args, target, tokenizer):
        of_set = measure(target, head, [text for text in texts if len(text[0]) - text[1] > 1], budgets)
        rows += [{"prompts": name, **row} for row in of_set]
        for row in of_set:
            print(f"{name:12} {row['node_budget']!s:>5} nodes  {row['tokens_per_second']:6.1f} tokens/s", end="  ")
            print(f"{row['tokens_per_round']:5.2f} tokens per round  speedup {row['speedup']:.2f}")
    facts = {"environment": environment(), "head": args.head, "num_prompts": args.num_prompts}
    write_json({**facts, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
