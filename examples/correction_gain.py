"""Tokens per round of a head with its branch correction on and off, replayed over the target's own texts.

    python examples/correction_gain.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts --json gain.json
"""

import argparse
from pathlib import Path

from hf_jetflow import JetFlowHead
from hf_jetflow.answers import greedy_texts
from hf_jetflow.bench import environment, write_json
from hf_jetflow.data import read_prompts
from hf_jetflow.loading import fast_dtype, load_target
from hf_jetflow.replay import replay
from hf_jetflow.target import Target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--texts", type=Path, required=True, help="folder that keeps the target's greedy answers")
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--node-budgets", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    target, tokenizer = load_target(args.target, fast_dtype())
    head = JetFlowHead.from_pretrained(args.head, dtype=target.dtype)
    correction = head.branch_correction
    if correction is None:
        raise SystemExit(f"error: {args.head} has no branch correction to switch off")
    rows = []
    for path in args.prompts:
        prompts = read_prompts([path])[: args.num_prompts]
        texts = greedy_texts(target, tokenizer, prompts, args.texts / path.name, args.max_new_tokens)
        figures = {}
        for is_on in (True, False):
            head.branch_correction = correction if is_on else None
            figures[is_on] = replay(Target(target, head.config), head, texts, args.node_budgets)
        for budget in args.node_budgets:
            on, off = (figures[is_on][budget].tokens_per_round for is_on in (True, False))
            rows.append(
                {
                    "prompts": path.stem,
                    "num_prompts": len(texts),
                    "node_budget": budget,
                    "tokens_per_round": round(on, 3),
                    "without_correction": round(off, 3),
                }
            )
            print(f"{path.stem}, {budget} nodes: {on:.2f}, off {off:.2f} ({100 * (on / off - 1):+.1f} %)")
    write_json({"environment": environment(), "head": args.head, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
