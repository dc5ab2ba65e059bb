"""Linear layers that can read a copy of their weight in the memory layout of the CPU's matrix kernels.

On x86, a product with few rows spends most of its time on reordering the weight into the kernel's layout. While
drafting, the head's layers read a copy that is reordered once. The products are the same.
"""

import platform
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


NUM_SUMS = 4093  # a prime: rows of a matrix that trade values then change different sums
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

_IN_USE = threading.local()  # by thread: the copies that `LaidOutWeights.in_use` has entered


class DraftLinear(nn.Linear):
    """A linear layer that reads its weight from the [`LaidOutWeights`] in use, if they hold a copy of it. Under
    autocast, which changes the type of the rows, it reads its own weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
            laid_out = getattr(_IN_USE, "weights", {}).get(self)
            if laid_out is not None:
                return torch.ops.mkldnn._linear_pointwise(input, laid_out, self.bias, "none", [], "")
        return super().forward(input)


@dataclass(frozen=True)
class TensorFingerprint:
    """
    Detects that a tensor has changed: its address and checksums of all its bytes.

    Reads the values themselves, because torch does not count writes through `.data`. Every change of a value is seen,
    except for several changes that cancel out within one checksum. Reads memory once: about 4 ms for 34 MB on one CPU
    core, less than the tensor costs in one forward.
    """

    address: int
    sums: torch.Tensor  # (NUM_SUMS,) int64: of the 64-bit words whose index has the same remainder
    rest: torch.Tensor  # bytes behind the last whole row of words

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorFingerprint":
        flat = tensor.detach().flatten()
        if flat.data_ptr() % 8:  # a view into a file of several tensors may start anywhere
            flat = flat.clone()
        data = flat.view(torch.uint8)
        num_summed = len(data) // (8 * NUM_SUMS) * 8 * NUM_SUMS
        sums = data[:num_summed].view(torch.int64).view(-1, NUM_SUMS).sum(dim=0)
        return cls(tensor.data_ptr(), sums, data[num_summed:].clone())

    def matches(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is unchanged."""
        now = TensorFingerprint.of(tensor)
        return self.address == now.address and torch.equal(self.sums, now.sums) and torch.equal(self.rest, now.rest)


class LaidOutWeights:
    """Copies of layers' weights in the layout of the CPU's kernels: float32 and bfloat16 weights on x86."""

    def __init__(self) -> None:
        self._fingerprints: dict[DraftLinear, TensorFingerprint] = {}
        self._copies: dict[DraftLinear, torch.Tensor] = {}

    @torch.no_grad()
    def refresh(self, layers: Iterable[DraftLinear]) -> None:
        """Copy the weights of these layers that are new or have changed, and drop the copies of all other layers.
        Weights of other types or devices are left to torch."""
        fingerprints, copies = {}, {}
        for layer in layers:
            weight, known = layer.weight, self._fingerprints.get(layer)
            if not _can_be_laid_out(weight):
                continue
            if known is not None and known.matches(weight):
                fingerprints[layer], copies[layer] = known, self._copies[layer]
            else:
                fingerprints[layer] = TensorFingerprint.of(weight)
                copies[layer] = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._fingerprints, self._copies = fingerprints, copies

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the layers read these copies, in this thread only."""
        before: Any = getattr(_IN_USE, "weights", {})
        _IN_USE.weights = self._copies
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
