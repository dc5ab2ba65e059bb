"""Attention masks: what the rows of a block see, and the additive form of a boolean mask."""

import torch


def visibility(
    position_ids: torch.Tensor,
    context_position_ids: torch.Tensor,
    anchor_position_ids: torch.Tensor,
    is_causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Boolean mask (batch, 1, rows, seq + rows) of the keys that each block row sees, context first."""
    row = position_ids[:, :, None]
    anchor = anchor_position_ids[:, :, None]
    sees_context = context_position_ids[:, None, :] < anchor
    sees_row = anchor == anchor_position_ids[:, None, :]
    if is_causal:
        sees_row = sees_row & (position_ids[:, None, :] <= row)
    mask = torch.cat([sees_context, sees_row], dim=-1)
    if window is not None:
        key = torch.cat([context_position_ids, position_ids], dim=-1)[:, None, :]
        mask = mask & (row - key < window)
    return mask[:, None]


def additive_mask(mask: torch.Tensor, dtype: torch.dtype, unseen: float | None = None) -> torch.Tensor:
    """A boolean mask (True: seen) as numbers of `dtype` that are added to attention scores; `unseen` is the lowest
    finite number by default, under which a row that sees nothing is no NaN."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(
        ~mask, torch.finfo(dtype).min if unseen is None else unseen
    )
