"""Draft trees: the exact best tree within a node budget.

The best tree holds the `node_budget` nodes with the highest cumulative log-probability. No log-probability is
positive, so a node never outranks its parent, and the best nodes always form a tree (arXiv 2606.18394, section 3.4).
It is built depth by depth: each depth extends a frontier of the best branches so far, and one sort picks the nodes.

All functions take one sequence or, with a leading dimension `...`, a batch. The trees of a batch have one size.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import neg

import torch
from torch.nn.functional import pad

from ..transfer import must_not_wait, repeated


MIN_REST = 1e-6  # minimum total probability of the tokens that are not candidates


@dataclass
class Candidates:
    """
    Tokens of one draft that may become nodes. Along depth, index 0 holds the children of the root.

    Sorted by `logprobs`, best first. With context n-grams, sorted by `logprobs` plus the largest change that n-grams
    can make.
    """

    tokens: torch.Tensor  # (..., depth, width) target token ids
    logprobs: torch.Tensor  # (..., depth, width) float32, of the head alone


@dataclass
class DraftTree:
    """Nodes in order of depth, the root (the anchor) first, every parent before its children."""

    tokens: torch.Tensor  # (..., nodes) target token ids
    parents: torch.Tensor  # (..., nodes) index of the parent; -1 for the root
    depths: torch.Tensor  # (..., nodes) 0 for the root
    logprobs: torch.Tensor  # (..., nodes) float32, cumulative; 0 for the root
    max_depth: int  # deepest level that may hold nodes; the tree need not reach it

    @property
    def num_nodes(self) -> int:
        """Nodes of each tree, the root included."""
        return self.tokens.shape[-1]

    @cached_property
    def ancestor_mask(self) -> torch.Tensor:
        """(..., nodes, nodes) bool: row sees column, itself included."""
        return ancestor_mask(self.parents, self.max_depth)


# score_branches(depth, parents, tokens) -> (..., branches, width): log-probabilities of the candidates at index
# `depth` after each branch of the frontier, whose nodes are at that depth (0: the root alone). `tokens` (...,
# branches) are the branches' last tokens; `parents` (..., branches) are the indices of their parents in the previous
# frontier, by which a scorer carries its state down. Called once per depth.
ScoreBranches = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Append the log-probability of all other tokens to those of the candidates: (..., width) to (..., width + 1)."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(MIN_REST).log()
    return torch.cat([logprobs, rest], dim=-1)


def corrected_logprobs(logprobs: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
    """
    Log-probabilities of candidates after their logits change by `changes`; all other logits stay.

    Args:
        logprobs (`torch.Tensor`, (..., width + 1)): Candidates, then all other tokens (see `with_rest`); float32.
        changes (`torch.Tensor`, (..., width)): Changes of the candidates' logits.

    Returns:
        `torch.Tensor`, (..., width + 1): Candidates, then all other tokens.
    """
    return torch.log_softmax(logprobs + pad(changes, (0, 1)), dim=-1)


def build_tree(
    anchor_id: torch.Tensor,
    candidates: Candidates,
    node_budget: int,
    score_branches: ScoreBranches | None = None,
    width: int | None = None,
    min_logprob: float = -math.inf,
) -> DraftTree:
    """
    Build the best tree of at most `node_budget` nodes over the candidates.

    Each depth keeps a frontier of the best `node_budget - 1` branches. That is exact: a node outside the best of its
    own depth is outside the best of all.

    Args:
        anchor_id (`torch.Tensor`, (..., 1)): Token of the root.
        candidates (`Candidates`): Tokens to choose from at each depth; the width-1 case is a chain.
        node_budget (`int`): Maximum number of nodes, root included; at least 1.
        score_branches (*optional*): Re-scores the candidates after each branch; without it, all branches of a depth
            share the depth's own scores.
        width (`int`, *optional*): Maximum number of children of a node; all candidates by default.
        min_logprob (`float`): Minimum cumulative log-probability; the root's best child is exempt. In a batch, the
            tree with the most nodes above it sets the common size.

    Returns:
        `DraftTree`: With exactly `min(node_budget, nodes on offer)` nodes, or fewer because of `min_logprob`.
    """
    device, max_branches = anchor_id.device, node_budget - 1
    max_depth = min(candidates.tokens.shape[-2], max_branches)
    if max_depth == 0:
        return _root_alone(anchor_id)
    tokens = [anchor_id]
    parent_branches = torch.zeros_like(anchor_id)  # of the newest depth's nodes: their parents in the depth above
    parents = [parent_branches - 1]  # -1: the root has none
    logprobs = [parent_branches.float()]
    sizes = [1]
    best_scores: list[list[float]] = [[] for _ in range(anchor_id.numel())]
    floor = min_logprob if anchor_id.numel() == 1 else -math.inf  # trees of a batch get one size, at the end
    for depth in range(max_depth):
        if score_branches is None:
            child_logprobs = candidates.logprobs[..., depth, :].unsqueeze(-2)
        else:
            child_logprobs = score_branches(depth, parent_branches, tokens[-1])
        grid = logprobs[-1][..., None] + child_logprobs
        scores, parent_branches, columns = _best_children(grid, width, max_branches)
        # Early exit: drop branches that cannot enter the tree, which stays the same.
        if not must_not_wait(device):
            num_in_reach = _count_reachable(scores, best_scores, max_branches, floor)
            if not num_in_reach and depth:  # the root's best child is exempt from the floor
                break
            scores, parent_branches, columns = (
                part[..., : max(num_in_reach, 1)] for part in (scores, parent_branches, columns)
            )
        tokens.append(candidates.tokens[..., depth, :].gather(-1, columns))
        first_parent = sum(sizes[:-1])  # index of the first node of the depth above
        parents.append(parent_branches + first_parent)
        logprobs.append(scores)
        sizes.append(scores.shape[-1])
    tree = _best_nodes(tokens, parents, logprobs, sizes, node_budget, max_depth)
    if min_logprob == -math.inf:
        return tree
    num_above = int((tree.logprobs >= min_logprob).sum(-1).max())
    return trim_tree(tree, max(num_above, 2)) if num_above < tree.num_nodes else tree


def _best_children(
    grid: torch.Tensor, width: int | None, max_branches: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, branches and candidates of the best `max_branches` entries of scores (..., branches, candidates), at
    most `width` of each branch; all (..., entries), best first."""
    best = None
    if width is not None and width < min(max_branches, grid.shape[-1]):
        grid, best = grid.topk(width, dim=-1)
    scores = grid.flatten(-2)
    scores, chosen = scores.topk(min(max_branches, scores.shape[-1]))
    columns = chosen % grid.shape[-1] if best is None else best.flatten(-2).gather(-1, chosen)
    return scores, chosen // grid.shape[-1], columns


def _root_alone(anchor_id: torch.Tensor) -> DraftTree:
    zeros = torch.zeros_like(anchor_id)
    return DraftTree(anchor_id, zeros - 1, zeros, zeros.float(), max_depth=0)


def chain_of(tokens: torch.Tensor) -> DraftTree:
    """A tree of one path with tokens (..., length)."""
    parents = (torch.arange(tokens.shape[-1], device=tokens.device) - 1).expand_as(tokens)
    return DraftTree(tokens, parents, parents + 1, torch.zeros_like(tokens).float(), max_depth=tokens.shape[-1] - 1)


def _count_reachable(scores: torch.Tensor, best: list[list[float]], max_branches: int, floor: float) -> int:
    """
    Count a frontier's scores, best first, that are at least `floor` and among the best `max_branches` of all so far.

    The others, and all below them, are no part of the tree. `best` holds each sequence's scores so far and is updated.
    """
    num_in_reach = 0
    for index, new in enumerate(scores.view(-1, scores.shape[-1]).tolist()):
        best[index] = sorted(best[index] + new, reverse=True)[:max_branches]
        threshold = max(best[index][-1], floor) if len(best[index]) == max_branches else floor
        num_in_reach = max(num_in_reach, bisect_right(new, -threshold, key=neg))
    return num_in_reach


def _best_nodes(
    tokens: list[torch.Tensor],
    parents: list[torch.Tensor],
    logprobs: list[torch.Tensor],
    sizes: list[int],
    node_budget: int,
    max_depth: int,
) -> DraftTree:
    """The tree of the best `node_budget` nodes of all frontiers, which come root first."""
    # NaN would sort before the root, and a node must never come without its parent.
    scores = torch.cat(logprobs, dim=-1).nan_to_num(-math.inf, neginf=-math.inf)
    depths = repeated(range(len(sizes)), sizes, scores.device).expand_as(scores)
    drafted = DraftTree(torch.cat(tokens, dim=-1), torch.cat(parents, dim=-1), depths, scores, max_depth)
    return trim_tree(drafted, node_budget)


def _renumbered(parents: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Parents of the selected nodes as indices among these, (..., selected); -1 for the root, which comes first."""
    indices = torch.arange(selected.shape[-1], device=selected.device).expand_as(selected)
    new_index = torch.empty_like(parents).scatter_(-1, selected, indices)
    new_parents = new_index.gather(-1, parents.gather(-1, selected).clamp_min(0))
    new_parents[..., :1] = -1  # one element alone would be copied from the host, which waits
    return new_parents


def trim_tree(tree: DraftTree, node_budget: int) -> DraftTree:
    """The tree that `build_tree` would have built with a smaller budget."""
    # Nodes are listed depth by depth, so a stable sort breaks ties in favor of the parent.
    selected = tree.logprobs.sort(descending=True, stable=True).indices[..., :node_budget].sort().values
    return DraftTree(
        tokens=tree.tokens.gather(-1, selected),
        parents=_renumbered(tree.parents, selected),
        depths=tree.depths.gather(-1, selected),
        logprobs=tree.logprobs.gather(-1, selected),
        max_depth=tree.max_depth,
    )


def ancestor_mask(parents: torch.Tensor, max_depth: int) -> torch.Tensor:
    """Visibility among nodes, (..., nodes, nodes) bool: each node sees its ancestors and itself."""
    num_nodes = parents.shape[-1]
    parents = parents.clamp_min(0)  # the root counts as its own parent
    lineage = torch.arange(num_nodes, device=parents.device).expand_as(parents)
    columns = [lineage]
    for _ in range(max_depth):
        lineage = parents.gather(-1, lineage)
        columns.append(lineage)
    mask = torch.zeros(*parents.shape, num_nodes, dtype=torch.bool, device=parents.device)
    return mask.scatter_(-1, torch.stack(columns, dim=-1), True)
