"""Copies from the host to a device, and where the host must not wait for a device."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch


def to_device(numbers: torch.Tensor | Sequence[Any], device: torch.device | str) -> torch.Tensor:
    """
    A tensor, or numbers in nested lists, on a device.

    On CUDA the host goes on while the copy waits for its turn: the driver reads pageable memory before the call
    returns, so the source may change afterwards. Other devices make no such promise, and the host waits.
    """
    source = numbers if isinstance(numbers, torch.Tensor) else torch.tensor(numbers, device="cpu")
    is_staged = source.device.type == "cpu" and torch.device(device).type == "cuda"
    return source.to(device, non_blocking=is_staged)


def repeated(numbers: Sequence[float], counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Each number as often as its count says, in one tensor: made once, or as part of a captured function."""
    if torch.compiler.is_compiling():
        return _repeated(tuple(numbers), tuple(counts), device)
    return _known_repeated(tuple(numbers), tuple(counts), device)


def _repeated(numbers: tuple[float, ...], counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # No copy from the host, which would keep a captured function out of CUDA graphs.
    return torch.cat([torch.full((n,), number, device=device) for number, n in zip(numbers, counts, strict=True)])


_known_repeated = lru_cache(maxsize=256)(_repeated)


def must_not_wait(device: torch.device) -> bool:
    """
    Whether code must not read the values of tensors on this device, so that its shapes are fixed.

    Off the CPU the host would wait for them, and a captured function cannot read them on any device.
    """
    return torch.compiler.is_compiling() or device.type != "cpu"
