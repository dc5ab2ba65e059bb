"""Ways to weigh the loss of a drafted block by depth; `compare_training.py` trains a head with each.

The first argument of each is the head's probability of the target's first choice, the second how many of the head's
tokens rank above that choice, both (blocks, depths). So is the result, the weights.
"""

from collections.abc import Callable
from functools import partial

import torch

from hf_jetflow.training.losses import depth_weights


GAMMA = 4.0  # of the weights that decay with the depth

Weighting = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def even(probs: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(probs)


def decaying(probs: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """exp(-(depth - 1) / gamma), as DFlash weighs depths."""
    return depth_weights(probs.shape[1], GAMMA).to(probs).expand_as(probs)


def first_twice(probs: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    weights = torch.ones_like(probs)
    weights[:, 0] = 2
    return weights


def d_pace(probs: torch.Tensor, ranks: torch.Tensor, smoothing: float = 0.5) -> torch.Tensor:
    """
    D-PACE (arXiv 2605.18810): a depth weighs as much as the accepted tokens that it can unlock, the sum over itself
    and all later depths of the product of smoothed probabilities up to there. With smoothing 0 these are the slopes of
    the expected accepted length, the chain reward of arXiv 2606.11552.
    """
    reach = (smoothing + (1 - smoothing) * probs).cumprod(1)
    return reach.flip(1).cumsum(1).flip(1)


def from_first_miss(probs: torch.Tensor, ranks: torch.Tensor, top: int = 1) -> torch.Tensor:
    """
    VAT (arXiv 2608.30135): weight 1 before the first depth where the target's choice is not among the head's first
    `top`; from there on the weights decay anew. The paper has `top` = 1; a tree holds more candidates.
    """
    missed = (ranks >= top).cumsum(1) > 0
    return torch.exp(-((missed.cumsum(1) - 1).clamp_min(0)) / GAMMA).to(probs)


WEIGHTINGS: dict[str, Weighting] = {
    "decaying, gamma 4": decaying,
    "depth 1 twice": first_twice,
    "D-PACE": d_pace,
    "chain reward": partial(d_pace, smoothing=0.0),
    "VAT, first choice": from_first_miss,
    "VAT, first 2": partial(from_first_miss, top=2),
    "VAT, first 4": partial(from_first_miss, top=4),
}
