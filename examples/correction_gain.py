"""What makes a head's scores those of a branch, on and off: its branch correction and the context n-grams.

Tokens per round, replayed over the target's own texts.

    python examples/correction_gain.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts --json gain.json
"""

from replayed import load_pair, make_parser, text_sets

from hf_jetflow.bench.bench import environment, write_json
from hf_jetflow.target.target import Target
from hf_jetflow.training.replay import replay


# Name of a figure: whether the branch correction is on, and whether the n-grams are.
FIGURES = {
    "tokens_per_round": (True, True),
    "without_ngrams": (True, False),
    "without_correction": (False, True),
    "without_both": (False, False),
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--node-budgets", type=int, nargs="+", default=[16, 32, 64])
    args = parser.parse_args()

    target, tokenizer, head = load_pair(args)
    correction, weights = head.branch_correction, head.config.ngram_weights
    if correction is None:
        raise SystemExit(f"error: {args.head} has no branch correction to switch off")
    rows = []
    for name, texts in text_sets(args, target, tokenizer):
        figures = {}
        for figure, (is_corrected, asks_text) in FIGURES.items():
            head.branch_correction = correction if is_corrected else None
            head.config.ngram_weights = weights if asks_text else []
            figures[figure] = replay(Target(target, head.config), head, texts, args.node_budgets)
        for budget in args.node_budgets:
            kept = {figure: round(stats[budget].tokens_per_round, 3) for figure, stats in figures.items()}
            rows.append({"prompts": name, "num_prompts": len(texts), "node_budget": budget, **kept})
            others = ", ".join(f"{figure.replace('_', ' ')} {kept[figure]:.2f}" for figure in list(FIGURES)[1:])
            print(f"{name}, {budget} nodes: {kept['tokens_per_round']:.2f}; {others}")
    write_json({"environment": environment(), "head": args.head, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
