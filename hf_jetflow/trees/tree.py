"""Draft trees: the exact best tree within a node budget.

All functions take one sequence or, with a leading dimension `...`, a batch of them, whose trees then have equally many
nodes.

A tree is best when its nodes are those with the highest cumulative log-probability. As no log-probability is positive,
a node never outranks its parent, so the best `node_budget` nodes always form a tree (arXiv 2606.18394, section 3.4).
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from operator import neg

import torch
from torch.nn.functional import pad


MIN_REST = 1e-6  # least probability of the tokens that are no candidates


@dataclass
class Candidates:
    """Proposals of one draft, best first at every depth."""

    tokens: torch.Tensor  # (..., depth, width) target token ids
    logprobs: torch.Tensor  # (..., depth, width) float32, descending along width


@dataclass
class DraftTree:
    """Nodes in order of depth, the root (the anchor) first, every parent before its children."""

    tokens: torch.Tensor  # (..., nodes) target token ids
    parents: torch.Tensor  # (..., nodes) index of the parent; -1 for the root
    depths: torch.Tensor  # (..., nodes) 0 for the root
    logprobs: torch.Tensor  # (..., nodes) float32, cumulative; 0 for the root
    ancestor_mask: torch.Tensor  # (..., nodes, nodes) bool: row sees column, itself included
    max_depth: int  # deepest level that the head drafted; what n-grams continue goes deeper
    num_continued: int = 0  # levels below it

    @property
    def num_nodes(self) -> int:
        """Nodes of each tree, the root included."""
        return self.tokens.shape[-1]


# scorer(depth, parents, tokens) -> (..., branches, width): log-probabilities of the depth's candidates after each
# branch of the frontier. `tokens` (..., branches) are the branches' last tokens, `parents` (..., branches) their
# places in the previous frontier, by which a scorer with a state of its own carries it down. Called once per depth,
# with depth 0 for the root.
BranchScorer = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (..., width) of candidates, and behind them that of all other tokens together: (..., width +
    1)."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(MIN_REST).log()
    return torch.cat([logprobs, rest], dim=-1)


def corrected_logprobs(logprobs: torch.Tensor, adjustments: torch.Tensor) -> torch.Tensor:
    """
    Log-probabilities of candidates whose logits change by `adjustments`, while all other tokens keep theirs.

    Args:
        logprobs (`torch.Tensor`, (..., width + 1)): Of the candidates and of the rest (see `with_rest`), float32.
        adjustments (`torch.Tensor`, (..., width)): Changes of the candidates' logits.

    Returns:
        `torch.Tensor`, (..., width + 1): Those of the candidates, and that of the rest.
    """
    return torch.log_softmax(logprobs + pad(adjustments, (0, 1)), dim=-1)


def build_tree(
    anchor_id: torch.Tensor,
    candidates: Candidates,
    node_budget: int,
    scorer: BranchScorer | None = None,
    width: int | None = None,
    least_logprob: float = -math.inf,
) -> DraftTree:
    """
    The best tree of at most `node_budget` nodes over the candidates.

    Goes down depth by depth with a frontier of the best `node_budget - 1` branches, which is exact: a node that is not
    among the best of its own depth is not among the best of all. One global sort then picks the nodes.

    Args:
        anchor_id (`torch.Tensor`, (..., 1)): Token of the root.
        candidates (`Candidates`): Proposals per depth; the width-1 case is a chain.
        node_budget (`int`): Most nodes of the tree, root included; at least 1.
        scorer (*optional*): Re-scores the candidates after each branch; without one every branch of a depth shares
            the depth's own row.
        width (`int`, *optional*): Most children of a node, for a scorer; all candidates by default, 1 is a chain.
        least_logprob (`float`): With a scorer on a CPU, branches below it are not followed, nor is any node below it
            in the tree but the best child of the root.

    Returns:
        `DraftTree`: With exactly `min(node_budget, nodes on offer)` nodes.
    """
    device, most = anchor_id.device, node_budget - 1
    max_depth = min(candidates.tokens.shape[-2], most)
    if max_depth == 0:
        return _root_alone(anchor_id)
    tokens = [anchor_id]
    places = torch.zeros_like(anchor_id)
    parents = [places - 1]
    logprobs = [places.float()]
    sizes = [1]
    best_scores: list[list[float]] = [[] for _ in range(anchor_id.numel())]
    for depth in range(max_depth):
        if scorer is None:
            rows, columns = _promising_pairs(sizes[-1], candidates.tokens.shape[-1], most, device)
            scores = logprobs[-1][..., rows] + candidates.logprobs[..., depth, :][..., columns]
        else:
            grid = logprobs[-1][..., None] + scorer(depth, places, tokens[-1])
            best = None
            if width is not None and width < min(most, grid.shape[-1]):
                grid, best = grid.topk(width, dim=-1)
            scores = grid.flatten(-2)
        scores, chosen = scores.topk(min(most, scores.shape[-1]))
        if scorer is not None and device.type == "cpu":  # elsewhere the host would have to wait for the count
            num_in_reach = _count_in_reach(scores, best_scores, most, least_logprob)
            if not num_in_reach and depth:  # the best child of the root always is
                break
            num_in_reach = max(num_in_reach, 1)
            scores, chosen = scores[..., :num_in_reach], chosen[..., :num_in_reach]
        if scorer is None:
            places, columns = rows[chosen], columns[chosen]
        else:
            places = chosen // grid.shape[-1]
            columns = chosen % grid.shape[-1] if best is None else best.flatten(-2).gather(-1, chosen)
        tokens.append(candidates.tokens[..., depth, :].gather(-1, columns))
        parents.append(places + (sum(sizes) - sizes[-1]))
        logprobs.append(scores)
        sizes.append(scores.shape[-1])
    return _best_nodes(tokens, parents, logprobs, sizes, node_budget, max_depth)


def _root_alone(anchor_id: torch.Tensor) -> DraftTree:
    zeros = torch.zeros_like(anchor_id)
    return DraftTree(anchor_id, zeros - 1, zeros, zeros.float(), (zeros == 0)[..., None], max_depth=0)


def chain_of(tokens: torch.Tensor) -> DraftTree:
    """The tree of one path whose tokens (..., length) are given."""
    parents = (torch.arange(tokens.shape[-1], device=tokens.device) - 1).expand_as(tokens)
    max_depth = tokens.shape[-1] - 1
    return DraftTree(
        tokens, parents, parents + 1, torch.zeros_like(tokens).float(), ancestor_mask(parents, max_depth), max_depth
    )


def _count_in_reach(scores: torch.Tensor, best: list[list[float]], most: int, least: float) -> int:
    """How many of a frontier's scores, best first, are at least `least` and among the best `most` of all so far: the
    others, and all below them, are no part of the tree. `best` of each sequence takes them in."""
    num_in_reach = 0
    for place, new in enumerate(scores.view(-1, scores.shape[-1]).tolist()):
        best[place] = sorted(best[place] + new, reverse=True)[:most]
        floor = max(best[place][-1], least) if len(best[place]) == most else least
        num_in_reach = max(num_in_reach, bisect_right(new, -floor, key=neg))
    return num_in_reach


def _best_nodes(
    tokens: list[torch.Tensor],
    parents: list[torch.Tensor],
    logprobs: list[torch.Tensor],
    sizes: list[int],
    node_budget: int,
    max_depth: int,
) -> DraftTree:
    """The best `node_budget` of all frontier nodes, as a tree. Frontiers come root first."""
    scores = torch.cat(logprobs, dim=-1)
    # Nodes are listed depth by depth, so a stable sort keeps a parent before a child of equal score.
    kept = scores.sort(descending=True, stable=True).indices[..., :node_budget].sort().values
    new_parents = _renumbered(torch.cat(parents, dim=-1), kept)
    return DraftTree(
        tokens=torch.cat(tokens, dim=-1).gather(-1, kept),
        parents=new_parents,
        depths=_level_numbers(tuple(sizes), scores.device)[kept],
        logprobs=scores.gather(-1, kept),
        ancestor_mask=ancestor_mask(new_parents, max_depth),
        max_depth=max_depth,
    )


def _renumbered(parents: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Parents (..., kept) of the kept nodes among themselves; the root, which comes first, has none."""
    places = torch.arange(kept.shape[-1], device=kept.device).expand_as(kept)
    new_place = torch.empty_like(parents).scatter_(-1, kept, places)
    new_parents = new_place.gather(-1, parents.gather(-1, kept).clamp_min(0))
    new_parents[..., 0] = -1
    return new_parents


def trim_tree(tree: DraftTree, node_budget: int) -> DraftTree:
    """The best `node_budget` nodes of a tree, which is what `build_tree` would have built with that budget."""
    kept = tree.logprobs.sort(descending=True, stable=True).indices[..., :node_budget].sort().values
    parents, depths = _renumbered(tree.parents, kept), tree.depths.gather(-1, kept)
    deepest = int(depths.max())
    return DraftTree(
        tokens=tree.tokens.gather(-1, kept),
        parents=parents,
        depths=depths,
        logprobs=tree.logprobs.gather(-1, kept),
        ancestor_mask=ancestor_mask(parents, deepest),
        max_depth=tree.max_depth,
        num_continued=max(deepest - tree.max_depth, 0),
    )


def ancestor_mask(parents: torch.Tensor, max_depth: int) -> torch.Tensor:
    """Visibility among nodes, (..., nodes, nodes) bool: each node sees its ancestors and itself."""
    num_nodes = parents.shape[-1]
    parents = parents.clamp_min(0)  # the root's is the root
    lineage = torch.arange(num_nodes, device=parents.device).expand_as(parents)
    columns = [lineage]
    for _ in range(max_depth):
        lineage = parents.gather(-1, lineage)
        columns.append(lineage)
    mask = torch.zeros(*parents.shape, num_nodes, dtype=torch.bool, device=parents.device)
    return mask.scatter_(-1, torch.stack(columns, dim=-1), True)


@lru_cache(maxsize=256)
def _promising_pairs(branches: int, width: int, most: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pairs (branch, candidate) that can be among the best `most`, when branches and candidates are both sorted.

    Every pair with neither index larger scores at least as well, so pair (r, c) is beaten or equalled by
    (r + 1)(c + 1) - 1 others and may be left out once that reaches `most`.
    """
    rows = torch.arange(branches, device=device)[:, None]
    columns = torch.arange(width, device=device)[None, :]
    pairs = ((rows + 1) * (columns + 1) <= most).nonzero()
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


@lru_cache(maxsize=256)
def _level_numbers(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Depth of each node when level d has `sizes[d]` nodes."""
    return torch.tensor([level for level, size in enumerate(sizes) for _ in range(size)], device=device)
