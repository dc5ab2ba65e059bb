"""Draft trees: the exact best tree within a node budget, built with tensor operations only.

A tree is best when its nodes are those with the highest cumulative log-probability. As no log-probability is positive,
a node never outranks its parent, so the best `node_budget` nodes always form a tree (arXiv 2606.18394, section 3.4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch


MIN_REST = 1e-6  # least probability of the tokens that are no candidates


@dataclass
class Candidates:
    """Proposals of one draft, best first at every depth."""

    tokens: torch.Tensor  # (depth, width) target token ids
    logprobs: torch.Tensor  # (depth, width) float32, descending along width


@dataclass
class DraftTree:
    """Nodes in order of depth, the root (the anchor) first, every parent before its children."""

    tokens: torch.Tensor  # (nodes,) target token ids
    parents: torch.Tensor  # (nodes,) index of the parent; -1 for the root
    depths: torch.Tensor  # (nodes,) 0 for the root
    logprobs: torch.Tensor  # (nodes,) float32, cumulative; 0 for the root
    ancestor_mask: torch.Tensor  # (nodes, nodes) bool: row sees column, itself included
    max_depth: int  # deepest level that was drafted


# scorer(depth, parents, tokens) -> (branches, width): log-probabilities of `candidates.tokens[depth]` after each
# branch of the frontier. `tokens` (branches,) are the branches' last tokens, `parents` (branches,) their places in the
# previous frontier, by which a scorer with a state of its own carries it down. Called once per depth, with depth 0 for
# the root.
BranchScorer = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def corrected_logprobs(logprobs: torch.Tensor, adjustments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of candidates whose logits change by `adjustments`, while all other tokens keep theirs.

    Args:
        logprobs (`torch.Tensor`, (..., width)): Of the candidates, float32.
        adjustments (`torch.Tensor`, (..., width)): Changes of their logits.

    Returns:
        Those of the candidates (..., width), and that of all other tokens together (..., 1).
    """
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(MIN_REST).log()
    scores = logprobs + adjustments
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), rest)
    return scores - total, (rest - total).expand(*scores.shape[:-1], 1)


def build_tree(
    anchor_id: torch.Tensor,
    candidates: Candidates,
    node_budget: int,
    scorer: BranchScorer | None = None,
    width: int | None = None,
) -> DraftTree:
    """
    The best tree of at most `node_budget` nodes over the candidates.

    Goes down depth by depth with a frontier of the best `node_budget - 1` branches, which is exact: a node that is not
    among the best of its own depth is not among the best of all. One global sort then picks the nodes.

    Args:
        anchor_id (`torch.Tensor`, (1,)): Token of the root.
        candidates (`Candidates`): Proposals per depth; the width-1 case is a chain.
        node_budget (`int`): Most nodes of the tree, root included; at least 1.
        scorer (*optional*): Re-scores the candidates after each branch; without one every branch of a depth shares
            the depth's own row.
        width (`int`, *optional*): Most children of a node, for a scorer; all candidates by default, 1 is a chain.

    Returns:
        `DraftTree`: With exactly `min(node_budget, nodes on offer)` nodes.
    """
    device, most = anchor_id.device, node_budget - 1
    max_depth = min(len(candidates.tokens), most)
    if max_depth == 0:
        return _root_alone(anchor_id)
    tokens = [anchor_id]
    parents = [anchor_id.new_full((1,), -1)]
    logprobs = [torch.zeros(1, device=device)]
    sizes = [1]
    places = anchor_id.new_zeros(1)
    for depth in range(max_depth):
        if scorer is None:
            rows, columns = _promising_pairs(sizes[-1], candidates.tokens.shape[1], most, device)
            scores = logprobs[-1][rows] + candidates.logprobs[depth][columns]
        else:
            grid = logprobs[-1][:, None] + scorer(depth, places, tokens[-1])
            rows, columns = _grid(*grid.shape, device)
            if width is not None and width < min(most, grid.shape[1]):
                grid, best = grid.topk(width, dim=1)
                rows, columns = rows.view(len(grid), -1)[:, :width].flatten(), best.flatten()
            scores = grid.flatten()
        scores, chosen = scores.topk(min(most, scores.shape[0]))
        if scorer is not None and device.type == "cpu":  # elsewhere the host would have to wait for the count
            num_in_reach = _count_in_reach(scores, logprobs, most)
            if not num_in_reach:
                break
            scores, chosen = scores[:num_in_reach], chosen[:num_in_reach]
        places = rows[chosen]
        tokens.append(candidates.tokens[depth][columns[chosen]])
        parents.append(places + (sum(sizes) - sizes[-1]))
        logprobs.append(scores)
        sizes.append(scores.shape[0])
    return _best_nodes(tokens, parents, logprobs, sizes, node_budget, max_depth)


def _root_alone(anchor_id: torch.Tensor) -> DraftTree:
    zeros = torch.zeros_like(anchor_id)
    return DraftTree(anchor_id, zeros - 1, zeros, zeros.float(), zeros.bool().logical_not()[None], max_depth=0)


def _count_in_reach(scores: torch.Tensor, logprobs: list[torch.Tensor], most: int) -> int:
    """How many of a frontier's scores, best first, are among the best `most` of all so far: the others, and all below
    them, are no part of the tree."""
    known = torch.cat([*logprobs[1:], scores])
    return int((scores >= known.topk(most).values[-1]).sum()) if len(known) > most else len(scores)


def _best_nodes(
    tokens: list[torch.Tensor],
    parents: list[torch.Tensor],
    logprobs: list[torch.Tensor],
    sizes: list[int],
    node_budget: int,
    max_depth: int,
) -> DraftTree:
    """The best `node_budget` of all frontier nodes, as a tree. Frontiers come root first."""
    scores = torch.cat(logprobs)
    # Nodes are listed depth by depth, so a stable sort keeps a parent before a child of equal score.
    kept = scores.sort(descending=True, stable=True).indices[:node_budget].sort().values
    all_depths = _level_numbers(tuple(sizes), scores.device)
    new_place = torch.empty_like(all_depths).scatter_(0, kept, torch.arange(len(kept), device=scores.device))
    old_parents = torch.cat(parents)[kept]
    new_parents = new_place[old_parents.clamp_min(0)]
    new_parents[0] = -1
    return DraftTree(
        tokens=torch.cat(tokens)[kept],
        parents=new_parents,
        depths=all_depths[kept],
        logprobs=scores[kept],
        ancestor_mask=ancestor_mask(new_parents, max_depth),
        max_depth=max_depth,
    )


def trim_tree(tree: DraftTree, node_budget: int) -> DraftTree:
    """The best `node_budget` nodes of a tree, which is what `build_tree` would have built with that budget."""
    kept = tree.logprobs.sort(descending=True, stable=True).indices[:node_budget].sort().values
    new_place = torch.empty_like(tree.parents).scatter_(0, kept, torch.arange(len(kept), device=kept.device))
    parents = new_place[tree.parents[kept].clamp_min(0)]
    parents[0] = -1
    return DraftTree(
        tokens=tree.tokens[kept],
        parents=parents,
        depths=tree.depths[kept],
        logprobs=tree.logprobs[kept],
        ancestor_mask=tree.ancestor_mask[kept][:, kept],
        max_depth=tree.max_depth,
    )


def ancestor_mask(parents: torch.Tensor, max_depth: int) -> torch.Tensor:
    """Visibility among nodes, (nodes, nodes) bool: each node sees its ancestors and itself."""
    num_nodes = len(parents)
    lineage = torch.arange(num_nodes, device=parents.device)
    columns = [lineage]
    for _ in range(max_depth):
        lineage = parents[lineage].clamp_min(0)
        columns.append(lineage)
    mask = torch.zeros(num_nodes, num_nodes, dtype=torch.bool, device=parents.device)
    return mask.scatter_(1, torch.stack(columns, dim=1), True)


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
def _grid(branches: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every cell of a (branches, width) grid, row by row."""
    cells = torch.arange(branches * width, device=device)
    return cells // width, cells % width


@lru_cache(maxsize=256)
def _level_numbers(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Depth of each node when level d has `sizes[d]` nodes."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
