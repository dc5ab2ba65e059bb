"""Context n-grams: tokens that followed a branch's last tokens earlier in the text, as evidence for its next ones.

The head drafts all depths in one forward, so it cannot look up what followed the tokens of a branch. The text can be
searched at almost no cost. Prompt lookup decoding drafts from such matches alone. Here they shift the head's scores
node by node, and continue the tree below the block's last depth.
"""

import math
from array import array
from collections.abc import Sequence
from typing import Protocol

import torch

from .tree import Candidates, DraftTree, trim_tree


MAX_SEARCHED = 2048  # newest tokens to search
MAX_MATCH = 32  # longest match to count, in tokens


class Gram:
    """An n-gram of a text: its count, and the n-grams one token longer. The root is the empty n-gram."""

    __slots__ = ("count", "followed", "nexts")

    def __init__(self) -> None:
        self.count = 0
        self.nexts: dict[int, Gram] = {}
        self.followed = 0  # sum of the counts of `nexts`

    def next(self, token: int) -> "Gram":
        """The n-gram one token longer, which may be new."""
        longer = self.nexts.get(token)
        if longer is None:
            longer = self.nexts[token] = Gram()
        return longer


class CountedNgrams(Protocol):
    """N-grams as a trie: the empty one, and those at the end of the text, of 0 tokens and more."""

    root: Gram
    tail: list[Gram]


class TextNgrams:
    """
    N-gram counts of a text, updated as the text grows. A trie on the host, where branches are looked up.

    Args:
        longest (`int`): Tokens of the longest match.
    """

    def __init__(self, longest: int):
        self._longest = longest
        self._clear()

    def _clear(self) -> None:
        self.ids: list[int] = []
        self.root = Gram()
        self.tail = [self.root]  # n-grams at the end of the text, of 0 to `longest` tokens

    def follow(self, ids: list[int]) -> None:
        """Count the n-grams of `ids`. Cheap where the previous text, or its end, is a prefix of `ids`."""
        known = self.ids
        num_gone = next((gone for gone in range(len(known)) if known[gone:] == ids[: len(known) - gone]), len(known))
        if num_gone == len(known):
            self._clear()
        else:
            for _ in range(num_gone):
                self._forget_first()
        for token in ids[len(self.ids) :]:
            self._add(token)

    def _add(self, token: int) -> None:
        self.ids.append(token)
        grown = [self.root]
        for gram in self.tail:
            longer = gram.next(token)
            longer.count += 1
            gram.followed += 1
            grown.append(longer)
        self.tail = grown[: self._longest + 1]

    def _forget_first(self) -> None:
        gram = self.root
        for token in self.ids[: self._longest + 1]:
            longer = gram.nexts[token]
            longer.count -= 1
            gram.followed -= 1
            if not longer.count:
                del gram.nexts[token]
            gram = longer
        del self.ids[0]


class ContextNgrams:
    """
    Logit changes of candidates after each branch of a tree.

    A position of the text matches a branch by `n` tokens when the `n` tokens that end there are the branch's last
    ones; committed tokens before the anchor count as part of the branch. For each `n`, the candidates share
    `weights[n - 1]` in proportion to how often each of them followed such a match.

    Args:
        sources (`Sequence[Sequence[CountedNgrams]]`): Of each sequence the n-grams of the committed tokens, the anchor
            last, and maybe other n-grams, which count apart.
        candidates ([`~tree.Candidates`]): Tokens to choose from at each depth.
        weights (`Sequence[Sequence[float]]`): Of each source, one for each length of a match, from 1.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[CountedNgrams]],
        candidates: Candidates,
        weights: Sequence[Sequence[float]],
    ):
        self._sources, self._weights = sources, weights
        self._width = candidates.tokens.shape[-1]
        self._tokens = candidates.tokens.view(len(sources), -1, self._width).tolist()
        # By sequence and branch of the previous depth: of each source, the n-grams at the branch's end.
        self._grams: list[list[list[list[Gram]]]] = []

    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """
        Logit changes (..., branches, width) of a depth's candidates.

        Args:
            parents (`torch.Tensor`, (..., branches)): Index of each branch's parent among the branches of the previous
                depth.
            tokens (`torch.Tensor`, (..., branches)): Last token of each branch.
        """
        if depth:
            flat = torch.stack([parents, tokens]).view(2, len(self._sources), -1).tolist()  # one transfer from a GPU
            self._grams = [self._extended(index, *branches) for index, branches in enumerate(zip(*flat, strict=True))]
        else:
            self._grams = [[[ngrams.tail[1:] for ngrams in sources]] for sources in self._sources]
        rows: dict[tuple[Gram | None, ...], int] = {}  # branches with the same longest matches share a row
        changes, zeros, row_by_branch = array("f"), bytes(4 * self._width), []
        for tokens_by_depth, branches in zip(self._tokens, self._grams, strict=True):
            columns = {token: column for column, token in enumerate(tokens_by_depth[depth])}
            for by_source in branches:
                longest = tuple(grams[-1] if grams else None for grams in by_source)
                row = rows.get(longest)
                if row is None:
                    row = rows[longest] = len(rows)
                    changes.frombytes(zeros)
                    for grams, weights in zip(by_source, self._weights, strict=True):
                        self._add_changes(changes, row * self._width, columns, grams, weights)
                row_by_branch.append(row)
        changes_by_row = torch.frombuffer(changes, dtype=torch.float32).view(-1, self._width)
        by_branch = changes_by_row.index_select(0, torch.tensor(row_by_branch, device="cpu"))
        return by_branch.view(*tokens.shape, -1).to(tokens.device)

    @staticmethod
    def _add_changes(
        changes: array, start: int, columns: dict[int, int], grams: list[Gram], weights: Sequence[float]
    ) -> None:
        """Add what the n-grams at a branch's end give to the row that begins at `start`."""
        for gram, weight in zip(grams, weights, strict=False):
            if weight and gram.followed:
                share = weight / gram.followed
                for token, longer in gram.nexts.items():
                    if token in columns:
                        changes[start + columns[token]] += share * longer.count

    def _extended(self, index: int, parents: list[int], tokens: list[int]) -> list[list[list[Gram]]]:
        """N-grams at the end of each branch of a sequence, by source, given those of their parents."""
        before = self._grams[index]
        return [
            [
                _longer(ngrams.root, shorter, token, len(weights))
                for ngrams, shorter, weights in zip(self._sources[index], before[parent], self._weights, strict=True)
            ]
            for parent, token in zip(parents, tokens, strict=True)
        ]


def _longer(root: Gram, before: list[Gram], token: int, longest: int) -> list[Gram]:
    """N-grams of 1 to `longest` tokens at the end of a branch, given those at its parent's end and its last token."""
    grams: list[Gram] = []
    gram = root.nexts.get(token)
    for shorter in before[: longest - 1]:
        if gram is None:
            return grams
        grams.append(gram)
        gram = shorter.nexts.get(token)
    if gram is not None:
        grams.append(gram)
    return grams


def continue_tree(
    tree: DraftTree, newest_ids: torch.Tensor, node_budget: int, max_continued: int, min_logprob: float = -math.inf
) -> DraftTree:
    """
    Continue a tree below the head's deepest level, and return the best nodes of both parts.

    The longest earlier match of the best branch supplies the next tokens. After a match of `n` tokens the next one
    gets the probability `n / (n + 2)`, which fits what SmolLM2-135M-Instruct wrote. Runs on the host.

    Args:
        tree ([`~tree.DraftTree`]): The tree of one sequence; trees of batches are returned unchanged.
        newest_ids (`torch.Tensor`, (..., seq)): Newest committed tokens, the anchor last.
        node_budget (`int`): Maximum number of nodes, root included.
        max_continued (`int`): Maximum number of levels to add.
        min_logprob (`float`): Nodes below it are not added.
    """
    if max_continued < 1 or tree.max_depth < 1 or tree.tokens.numel() != tree.num_nodes:
        return tree
    tokens, parents, depths = torch.stack([tree.tokens, tree.parents, tree.depths]).view(3, -1).tolist()
    if depths[-1] < tree.max_depth:  # nodes come in order of depth
        return tree
    scores = tree.logprobs.flatten().tolist()
    leaf = max((node for node, depth in enumerate(depths) if depth == depths[-1]), key=scores.__getitem__)
    floor = max(min_logprob, min(scores) if tree.num_nodes == node_budget else -math.inf)
    if scores[leaf] <= floor:
        return tree
    text = newest_ids.flatten()[-MAX_SEARCHED:].tolist() + [tokens[node] for node in _path_to(leaf, parents)]
    length, index = _longest_match(text)
    parent, score = leaf, scores[leaf]
    for level in range(1, max_continued + 1):
        if not length or (score := score + math.log(length / (length + 2))) <= floor:
            break
        text.append(text[index])
        tokens.append(text[index])
        parents.append(parent)
        depths.append(tree.max_depth + level)
        scores.append(score)
        parent, index, length = len(tokens) - 1, index + 1, length + 1
    if parent == leaf:
        return tree
    return trim_tree(_with_nodes(tree, tokens, parents, depths, scores), node_budget)


def _path_to(node: int, parents: list[int]) -> list[int]:
    """The nodes from the root's child down to `node`."""
    path = []
    while node > 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def _longest_match(text: list[int]) -> tuple[int, int]:
    """Length of the longest earlier match of the text's end, `MAX_MATCH` at most, and the index after that match. The
    latest one wins a tie."""
    best, index, last = 0, 0, len(text) - 1
    for end in range(last - 1, -1, -1):
        if text[end] == text[last]:
            length = 1
            while length <= min(end, MAX_MATCH - 1) and text[end - length] == text[last - length]:
                length += 1
            if length > best:
                best, index = length, end + 1
                if best == MAX_MATCH:
                    break
    return best, index


def _with_nodes(
    tree: DraftTree, tokens: list[int], parents: list[int], depths: list[int], scores: list[float]
) -> DraftTree:
    """The tree, grown to these nodes."""
    shape, device = (*tree.tokens.shape[:-1], len(tokens)), tree.tokens.device
    return DraftTree(
        tokens=torch.tensor(tokens, device=device).view(shape),
        parents=torch.tensor(parents, device=device).view(shape),
        depths=torch.tensor(depths, device=device).view(shape),
        logprobs=torch.tensor(scores, dtype=torch.float32, device=device).view(shape),
        max_depth=depths[-1],
    )
