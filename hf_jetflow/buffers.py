"""Rows of tensors: buffers with spare capacity, in which appending copies the new rows only, and selections."""

import torch


def grown(known: torch.Tensor, length: int, dim: int = -2, fill: float | None = None) -> torch.Tensor:
    """
    A buffer that holds `known` and has capacity for more than `length` entries along `dim`.

    Args:
        known (`torch.Tensor`): Entries it starts with; none are fine.
        length (`int`): Entries that are needed next.
        fill (`float`, *optional*): Value of the spare entries, otherwise undefined.
    """
    shape = list(known.shape)
    shape[dim] = length + max(length // 4, 256)
    buffer = known.new_empty(shape) if fill is None else known.new_full(shape, fill)
    buffer.narrow(dim, 0, known.shape[dim]).copy_(known)
    return buffer


def gather_rows(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows (..., indices, hidden) of states (..., rows, hidden)."""
    return states.gather(-2, indices[..., None].expand(*indices.shape, states.shape[-1]))
