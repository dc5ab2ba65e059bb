"""Acceptance by depth and rank: how often the target's token is the head's first, second, ... choice.

The table is an input of `hf-jetflow simulate`.

    python examples/measure_ranks.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts --json ranks.json
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from replayed import load_pair, make_parser, text_sets

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.decoding.drafter import JetFlowCandidateGenerator
from hf_jetflow.decoding.ranking import Draft
from hf_jetflow.files import write_json
from hf_jetflow.target.target import Target
from hf_jetflow.training.replay import _rows_of_all_anchors


@torch.no_grad()
def acceptance_by_rank(
    target: Target,
    head: JetFlowHead,
    texts: Iterable[tuple[Sequence[int], int]],
    num_ranks: int,
) -> list[list[float]]:
    """
    How often the target's token is the head's first, second, ... choice, by depth, with every answer token as anchor.

    Scores are corrected along the text itself. A depth counts if all tokens before it were among the first `num_ranks`
    choices.

    Args:
        texts: Token ids of each text (prompt and greedy answer of the target), and the length of its prompt.
        num_ranks (`int`): Choices counted per depth.

    Returns:
        Shares by depth and rank, (block_size - 1) x `num_ranks`, as `expected_tokens` of the simulation takes them.
    """
    num_depths = head.config.block_size - 1
    hits, reached = torch.zeros(num_depths, num_ranks), torch.zeros(num_depths)
    for ids, num_prompt in texts:
        drafter = JetFlowCandidateGenerator(head, target)
        for position, rows in enumerate(_rows_of_all_anchors(drafter, ids, num_prompt), num_prompt):
            following = ids[position + 1 : position + 1 + num_depths]
            draft = drafter.ranker.rank(rows[: len(following)], torch.tensor(ids[: position + 1]), num_ranks)
            for depth, rank in enumerate(ranks_of(draft, ids[position], following, num_ranks)):
                reached[depth] += 1
                if rank is not None:
                    hits[depth, rank] += 1
    return (hits / reached.clamp_min(1)[:, None]).tolist()


def ranks_of(draft: Draft, token: int, following: Sequence[int], num_ranks: int) -> Iterator[int | None]:
    """Rank of each following token among the candidates, given the tokens before it; `None` ends the iteration."""
    candidates, device = draft.candidates, draft.candidates.tokens.device
    parents = torch.zeros(1, dtype=torch.long, device=device)
    for depth, next_token in enumerate(following):
        scores = candidates.logprobs[depth]
        if draft.score_branches is not None:
            scores = draft.score_branches(depth, parents, torch.tensor([token], device=device))[0]
        choices = candidates.tokens[depth, scores.argsort(descending=True)[:num_ranks]].tolist()
        if next_token not in choices:
            yield None
            return
        yield choices.index(next_token)
        token = next_token


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
