"""Linear layers whose weights can be laid out once for the processor's matrix kernels.

Given a weight as torch stores it, an x86 processor's kernel for few rows first brings it into its own layout, at every
call, which takes longer than the product itself. While drafting, a head's layers read weights that are kept in that
layout instead. The products are the same.
"""

import platform
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


NUM_SAMPLES = 256  # values of a weight by which a change is noticed that torch does not count
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

_IN_USE = threading.local()  # by thread: what `LaidOutWeights` has entered


class DraftLinear(nn.Linear):
    """A linear layer that reads its weight from the [`LaidOutWeights`] in use, if they hold it. Under autocast, which
    gives rows other types, it does not."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
            laid_out = getattr(_IN_USE, "weights", {}).get(self)
            if laid_out is not None:
                return torch.ops.mkldnn._linear_pointwise(input, laid_out, self.bias, "none", [], "")
        return super().forward(input)


@dataclass
class Imprint:
    """What changes with a tensor: its place, torch's count of writes into it, and some of its values."""

    place: int
    writes: int | None
    values: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Imprint":
        tensor = tensor.detach()
        values = tensor.flatten()[:: tensor.numel() // NUM_SAMPLES + 1].clone()
        return cls(tensor.data_ptr(), None if tensor.is_inference() else tensor._version, values)

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is still the same."""
        now = Imprint.of(tensor)
        return (self.place, self.writes) == (now.place, now.writes) and torch.equal(self.values, now.values)


class LaidOutWeights:
    """Copies of layers' weights, float32 and bfloat16 ones on x86 processors, in the layout of the kernels."""

    def __init__(self) -> None:
        self._kept: dict[DraftLinear, tuple[Imprint, torch.Tensor]] = {}
        self._weights: dict[DraftLinear, torch.Tensor] = {}

    @torch.no_grad()
    def refresh(self, layers: Iterable[DraftLinear]) -> None:
        """Keep those of these layers, laid out again where they have changed; weights of other kinds or places are
        left to torch."""
        kept = {}
        for layer in layers:
            before, weight = self._kept.get(layer), layer.weight
            if before is not None and before[0].fits(weight):
                kept[layer] = before
            elif _can_be_laid_out(weight):
                kept[layer] = Imprint.of(weight), torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._kept, self._weights = kept, {layer: laid_out for layer, (_, laid_out) in kept.items()}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, this thread's layers read them."""
        before: Any = getattr(_IN_USE, "weights", {})
        _IN_USE.weights = self._weights
        try:
            yield
        finally:
            _IN_USE.weights = before


def _can_be_laid_out(weight: torch.Tensor) -> bool:
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    if not IS_X86 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:  # older processors have no kernels for it
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
