"""Gain of recycled choices: tokens per round and round times with and without them, over the same texts.

Both follow the target's own greedy answers, which a logits processor spells out. Answers take turns, so that both meet
the same speed of the machine.

    python examples/recycled_gain.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts --json recycled.json
"""

import statistics
from collections import Counter
from collections.abc import Sequence

import torch
from replayed import load_pair, make_parser, text_sets
from transformers import LogitsProcessor, PreTrainedModel

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.files import write_json
from hf_jetflow.head.settings import head_settings


class Spell(LogitsProcessor):
    """Chooses the next token of a known text."""

    def __init__(self, ids: Sequence[int]):
        self._ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        spelled = torch.full_like(scores, -torch.inf)
        spelled[:, self._ids[input_ids.shape[1]]] = 0
        return spelled


def decode(target: PreTrainedModel, head: JetFlowHead, ids: list[int], num_prompt: int, budget: int) -> Counter[str]:
    """Rounds, accepted tokens and seconds of rounds of one answer."""
    prompt = torch.tensor([ids[:num_prompt]], device=target.device)
    with head_settings(head, node_budget=budget):
        output = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(ids) - num_prompt,
            do_sample=False,
            logits_processor=[Spell(ids)],
            assistant_model=head,
        )
        assert output[0].tolist() == ids
        stats = head.last_stats
    seconds = sum(spent for step, spent in stats.seconds_by_step.items() if step != "prefill")
    return Counter(rounds=stats.num_rounds, accepted=stats.num_accepted, seconds=seconds)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--node-budgets", type=int, nargs="+", default=[16, 64])
    args = parser.parse_args()

    target, tokenizer, head = load_pair(args)
    weight, rows = head.config.recycled_weight, []
    for name, texts in text_sets(args, target, tokenizer):
        for budget in args.node_budgets:
            totals: dict[float, Counter[str]] = {weight: Counter(), 0.0: Counter()}
            ratios = []
            for number, (ids, num_prompt) in enumerate([texts[0], *texts]):  # the first one twice: warm-up
                seconds = {}
                for head.config.recycled_weight in totals:
                    counts = decode(target, head, ids, num_prompt, budget)
                    seconds[head.config.recycled_weight] = counts["seconds"]
                    if number:
                        totals[head.config.recycled_weight].update(counts)
                if number:
                    ratios.append(seconds[0.0] / seconds[weight])
            with_it, without = (1 + total["accepted"] / total["rounds"] for total in totals.values())
            rows.append(
                {
                    "prompts": name,
                    "num_prompts": len(texts),
                    "node_budget": budget,
                    "tokens_per_round": round(with_it, 3),
                    "without": round(without, 3),
                    "time_without_over_with": round(statistics.median(ratios), 3),
                }
            )
            print(
                f"{name}, {budget} nodes: {with_it:.2f} tokens per round, {without:.2f} without; "
                f"{100 * statistics.median(ratios) - 100:+.1f} % speed",
                flush=True,
            )
    head.config.recycled_weight = weight
    result = {"environment": environment(head), "head": args.head, "recycled_weight": weight, "rows": rows}
    write_json(result, args.json)


if __name__ == "__main__":
    main()
