"""Context n-grams: what followed a branch's last tokens earlier in the text, as evidence for its next ones.

The block is drafted in one forward, so its rows cannot look up what came after the tokens of a branch; the text itself
can be asked, at hardly any cost. Prompt lookup decoding drafts from such matches alone; here they shift the draft
head's scores, node by node, and go on where the block ends.
"""

import math
from array import array
from collections.abc import Sequence

import torch

from .tree import Candidates, DraftTree, trim_tree


MAX_CONTEXT = 2048  # newest tokens that are searched
MAX_MATCH = 32  # tokens of a match that are counted


class _Gram:
    """A sequence of tokens that occurs in a text: how often, and what came next."""

    __slots__ = ("count", "followed", "nexts")

    def __init__(self) -> None:
        self.count = 0
        self.nexts: dict[int, _Gram] = {}
        self.followed = 0  # sum of their counts


class TextNgrams:
    """
    Counts of what followed the n-grams of a text, kept up as the text grows. On the host, as the tree is grown there.

    Args:
        longest (`int`): Most tokens of a match.
    """

    def __init__(self, longest: int):
        self._longest = longest
        self._clear()

    def _clear(self) -> None:
        self._ids: list[int] = []
        self.root = _Gram()
        self._tail = [self.root]  # the grams at the end of the text, from none to `longest` tokens

    @property
    def tail(self) -> list[_Gram]:
        """The grams at the end of the text, of one token, two tokens, ..."""
        return self._tail[1:]

    def follow(self, ids: list[int]) -> None:
        """Count another text, at little cost where it is the earlier one, maybe without its beginning, and some more
        tokens."""
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
        for gram in self._tail:
            longer = gram.nexts.get(token)
            if longer is None:
                longer = gram.nexts[token] = _Gram()
            longer.count += 1
            gram.followed += 1
            grown.append(longer)
        self._tail = grown[: self._longest + 1]

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

    A place of the text matches a branch by `n` tokens when the `n` tokens that end there are the branch's last ones,
    committed tokens before the anchor included. For each `n` the candidates share `weights[n - 1]`, by how often each
    of them came next at the places that match by `n` tokens or more.

    Args:
        texts (`Sequence[TextNgrams]`): Of each sequence, all committed tokens, the anchor last.
        candidates ([`~tree.Candidates`]): Proposals per depth.
        weights (`Sequence[float]`): One for each length of match, from 1.
    """

    def __init__(self, texts: Sequence[TextNgrams], candidates: Candidates, weights: Sequence[float]):
        self._texts, self._weights = texts, weights
        self._width = candidates.tokens.shape[-1]
        self._tokens = candidates.tokens.view(len(texts), -1, self._width).tolist()
        self._grams: list[list[list[_Gram]]] = []  # at the end of each branch of the depth before, by sequence

    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """
        Logit changes (..., branches, width) of a depth's candidates.

        Args:
            parents (`torch.Tensor`, (..., branches)): Each branch's place among the branches of the depth before.
            tokens (`torch.Tensor`, (..., branches)): Their last tokens.
        """
        if depth:
            flat = torch.stack([parents, tokens]).view(2, len(self._texts), -1).tolist()  # one transfer from a GPU
            self._grams = [self._longer(place, *branches) for place, branches in enumerate(zip(*flat, strict=True))]
        else:
            self._grams = [[text.tail] for text in self._texts]
        rows: dict[_Gram | None, int] = {}  # branches that end alike share one
        changes, zeros, of_branch = array("f"), bytes(4 * self._width), []
        for of_depth, branches in zip(self._tokens, self._grams, strict=True):
            columns = {token: column for column, token in enumerate(of_depth[depth])}
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
                of_branch.append(row)
        of_row = torch.frombuffer(changes, dtype=torch.float32).view(-1, self._width)
        return of_row.index_select(0, torch.tensor(of_branch, device="cpu")).view(*tokens.shape, -1).to(tokens.device)

    def _longer(self, place: int, parents: list[int], tokens: list[int]) -> list[list[_Gram]]:
        """The grams at the end of each branch of a sequence, given those of their parents."""
        root, before = self._texts[place].root, self._grams[place]
        most = len(self._weights) - 1
        of_branch = []
        for parent, token in zip(parents, tokens, strict=True):
            grams = []
            gram = root.nexts.get(token)
            for shorter in before[parent][:most]:
                if gram is None:
                    break
                grams.append(gram)
                gram = shorter.nexts.get(token)
            if gram is not None:
                grams.append(gram)
            of_branch.append(grams)
        return of_branch


def continue_tree(
    tree: DraftTree, context_ids: torch.Tensor, node_budget: int, max_continued: int, least_logprob: float = -math.inf
) -> DraftTree:
    """
    The best nodes of a tree and of a continuation below its deepest level, where it has no candidates.

    The best node of that level is followed by what came after the longest match of its branch earlier in the text.
    Of a match of `n` tokens the next one is taken to follow with probability `n / (n + 2)`: in 600 greedy answers of
    SmolLM2-135M-Instruct it did in 65, 74, 85 and 98 % of the cases for 3, 5, 10 and 16 tokens or more. Works on the
    host, as what reads the tree next does.

    Args:
        tree ([`~tree.DraftTree`]): Of one sequence; others are returned as they are.
        context_ids (`torch.Tensor`, (..., seq)): All committed tokens, the anchor last.
        node_budget (`int`): Most nodes of the result, the root included.
        max_continued (`int`): Most levels that are added.
        least_logprob (`float`): No node below it is added.
    """
    if max_continued < 1 or tree.max_depth < 1 or tree.tokens.numel() != tree.num_nodes:
        return tree
    tokens, parents, depths = torch.stack([tree.tokens, tree.parents, tree.depths]).view(3, -1).tolist()
    if depths[-1] < tree.max_depth:  # nodes come in order of depth
        return tree
    scores = tree.logprobs.flatten().tolist()
    leaf = max((node for node, depth in enumerate(depths) if depth == depths[-1]), key=scores.__getitem__)
    floor = max(least_logprob, min(scores) if tree.num_nodes == node_budget else -math.inf)
    if scores[leaf] <= floor:
        return tree
    text = context_ids.flatten()[-MAX_CONTEXT:].tolist() + [tokens[node] for node in _path_to(leaf, parents)]
    length, place = _longest_match(text)
    parent, score = leaf, scores[leaf]
    for level in range(1, max_continued + 1):
        if not length or (score := score + math.log(length / (length + 2))) <= floor:
            break
        text.append(text[place])
        tokens.append(text[place])
        parents.append(parent)
        depths.append(tree.max_depth + level)
        scores.append(score)
        parent, place, length = len(tokens) - 1, place + 1, length + 1
    if parent == leaf:
        return tree
    return trim_tree(_with_nodes(tree, tokens, parents, depths, scores), node_budget)


def _path_to(node: int, parents: list[int]) -> list[int]:
    """Nodes from the root's child down to `node`."""
    path = []
    while node > 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def _longest_match(text: list[int]) -> tuple[int, int]:
    """How many tokens at the end of a text are the same as somewhere earlier, `MAX_MATCH` at most, and the place
    behind them there; the latest of equal ones."""
    best, place, last = 0, 0, len(text) - 1
    for end in range(last - 1, -1, -1):
        if text[end] == text[last]:
            length = 1
            while length <= min(end, MAX_MATCH - 1) and text[end - length] == text[last - length]:
                length += 1
            if length > best:
                best, place = length, end + 1
                if best == MAX_MATCH:
                    break
    return best, place


def _with_nodes(
    tree: DraftTree, tokens: list[int], parents: list[int], depths: list[int], scores: list[float]
) -> DraftTree:
    """A tree that has grown to these nodes; its ancestor mask is still the old one."""
    shape, device = (*tree.tokens.shape[:-1], len(tokens)), tree.tokens.device
    return DraftTree(
        tokens=torch.tensor(tokens, device=device).view(shape),
        parents=torch.tensor(parents, device=device).view(shape),
        depths=torch.tensor(depths, device=device).view(shape),
        logprobs=torch.tensor(scores, dtype=torch.float32, device=device).view(shape),
        ancestor_mask=tree.ancestor_mask,
        max_depth=tree.max_depth,
    )
