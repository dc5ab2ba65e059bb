"""Context n-grams as tensor operations of fixed shapes: the results of `ngrams.py` without a wait of the host.

The trie of `ngrams.py` is faster on the CPU. On an accelerator each look-up would make the host wait for the branches,
so here every branch is compared with all positions of the text.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from ..transfer import repeated
from .ngrams import MAX_MATCH, MAX_SEARCHED
from .recycled import RecycledChoices
from .tree import Candidates, DraftTree, trim_tree


NO_TOKEN = -2  # in front of shorter texts, which come padded with -1; equals no token that is looked up


class MatchedNgrams:
    """
    Logit changes of candidates after each branch of a tree, as [`~ngrams.ContextNgrams`] defines them.

    Args:
        newest_ids (`torch.Tensor`, (..., seq)): Newest committed tokens of each sequence, the anchor last; negative
            ids in front of shorter texts.
        candidates ([`~tree.Candidates`]): Tokens to choose from at each depth.
        weights (`Sequence[float]`): One for each length of a match, from 1.
        recycled ([`~recycled.RecycledChoices`], *optional*): Choices that count like further places of the text.
        recycled_weight (`float`): Their weight, as a multiple of `weights`.
    """

    def __init__(
        self,
        newest_ids: torch.Tensor,
        candidates: Candidates,
        weights: Sequence[float],
        recycled: RecycledChoices | None = None,
        recycled_weight: float = 1.0,
    ):
        texts = newest_ids.reshape(-1, newest_ids.shape[-1])[:, -MAX_SEARCHED:]
        device, longest = texts.device, len(weights)
        self._ids = texts[:, :-1].where(texts[:, :-1] >= 0, NO_TOKEN)
        tokens = candidates.tokens.reshape(len(texts), *candidates.tokens.shape[-2:])
        # Whether each candidate follows each place, and whether anything does: (texts, depth, places, width + 1).
        follows = texts[:, None, 1:, None] == tokens[:, :, None]
        self._follows = [pad(follows.float(), (0, 1), value=1.0)]
        self._gains = [1.0]
        # Of each place, the place before it, from 1; 0 for none: (texts, places). `None` where they come one by one.
        self._before: torch.Tensor | None = None
        if recycled is not None:
            anchors = texts.shape[1] - 1 - recycled.num_committed[:, None]
            of_nodes = recycled.parents + texts.shape[1]
            of_nodes = torch.where(recycled.parents < 0, anchors.clamp_min(0), of_nodes)
            of_text = torch.arange(texts.shape[1] - 1, device=device).expand(len(texts), -1)
            self._before = torch.cat([of_text, of_nodes], dim=1)
            self._ids = torch.cat([self._ids, recycled.tokens], dim=1)
            follows = recycled.choices[:, None, :, None] == tokens[:, :, None]
            is_choice = (recycled.choices >= 0)[:, None, :, None].expand_as(follows[..., :1])
            self._follows.append(torch.cat([follows, is_choice], dim=-1).float())
            self._gains.append(recycled_weight)
        counted = [length for length, weight in enumerate(weights, 1) if weight] or [longest]
        self._longest, ones = longest, [1] * len(counted)
        chosen = [weights[length - 1] for length in counted]
        self._counts, self._weights = (repeated(each, ones, device).view(-1, 1, 1) for each in (counted, chosen))
        # Of each branch of the newest depth, at first of the text: length of the match that ends at each place,
        # counted from 1, (texts, branches, places + 1).
        self._of_text = torch.zeros(len(texts), 1, self._ids.shape[1] + 1, dtype=torch.int8, device=device)
        for token in texts[:, -longest:].unbind(1):
            self._of_text = self._longer(self._of_text, token[:, None])
        self._lengths = self._of_text

    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logit changes (..., branches, width) of a depth's candidates, see `ContextNgrams`."""
        if depth == 0:
            self._lengths = self._of_text
        else:
            parents, of_branch = (each.reshape(len(self._ids), -1) for each in (parents, tokens))
            index = parents[..., None].expand(-1, -1, self._lengths.shape[-1])
            self._lengths = self._longer(self._lengths.gather(1, index), of_branch)
        matches = (self._lengths[:, None, :, 1:] >= self._counts).float()  # (texts, match lengths, branches, places)
        parts = matches.split([follows.shape[2] for follows in self._follows], dim=-1)
        changes = [
            self._changes(part, follows[:, depth], gain)
            for part, follows, gain in zip(parts, self._follows, self._gains, strict=True)
        ]
        return (changes[0] if len(changes) == 1 else changes[0] + changes[1]).view(*tokens.shape, -1)

    def _changes(self, matches: torch.Tensor, follows: torch.Tensor, gain: float) -> torch.Tensor:
        """Logit changes (texts, branches, width) by matches (texts, match lengths, branches, places)."""
        counts = (matches.flatten(1, 2) @ follows).view(*matches.shape[:3], -1)
        return (gain * self._weights * counts[..., :-1] / counts[..., -1:].clamp_min(1)).sum(1)

    def _longer(self, before: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Lengths of the matches of branches, whose tokens but the last match by `before` (texts, branches, places +
        1), and whose last tokens are `tokens` (texts, branches)."""
        if self._before is None:
            before = before[..., :-1]
        else:
            before = before.gather(2, self._before[:, None].expand(-1, before.shape[1], -1))
        lengths = (before.clamp_max(self._longest - 1) + 1) * (self._ids[:, None] == tokens[..., None])
        return torch.cat([lengths.new_zeros((*lengths.shape[:2], 1)), lengths], dim=-1)


def continue_with_matches(
    tree: DraftTree, newest_ids: torch.Tensor, node_budget: int, max_continued: int, min_logprob: float = -math.inf
) -> DraftTree:
    """
    `ngrams.continue_tree` with a fixed number of nodes: those of the budget, or as many as can be.

    Nodes at minus infinity fill up what `continue_tree` leaves out. `max_depth` is the deepest level that may hold
    nodes.
    """
    if max_continued < 1 or tree.max_depth < 1 or tree.tokens.numel() != tree.num_nodes:
        return tree
    tokens, parents, depths, scores = (
        each.flatten() for each in (tree.tokens, tree.parents, tree.depths, tree.logprobs)
    )
    is_deepest = depths == tree.max_depth
    leaf = scores.where(is_deepest, -math.inf).argmax(0, keepdim=True)
    path = [leaf]
    for _ in range(tree.max_depth - 1):
        path.append(parents.index_select(0, path[-1]).clamp_min(0))
    text = torch.cat([newest_ids.flatten()[-MAX_SEARCHED:], tokens.index_select(0, torch.cat(path[::-1]))])
    length, index = _longest_match(text)
    steps = torch.arange(max_continued, device=text.device)
    known = length + steps
    added = scores.index_select(0, leaf) + (known / (known + 2)).log().cumsum(0)
    is_added = is_deepest.any() & (added > min_logprob)
    if tree.num_nodes == node_budget:
        is_added = is_added & (added > scores.min())
    added = added.where(is_added, -math.inf)
    grown = DraftTree(
        # A match that reaches the text's end goes on with the tokens added: it repeats itself.
        tokens=torch.cat([tokens, text.index_select(0, index + steps % (len(text) - index))]),
        parents=torch.cat([parents, leaf, len(tokens) + steps[:-1]]),
        depths=torch.cat([depths, tree.max_depth + 1 + steps]),
        logprobs=torch.cat([scores, added]),
        max_depth=tree.max_depth + max_continued,
    )
    best = trim_tree(grown, node_budget)
    shape = (*tree.tokens.shape[:-1], best.num_nodes)
    parts = (best.tokens, best.parents, best.depths, best.logprobs)
    tokens, parents, depths, scores = (part.view(shape) for part in parts)
    return DraftTree(tokens, parents, depths, scores, best.max_depth)


def _longest_match(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Length of the longest earlier match of the text's end and the index after it, (1,) each, see `ngrams.py`."""
    windows = pad(text, (MAX_MATCH - 1, 0), value=-1).unfold(0, MAX_MATCH, 1)  # ends of the text at each position
    is_same = (windows[:-1] == windows[-1]) & (windows[:-1] >= 0)
    lengths = is_same.flip(1).cumprod(1).sum(1)
    latest = (lengths * len(text) + torch.arange(len(lengths), device=text.device)).argmax(0, keepdim=True)
    return lengths.index_select(0, latest), latest + 1
