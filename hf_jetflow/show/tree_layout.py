"""Layout of a recorded round: one column per depth, and few rows.

A node is on the row of its first child, with its other children below, so that a row reads as text. Each subtree moves
up until it touches the nodes placed before it, at any depth.
"""

from collections import defaultdict
from dataclasses import dataclass

from ..decoding.tree_log import TreeRound


@dataclass
class DrawnNode:
    """A node of the picture; the bonus token is a child of the last accepted node."""

    token: int
    parent: int  # index of the drawn parent; -1 for the root
    depth: int  # also the column
    row: int
    kind: str  # "root", "accepted", "bonus" or "rejected"
    probability: float | None  # of the path from the root; `None` for a bonus token that was not drafted


def lay_out(tree_round: TreeRound, path_first: bool = False) -> list[DrawnNode]:
    """
    Nodes and bonus token of a round with their columns and rows, parents before children.

    If generation ends within an accepted path, the bonus token is also a drafted node; it is drawn once.

    Args:
        tree_round ([`TreeRound`]): An item of `head.last_trees`.
        path_first (`bool`): Draw accepted nodes above their siblings; by default the likeliest is on top.
    """
    path = set(tree_round.path[1:])
    nodes = [
        DrawnNode(token, parent, depth, 0, "accepted" if node in path else "rejected", probability)
        for node, (token, parent, depth, probability) in enumerate(
            zip(tree_round.tokens, tree_round.parents, tree_round.depths, tree_round.probabilities, strict=True)
        )
    ]
    nodes[0].kind = "root"
    last = tree_round.path[-1]
    drafted = [node for node in nodes if (node.parent, node.token) == (last, tree_round.bonus_id)]
    if drafted:
        drafted[0].kind = "bonus"
    else:
        nodes.append(DrawnNode(tree_round.bonus_id, last, nodes[last].depth + 1, 0, "bonus", None))
    for node, row in zip(nodes, _rows(nodes, path_first), strict=True):
        node.row = row
    return nodes


def _rank(node: DrawnNode, path_first: bool) -> tuple[bool, float]:
    """Order among siblings: the target's own token first, then the likeliest."""
    comes_first = node.kind == "bonus" or (path_first and node.kind == "accepted")
    return not comes_first, -(node.probability or 0.0)


def _rows(nodes: list[DrawnNode], path_first: bool) -> list[int]:
    """Row of each node; the root is on row 0."""
    children: dict[int, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes[1:], 1):
        children[node.parent].append(index)
    for siblings in children.values():
        siblings.sort(key=lambda index: _rank(nodes[index], path_first))
    offsets = [0] * len(nodes)  # rows below the parent
    extents: list[dict[int, tuple[int, int]]] = [{} for _ in nodes]  # first and last row of each subtree, by depth
    for index in reversed(range(len(nodes))):
        extent = {nodes[index].depth: (0, 0)}
        for child in children[index]:
            tops = ((depth, top) for depth, (top, _) in extents[child].items() if depth in extent)
            offset = max((extent[depth][1] + 1 - top for depth, top in tops), default=0)
            offsets[child] = offset
            for depth, (top, bottom) in extents[child].items():
                first = extent[depth][0] if depth in extent else offset + top
                extent[depth] = (first, offset + bottom)
        extents[index] = extent
    rows = [0] * len(nodes)
    for index, node in enumerate(nodes[1:], 1):
        rows[index] = rows[node.parent] + offsets[index]
    return rows
