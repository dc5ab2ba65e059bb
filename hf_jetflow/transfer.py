"""`to_device`: numbers of the host on a device, without a wait of the host where CUDA allows it."""

from collections.abc import Sequence
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
