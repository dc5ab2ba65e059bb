"""Context n-grams: tokens that followed a branch's last tokens earlier in the text, as evidence for its next ones.

The head drafts all depths in one forward, so it cannot look up what followed the tokens of a branch. The text can be
searched at almost no cost. Prompt lookup decoding drafts from such matches alone. Here they shift the head's scores
node by node, and continue the tree below the block's last depth.
"""

import math
from array import array
from collections.abc import Sequence

import torch

from .tree import Candidates, DraftTree, trim_tree


MAX_SEARCHED = 2048  # newest tokens to search
MAX_MATCH = 32  # longest match to count, in tokens


class _Gram:
    """An n-gram of a text: its count, and the n-grams one token longer. The root is the empty n-gram."""

    __slots__ = ("count", "followed", "nexts")

    def __init__(self) -> None:
        self.count = 0
        self.nexts: dict[int, _Gram] = {}
        self.followed = 0  # sum of the counts of `nexts`


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
        self._ids: list[int] = []
        self.root = _Gram()
        self.tail = [self.root]  # n-grams at the end of the text, of 0 to `longest` tokens

    def follow(self, ids: list[int]) -> None:
        """Count the n-grams of `ids`. Cheap where the previous text, or its end, is a prefix of `ids`."""
        known = self._ids
        num_gone = next((gone for gone in range(len(known)) if known[gone:] == ids[: len(known) - gone]), len(known))
        if num_gone == len(known):
            self._clear()
        else:
            for _ in range(num_gone):
                self._forget_first()
        for token in ids[len(self._ids) :]:
            self._add(token)

    def _add(self, token: int) -> None:
        self._ids.append(token)
        grown = [self.root]
        for gram in self.tail:
            longer = gram.nexts.get(token)
            if longer is None:
                longer = gram.nexts[token] = _Gram()
            longer.count += 1
            gram.followed += 1
            grown.append(longer)
        self.tail = grown[: self._longest + 1]

    def _forget_first(self) -> None:
        gram = self.root
        for token in self._ids[: self._longest + 1]:
            longer = gram.nexts[token]
            longer.count -= 1
            gram.followed -= 1
            if not longer.count:
                del gram.nexts[token]
            gram = longer
        del self._ids[0]


class ContextNgrams:
    """
    Logit changes of candidates after each branch of a tree.

    A position of the text matches a branch by `n` tokens when the `n` tokens that end there are the branch's last
    ones; committed tokens before the anchor count as part of the branch. For each `n`, the candidates share
    `weights[n - 1]` in proportion to how often each of them followed such a match.

    Args:
        texts (`Sequence[TextNgrams]`): N-grams of the committed tokens of each sequence, the anchor last.
        candidates ([`~tree.Candidates`]): Tokens to choose from at each depth.
        weights (`Sequence[float]`): One for each length of a match, from 1.
    """

    def __init__(self, texts: Sequence[TextNgrams], candidates: Candidates, weights: Sequence[float]):
        self._texts, self._weights = texts, weights
        self._width = candidates.tokens.shape[-1]
        self._tokens = candidates.tokens.view(len(texts), -1, self._width).tolist()
        self._grams: list[list[list[_Gram]]] = []  # by sequence and branch of the previous depth: n-grams at its end

    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """
        Logit changes (..., branches, width) of a depth's candidates.

        Args:
            parents (`torch.Tensor`, (..., branches)): Index of each branch's parent among the branches of the previous
                depth.
            tokens (`torch.Tensor`, (..., branches)): Last token of each branch.
        """
        if depth:
            flat = torch.stack([parents, tokens]).view(2, len(self._texts), -1).tolist()  # one transfer from a GPU
            self._grams = [self._extended(index, *branches) for index, branches in enumerate(zip(*flat, strict=True))]
        else:
            self._grams = [[text.tail[1:]] for text in self._texts]
        rows: dict[_Gram | None, int] = {}  # branches with the same longest match share a row
        changes, zeros, row_by_branch = array("f"), bytes(4 * self._width), []
        for tokens_by_depth, branches in zip(self._tokens, self._grams, strict=True):
            columns = {token: column for column, token in enumerate(tokens_by_depth[depth])}
            for grams in branches:
                longest = grams[-1] if grams else None
                row = rows.get(longest)
                if row is None:
                    row = rows[longest] = len(rows)
                    changes.frombytes(zeros)
                    for gram, weight in zip(grams, self._weights, strict=False):
                        for token, longer in gram.nexts.items():
                            if token in columns:
                                changes[row * self._width + columns[token]] += weight * longer.count / gram.followed
                row_by_branch.append(row)
        changes_by_row = torch.frombuffer(changes, dtype=torch.float32).view(-1, self._width)
        by_branch = changes_by_row.index_select(0, torch.tensor(row_by_branch, device="cpu"))
        return by_branch.view(*tokens.shape, -1).to(tokens.device)

    def _extended(self, index: int, parents: list[int], tokens: list[int]) -> list[list[_Gram]]:
        """N-grams at the end of each branch of a sequence, given those of their parents."""
        root, before = self._texts[index].root, self._grams[index]
        max_shorter = len(self._weights) - 1
        of_branch = []
        for parent, token in zip(parents, tokens, strict=True):
            grams = []
            gram = root.nexts.get(token)
            for shorter in before[parent][:max_shorter]:
                if gram is None:
                    break
                grams.append(gram)
                gram = shorter.nexts.get(token)
            if gram is not None:
                grams.append(gram)
            of_branch.append(grams)
        return of_branch


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
