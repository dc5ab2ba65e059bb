"""Recycled choices: what the target chose at the rejected nodes of a tree, as evidence for the next tree.

A verify computes the target's choice behind every node, and a rejected branch is often drafted again a few tokens
later. Token Recycling (arXiv 2408.08696) drafts from such choices alone, kept for every token of the vocabulary. Here
those of the newest tree shift the head's scores, looked up by the last tokens of a branch as n-grams of the text are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..transfer import must_not_wait, to_device
from .ngrams import Gram
from .tree import DraftTree


NO_CHOICE = -2  # equals no token that is looked up


@dataclass
class RecycledChoices:
    """The newest verified tree of each sequence; nodes (sequences, nodes) come behind their parents."""

    tokens: torch.Tensor
    parents: torch.Tensor  # negative for the root
    choices: torch.Tensor  # the target's choice behind each rejected node; `NO_CHOICE` on the path and for padding
    num_committed: torch.Tensor  # (sequences,), tokens that the tree's round committed

    def select_sequences(self, index: torch.Tensor) -> "RecycledChoices":
        """Only these sequences, in this order."""
        return RecycledChoices(
            *(part[index.to(part.device)] for part in (self.tokens, self.parents, self.choices, self.num_committed))
        )

    def padded(self, num_nodes: int) -> "RecycledChoices":
        """Grown to a fixed number of nodes by some that match nothing."""
        num_missing = num_nodes - self.tokens.shape[1]
        if not num_missing:
            return self
        tokens, choices = (pad(part, (0, num_missing), value=NO_CHOICE) for part in (self.tokens, self.choices))
        return RecycledChoices(tokens, pad(self.parents, (0, num_missing)), choices, self.num_committed)


def recycle(tree: DraftTree, logits: torch.Tensor, paths: Sequence[Sequence[int]]) -> RecycledChoices | None:
    """
    The choices at rejected nodes; `None` if the trees have roots only.

    Args:
        tree ([`~tree.DraftTree`]): Verified trees of (sequences, nodes).
        logits (`torch.Tensor`, (sequences, nodes, vocab)): The target's, at every node.
        paths: Accepted nodes of each sequence, root first.
    """
    if tree.num_nodes == 1:
        return None
    device = tree.tokens.device
    choices = (logits.argmax(-1) if must_not_wait(logits.device) else _argmax_on_host(logits)).to(device)
    longest = max(map(len, paths))
    on_path = to_device([[*path, *[path[-1]] * (longest - len(path))] for path in paths], device)
    num_committed = to_device([len(path) for path in paths], device)
    return RecycledChoices(tree.tokens, tree.parents, choices.scatter(1, on_path, NO_CHOICE), num_committed)


def _argmax_on_host(logits: torch.Tensor) -> torch.Tensor:
    """The argmax of the last dimension, with NumPy: torch's takes 2 ms for 64 rows of 49,152 bfloat16 logits, this one
    0.1 (AMD EPYC, AVX-512). Floats above zero have the order of their bits as integers."""
    bits = logits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[logits.element_size()])
    choices = torch.from_numpy(bits.numpy().argmax(-1))
    best = logits.gather(-1, choices[..., None])
    return choices if bool((best > 0).all()) else logits.float().argmax(-1)


def no_choices(num_sequences: int, num_nodes: int, device: torch.device) -> RecycledChoices:
    """What stands for a tree where none was verified yet and shapes are fixed."""
    nothing = torch.full((num_sequences, num_nodes), NO_CHOICE, device=device)
    # Tensors of their own, as those of a tree are: a captured function would tell the two apart.
    return RecycledChoices(nothing, torch.full_like(nothing, -1), nothing.clone(), nothing.new_ones(num_sequences))


class RecycledNgrams:
    """
    The choices of one sequence as counted n-grams, with the interface of [`~ngrams.TextNgrams`].

    Args:
        tokens, parents, choices: Of the sequence's nodes, see [`RecycledChoices`].
        text (`Sequence[int]`): The newest committed tokens, the anchor last.
        num_committed (`int`): How many of them the tree's round committed.
        longest (`int`): Tokens of the longest match.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        parents: Sequence[int],
        choices: Sequence[int],
        text: Sequence[int],
        num_committed: int,
        longest: int,
    ):
        self.root, self._longest = Gram(), longest
        before = [self.root]  # the tree's root is the last of these tokens
        for token in text[: len(text) - num_committed][-longest - 1 : -1]:
            before = self._grown(before, token)
        ends: list[list[Gram]] = []  # of each node: n-grams at its end
        for token, parent, choice in zip(tokens, parents, choices, strict=True):
            ends.append(self._grown(before if parent < 0 else ends[parent], token))
            for gram in ends[-1][1:] if choice >= 0 else ():
                gram.next(choice).count += 1
                gram.followed += 1
        self.tail = [self.root]
        for token in text[-longest:]:
            found = (gram.nexts.get(token) for gram in self.tail[:longest])
            self.tail = [self.root, *(gram for gram in found if gram is not None)]

    def _grown(self, grams: list[Gram], token: int) -> list[Gram]:
        return [self.root, *(gram.next(token) for gram in grams[: self._longest])]
