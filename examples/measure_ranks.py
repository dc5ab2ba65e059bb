"""Acceptance by depth and rank: how often the target's token is the head's first, second, ... choice.

The table is an input of `hf-jetflow simulate`.

    python examples/measure_ranks.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts --json ranks.json
"""

from replayed import load_pair, make_parser, text_sets

from hf_jetflow.bench.environment import environment
from hf_jetflow.files import write_json
from hf_jetflow.target.target import Target
from hf_jetflow.training.replay import acceptance_by_rank


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--num-ranks", type=int, default=32)
    args = parser.parse_args()

    target, tokenizer, head = load_pair(args)
    tables = {}
    for name, texts in text_sets(args, target, tokenizer):
        shares = acceptance_by_rank(Target(target, head.config), head, texts, args.num_ranks)
        tables[name] = [[round(share, 5) for share in ranks] for ranks in shares]
        print(f"{name}: first choice by depth " + " ".join(f"{ranks[0]:.3f}" for ranks in shares))
    facts = {"environment": environment(head), "head": args.head, "num_prompts": args.num_prompts}
    write_json({**facts, "acceptance_by_rank": tables}, args.json)


if __name__ == "__main__":
    main()
