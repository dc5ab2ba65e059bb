"""The draft trees of a generation as one self-contained HTML page: `tree_page.html` with its data."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..decoding.tree_log import TreeRound
from .token_text import TokenLabels, text_pieces
from .tree_layout import lay_out
from .tree_plot import check_rounds, heading


KINDS = ("root", "accepted", "bonus", "rejected")  # the page's data has the index


def tree_page(
    rounds: Sequence[TreeRound],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str = "",
    about: str = "",
    first: int = 1,
) -> str:
    """
    A page with the generated text, a slider over its rounds, their trees, and statistics.

    Args:
        rounds: `head.last_trees` of a generation with `head.record_trees = True`.
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        prompt (`str`): Shown above the text.
        about (`str`): One line that describes the run.
        first (`int`): Number of the round shown first, from 1.

    Returns:
        `str`: HTML that loads nothing; its content security policy forbids it.

    Raises:
        JetFlowError: If nothing was recorded, or there is no such round.
    """
    check_rounds(rounds, [first])
    labels = TokenLabels(tokenizer)
    tokens = {token for tree_round in rounds for token in [*tree_round.tokens, tree_round.bonus_id]}
    data = {
        "title": "Draft trees" + (f": {about}" if about else ""),
        "about": about,
        "prompt": prompt,
        "first": first,
        "figures": _figures(rounds),
        "depths": _accepted_by_depth(rounds),
        "pieces": _pieces(rounds, tokenizer),
        "labels": {token: [labels.label(token), labels.text(token)] for token in sorted(tokens)},
        "rounds": [_round_data(tree_round) for tree_round in rounds],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no tag in scripts
    return files(__package__).joinpath("tree_page.html").read_text(encoding="utf-8").replace("__DATA__", text)


def _round_data(tree_round: TreeRound) -> dict[str, Any]:
    return {
        "heading": heading(tree_round),
        "accepted": tree_round.num_accepted,
        "seconds": {step: round(seconds, 6) for step, seconds in tree_round.seconds_by_step.items()},
        "nodes": [
            [
                node.token,
                node.parent,
                node.depth,
                KINDS.index(node.kind),
                None if node.probability is None else float(f"{node.probability:.4g}"),
                node.row,
                with_path_on_top.row,
            ]
            for node, with_path_on_top in zip(lay_out(tree_round), lay_out(tree_round, path_first=True), strict=True)
        ],
    }


def _pieces(rounds: Sequence[TreeRound], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int, int]]:
    """Text, kind and round of every token; the first token is from the prefill, so its round is -1."""
    ids, facts = [rounds[0].tokens[0]], [(KINDS.index("root"), -1)]
    for number, tree_round in enumerate(rounds):
        ids += tree_round.new_ids
        facts += [(KINDS.index("accepted"), number)] * tree_round.num_accepted + [(KINDS.index("bonus"), number)]
    return [(piece, kind, number) for piece, (kind, number) in zip(text_pieces(tokenizer, ids), facts, strict=True)]


def _figures(rounds: Sequence[TreeRound]) -> list[tuple[str, str]]:
    """Statistics over all rounds, as (value, label)."""
    tokens = sum(len(tree_round.new_ids) for tree_round in rounds)
    drafted = sum(len(tree_round.tokens) - 1 for tree_round in rounds)
    accepted = sum(tree_round.num_accepted for tree_round in rounds)
    return [
        (f"{tokens / len(rounds):.2f}", "tokens per round"),
        (f"{len(rounds)}", f"rounds for {tokens} tokens"),
        (f"{accepted}", f"of {drafted} drafted tokens accepted"),
        (f"{(drafted + len(rounds)) / len(rounds):.0f}", "nodes verified per round"),
    ]


def _accepted_by_depth(rounds: Sequence[TreeRound]) -> list[tuple[int, int]]:
    """For each depth from 1: rounds that accepted a token there, and rounds whose tree could reach it."""
    return [
        (
            sum(tree_round.num_accepted >= depth for tree_round in rounds),
            sum(tree_round.max_depth >= depth for tree_round in rounds),
        )
        for depth in range(1, max(tree_round.max_depth for tree_round in rounds) + 1)
    ]
