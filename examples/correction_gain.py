"""Tokens per round of a head with its branch correction on and off, replayed over the target's own texts.

    python examples/correction_gain.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts --json gain.json
"""

from replayed import load_pair, make_parser, text_sets

from hf_jetflow.bench import environment, write_json
from hf_jetflow.replay import replay
from hf_jetflow.target import Target


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--node-budgets", type=int, nargs="+", default=[16, 32, 64])
    args = parser.parse_args()

    target, tokenizer, head = load_pair(args)
    correction = head.branch_correction
    if correction is None:
        raise SystemExit(f"error: {args.head} has no branch correction to switch off")
    rows = []
    for name, texts in text_sets(args, target, tokenizer):
        figures = {}
        for is_on in (True, False):
            head.branch_correction = correction if is_on else None
            figures[is_on] = replay(Target(target, head.config), head, texts, args.node_budgets)
        for budget in args.node_budgets:
            on, off = (figures[is_on][budget].tokens_per_round for is_on in (True, False))
            rows.append(
                {
                    "prompts": name,
                    "num_prompts": len(texts),
                    "node_budget": budget,
                    "tokens_per_round": round(on, 3),
                    "without_correction": round(off, 3),
                }
            )
            print(f"{name}, {budget} nodes: {on:.2f}, off {off:.2f} ({100 * (on / off - 1):+.1f} %)")
    write_json({"environment": environment(), "head": args.head, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
