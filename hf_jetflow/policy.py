"""What to draft in the next round."""

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig


MAX_WIDTH = 64  # children considered per node; a child ranked lower has a probability below 1/64 of its parent's


@dataclass
class RoundPlan:
    """Shape of one round. One node is plain decoding, width 1 is a chain."""

    node_budget: int  # rows to verify, root included
    max_depth: int  # levels to draft
    width: int  # candidates per depth


def read_limits(generation_config: GenerationConfig, block_size: int) -> RoundPlan:
    """
    The head's own limits, checked.

    Raises:
        ValueError: If `node_budget`, `max_depth` or `width` is out of range; the message gives the range.
    """
    # Not declared by `GenerationConfig`, so read with a default.
    node_budget: Any = getattr(generation_config, "node_budget", None)
    max_depth: Any = getattr(generation_config, "max_depth", None)
    width: Any = getattr(generation_config, "width", None)
    if node_budget == "auto":
        raise ValueError("`node_budget` 'auto' is not available in this version; set an integer, such as 32")
    if not _is_int(node_budget) or node_budget < 1:
        raise ValueError(f"`node_budget` is {node_budget!r}, but an integer of at least 1 (root included) is needed")
    if not _is_int(max_depth) or not 1 <= max_depth < block_size:
        raise ValueError(
            f"`max_depth` is {max_depth!r}, but this head drafts 1 .. {block_size - 1} levels "
            f"(`block_size` {block_size})"
        )
    if width is not None and (not _is_int(width) or width < 1):
        raise ValueError(f"`width` is {width!r}, but an integer of at least 1 is needed (1 drafts a chain)")
    return RoundPlan(node_budget, max_depth, min(width or MAX_WIDTH, max(node_budget - 1, 1)))


def plan_round(limits: RoundPlan, num_remaining: int | None) -> RoundPlan:
    """The next round, with `num_remaining` tokens (`None`: no limit) left to emit, the bonus token included."""
    max_depth = min(limits.max_depth, limits.node_budget - 1)
    if num_remaining is not None:
        max_depth = min(max_depth, num_remaining - 1)
    return RoundPlan(limits.node_budget, max_depth, limits.width)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
