"""Gain of branch correction, context n-grams and tokens outside the draft vocabulary: tokens per round without each.

The rounds are replayed over the target's own greedy answers.

    python examples/correction_gain.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts --json gain.json
"""

from contextlib import nullcontext
from unittest.mock import patch

from replayed import load_pair, make_parser, text_sets

from hf_jetflow.bench.environment import environment
from hf_jetflow.decoding.ranking import Ranker
from hf_jetflow.files import write_json
from hf_jetflow.target.target import Target
from hf_jetflow.training.replay import replay


FIGURES = {  # name: (branch correction on, n-grams on, tokens outside the draft vocabulary on)
    "tokens_per_round": (True, True, True),
    "without_outside_tokens": (True, True, False),
    "without_ngrams": (True, False, False),
    "without_correction": (False, True, True),
    "without_all": (False, False, False),
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
        for figure, (has_correction, has_ngrams, has_outside) in FIGURES.items():
            head.branch_correction = correction if has_correction else None
            head.config.ngram_weights = weights if has_ngrams else []
            with nullcontext() if has_outside else patch.object(Ranker, "scores_outside_tokens", False):
                figures[figure] = replay(Target(target, head.config), head, texts, args.node_budgets)
        for budget in args.node_budgets:
            rates = {figure: round(stats[budget].tokens_per_round, 3) for figure, stats in figures.items()}
            rows.append({"prompts": name, "num_prompts": len(texts), "node_budget": budget, **rates})
            others = ", ".join(f"{figure.replace('_', ' ')} {rates[figure]:.2f}" for figure in list(FIGURES)[1:])
            print(f"{name}, {budget} nodes: {rates['tokens_per_round']:.2f}; {others}")
    head.branch_correction, head.config.ngram_weights = correction, weights
    write_json({"environment": environment(head), "head": args.head, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
