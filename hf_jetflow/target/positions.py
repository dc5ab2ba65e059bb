"""Positions of a prompt's tokens, as the target sees them and as the head does."""

import torch

from .caches import UNSEEN_POSITION


def text_positions(last: torch.Tensor | None, num_cached: int, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Places in the text of the newest cached tokens (batch,), and how their other kinds of positions (kinds, batch)
    differ from them, both on the host.

    Multimodal targets have positions (kinds, batch, seq), which all grow by one with each generated token: places in
    the text first, where there are four kinds, then time, height and width.

    Args:
        last (`torch.Tensor`, (batch,) or (kinds, batch)): Their positions, `None` where the target takes none.
        num_cached (`int`): Tokens in the cache.
        batch (`int`): Sequences.
    """
    places = torch.full((batch,), num_cached - 1)
    if last is None:
        return places, None
    last = last.cpu()
    if last.ndim == 1:
        return last.expand(batch), None
    last = last.expand(-1, batch)
    if len(last) == 4:
        places = last[0]
    return places, last - places


def without_padding(
    features: torch.Tensor, position_ids: torch.Tensor, is_pad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (batch, rows, ...) and positions (batch, rows) without the rows that are padding in every sequence;
    those of some sequences are seen by no block."""
    keep = ~is_pad.all(dim=0)
    features, position_ids, is_pad = features[:, keep], position_ids[:, keep], is_pad[:, keep]
    if is_pad.any():
        features = features.masked_fill(is_pad[..., None], 0)
        position_ids = position_ids.masked_fill(is_pad, UNSEEN_POSITION)
    return features, position_ids
