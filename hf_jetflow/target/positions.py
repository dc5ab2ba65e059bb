"""Positions of a prompt's tokens, as the target sees them and as the head does."""

import torch

from ..head.cache import UNSEEN_POSITION


def text_positions(last: torch.Tensor | None, num_cached: int, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Return the text position of each sequence's newest cached token, (batch,), and the offsets of the other position
    kinds from it, (kinds, batch); both on the CPU.

    Multimodal targets have positions (kinds, batch, seq), which all grow by one with each generated token. Four kinds
    are the position in the text, then time, height and width.

    Args:
        last (`torch.Tensor`, (batch,) or (kinds, batch)): Their positions, `None` where the target takes none.
        num_cached (`int`): Tokens in the cache.
        batch (`int`): Sequences.
    """
    positions = torch.full((batch,), num_cached - 1, device="cpu")
    if last is None:
        return positions, None
    last = last.cpu()
    if last.ndim == 1:
        return last.expand(batch), None
    last = last.expand(-1, batch)
    if len(last) == 4:
        positions = last[0]
    return positions, last - positions


def without_padding(
    features: torch.Tensor, position_ids: torch.Tensor, is_pad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (batch, rows, ...) and positions (batch, rows) without the rows that are padding in every sequence.
    Rows that are padding in some sequences only are masked from every block."""
    is_needed = ~is_pad.all(dim=0)
    features, position_ids, is_pad = features[:, is_needed], position_ids[:, is_needed], is_pad[:, is_needed]
    if is_pad.any():
        features = features.masked_fill(is_pad[..., None], 0)
        position_ids = position_ids.masked_fill(is_pad, UNSEEN_POSITION)
    return features, position_ids
