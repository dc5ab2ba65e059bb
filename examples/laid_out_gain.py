"""Gain of laid-out target weights: times of rounds with and without them, answer by answer in turn.

A node budget of 1 decodes plainly, so its gain is what plain decoding would have of such copies.

    python examples/laid_out_gain.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --num-prompts 8 --json laid_out.json
"""

import statistics
import time

import torch
from replayed import load_pair, make_parser
from torch import nn

from hf_jetflow.bench.environment import environment
from hf_jetflow.files import write_json
from hf_jetflow.head.settings import head_settings
from hf_jetflow.prompts import encode_chat, read_prompts
from hf_jetflow.target.laid_out import laid_out_target


def costs(target: nn.Module, repeats: int = 5) -> dict[str, float]:
    """Bytes of the copies, and seconds to make them and to see that they are current; the shortest of some tries."""
    made, checked = [], []
    for _ in range(repeats):
        laid_out_target(target, False)  # drops them
        for seconds in (made, checked):
            start = time.perf_counter()
            laid_out_target(target, True)
            seconds.append(time.perf_counter() - start)
    layers = {module.weight for module in target.modules() if isinstance(module, nn.Linear)}
    return {
        "bytes": sum(weight.nbytes for weight in layers),
        "seconds_to_make": round(min(made), 4),
        "seconds_to_check": round(min(checked), 4),
    }


def main() -> None:
    parser = make_parser(__doc__, texts=False)
    parser.add_argument("--node-budgets", type=int, nargs="+", default=[1, 8, 16, 64])
    args = parser.parse_args()

    target, tokenizer, head = load_pair(args)

    def seconds(prompt: torch.Tensor, budget: int, is_laid_out: bool) -> float:
        """Of the rounds of one answer."""
        with head_settings(head, node_budget=budget, lay_out_target=is_laid_out):
            target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
                assistant_model=head,
            )
            by_step = head.last_stats.seconds_by_step
        return sum(spent for step, spent in by_step.items() if step != "prefill")

    rows = []
    for path in args.prompts:
        prompts = [encode_chat(tokenizer, each["messages"]) for each in read_prompts([path])[: args.num_prompts]]
        for budget in args.node_budgets:
            ratios = []
            for number, ids in enumerate([prompts[0], *prompts]):  # the first one twice: warm-up
                prompt = torch.tensor([ids], device=target.device)
                with_it, without = (seconds(prompt, budget, wish) for wish in (True, False))
                ratios += [without / with_it] if number else []
            speed = round(statistics.median(ratios), 3)
            rows.append({"prompts": path.stem, "num_prompts": len(prompts), "node_budget": budget, "speed": speed})
            print(f"{path.stem}, {budget} nodes: {100 * speed - 100:+.1f} % speed", flush=True)
    result = {"environment": environment(head), "head": args.head, "costs": costs(target), "rows": rows}
    write_json(result, args.json)


if __name__ == "__main__":
    main()
