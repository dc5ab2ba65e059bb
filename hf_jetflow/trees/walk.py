"""The walk: follow the target's own choices through a verified tree.

No draft probability enters. The chooser picks every token as plain decoding would, on the true prefix, so the result
is exact for every logits processor and, with the same seed, the same sample path as plain decoding.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import LogitsProcessorList

from .tree import DraftTree


class Chooser:
    """
    Picks tokens from target logits as plain decoding does: processors, then argmax or one multinomial draw.

    Args:
        logits_processor (`LogitsProcessorList`): The caller's processors and warpers, in order.
        do_sample (`bool`): Draw instead of taking the argmax.
        keep_scores (`bool`), keep_logits (`bool`): Record processed scores, raw logits of every choice.
        draw: Draws a token from probabilities (1, vocab); `torch.multinomial` by default.
    """

    def __init__(
        self,
        logits_processor: LogitsProcessorList,
        do_sample: bool,
        keep_scores: bool = False,
        keep_logits: bool = False,
        draw: Callable[[torch.Tensor], int] | None = None,
    ):
        self.logits_processor = logits_processor
        self.do_sample = do_sample
        self._draw = draw or (lambda probs: int(torch.multinomial(probs, num_samples=1)))
        self.scores: tuple[torch.Tensor, ...] | None = () if keep_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if keep_logits else None

    @property
    def is_plain_argmax(self) -> bool:
        """Whether every choice is the argmax of the raw logits and nothing is recorded."""
        return not (self.do_sample or self.logits_processor or self.scores is not None or self.logits is not None)

    def choose(self, logits: torch.Tensor, prefix_ids: torch.Tensor) -> int:
        """The token after `prefix_ids` (1, seq), given the target's logits (1, vocab) there."""
        raw = logits.to(copy=True, dtype=torch.float32, device=prefix_ids.device)
        scores = self.logits_processor(prefix_ids, raw)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        if self.do_sample:
            return self._draw(torch.softmax(scores, dim=-1))
        return int(scores.argmax(dim=-1))


class Committer(Protocol):
    """Where the walk commits tokens; [`Emitter`] is one."""

    @property
    def active(self) -> list[int]:
        """The sequence of each tree."""

    def committed_ids(self, sequence: int) -> torch.Tensor:
        """All committed ids of a sequence, (1, seq), at the time of the call."""

    def push(self, sequence: int, token: int, scores: tuple[torch.Tensor, ...] | None) -> bool:
        """Commit a token of a sequence; says whether the sequence ends with it."""


def walk_trees(
    tree: DraftTree, logits: torch.Tensor, choosers: list[Chooser], committer: Committer
) -> list[list[int]]:
    """
    Walk from each root while a child holds the token the target chose; all tokens chosen are pushed.

    Args:
        tree (`DraftTree`): Verified trees, one for each active sequence.
        logits (`torch.Tensor`, (active, nodes, vocab)): The target's logits at every node.
        choosers (`list[Chooser]`): One for each tree; called only at nodes of its path.
        committer ([`Committer`]): Receives the tokens; `active[i]` is the sequence of tree `i`.

    Returns:
        The paths: node ids, root first, whose logits were used.
    """
    all_choices: list[Any] = [None] * len(choosers)
    if choosers[0].is_plain_argmax and _prefers_batched_argmax(logits):
        all_choices, tokens, parents = torch.stack([logits.argmax(dim=-1), tree.tokens, tree.parents]).tolist()
    else:
        tokens, parents = torch.stack([tree.tokens, tree.parents]).tolist()
    paths = []
    for index, (chooser, sequence) in enumerate(zip(choosers, committer.active, strict=True)):
        children = {pair: node for node, pair in enumerate(zip(parents[index], tokens[index], strict=True))}
        paths.append(_walk(children, logits[index], all_choices[index], chooser, committer, sequence))
    return paths


def _walk(
    children: dict[tuple[int, int], int],
    logits: torch.Tensor,
    choices: list[int] | None,
    chooser: Chooser,
    committer: Committer,
    sequence: int,
) -> list[int]:
    """The path of one tree, given its nodes by parent and token, the logits (nodes, vocab), and maybe all choices."""
    path = [0]
    while True:
        node = path[-1]
        if choices is not None:
            token = choices[node]
        elif chooser.is_plain_argmax:
            # NumPy's argmax is about 2x faster on the CPU and breaks ties the same way.
            token = int(logits[node].float().numpy().argmax())
        else:
            token = chooser.choose(logits[node : node + 1], committer.committed_ids(sequence))
        is_finished = committer.push(sequence, token, chooser.scores)
        child = children.get((node, token))
        if is_finished or child is None:
            return path
        path.append(child)


def _prefers_batched_argmax(logits: torch.Tensor) -> bool:
    """Whether one argmax over all nodes and one transfer beat an argmax at each node of the path."""
    return logits.device.type != "cpu"
