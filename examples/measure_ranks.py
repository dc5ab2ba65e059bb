"""How often the target's token is the head's first, second, ... choice by depth: a table for `hf-jetflow simulate`.

    python examples/measure_ranks.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts --json ranks.json
"""

import argparse
from pathlib import Path

from hf_jetflow import JetFlowHead
from hf_jetflow.answers import greedy_texts
from hf_jetflow.bench import environment, write_json
from hf_jetflow.data import read_prompts
from hf_jetflow.loading import fast_dtype, load_target
from hf_jetflow.replay import acceptance_by_rank
from hf_jetflow.target import Target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--texts", type=Path, required=True, help="folder that keeps the target's greedy answers")
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-ranks", type=int, default=32)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    target, tokenizer = load_target(args.target, fast_dtype())
    head = JetFlowHead.from_pretrained(args.head, dtype=target.dtype)
    tables = {}
    for path in args.prompts:
        prompts = read_prompts([path])[: args.num_prompts]
        texts = greedy_texts(target, tokenizer, prompts, args.texts / path.name, args.max_new_tokens)
        shares = acceptance_by_rank(Target(target, head.config), head, texts, args.num_ranks)
        tables[path.stem] = [[round(share, 5) for share in ranks] for ranks in shares]
        print(f"{path.stem}: first choice by depth " + " ".join(f"{ranks[0]:.3f}" for ranks in shares))
    facts = {"environment": environment(), "head": args.head, "num_prompts": args.num_prompts}
    write_json({**facts, "acceptance_by_rank": tables}, args.json)


if __name__ == "__main__":
    main()
