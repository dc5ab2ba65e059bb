"""Linear layers that read a copy of their weight in the memory layout of the CPU's matrix kernels.

On x86, a product with few rows spends much of its time on reordering the weight into the kernel's layout. In a round,
the linear layers of the head and of the target read copies that are reordered once. The products are the same.
"""

import platform
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn


NUM_SUMS = 4093  # a prime: rows of a matrix that trade values then change different sums
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

_IN_USE = threading.local()  # by thread: the copies that `LaidOutWeights.in_use` has entered


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
    """Copies of layers' weights in the layout of the CPU's kernels."""

    def __init__(self) -> None:
        self._fingerprints: dict[nn.Linear, TensorFingerprint] = {}
        self._copies: dict[nn.Linear, torch.Tensor] = {}
        self._forwards: dict[nn.Linear, _LaidOutForward] = {}

    @torch.no_grad()
    def refresh(self, layers: Iterable[nn.Linear]) -> None:
        """Copy the weights of these layers that are new or have changed, and drop the copies of all other layers.
        Layers that cannot read a copy are left to torch."""
        fingerprints, copies = {}, {}
        for layer in layers:
            if not can_be_laid_out(layer):
                continue
            weight, known = layer.weight, self._fingerprints.get(layer)
            if known is not None and known.matches(weight):
                fingerprints[layer], copies[layer] = known, self._copies[layer]
            else:
                fingerprints[layer] = TensorFingerprint.of(weight)
                copies[layer] = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._fingerprints, self._copies = fingerprints, copies
        self._forwards = {layer: _LaidOutForward(layer) for layer in copies}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the layers read these copies, in this thread only."""
        before: dict[nn.Linear, torch.Tensor] = getattr(_IN_USE, "copies", {})
        _IN_USE.copies, forwards = self._copies, self._forwards
        for layer, forward in forwards.items():
            vars(layer)["forward"] = forward
        try:
            yield
        finally:
            _IN_USE.copies = before
            for layer in forwards:  # another thread inside reads the layer's own weight from here on
                vars(layer).pop("forward", None)


class _LaidOutForward:
    """The forward of a layer while some thread has its copy in use. Compiled, and under autocast, which changes the
    type of the rows, the layer reads its own weight."""

    def __init__(self, layer: nn.Linear):
        self._layer = layer

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
            copy = getattr(_IN_USE, "copies", {}).get(self._layer)
            if copy is not None and input.dtype == copy.dtype:
                return torch.ops.mkldnn._linear_pointwise(input, copy, self._layer.bias, "none", [], "")
        return nn.Linear.forward(self._layer, input)


def can_be_laid_out(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer can read a copy: a plain linear layer with float32 or bfloat16 weights, on an x86 processor."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return False
    if not isinstance(vars(layer).get("forward"), _LaidOutForward | None):  # hooks of accelerate bring weights in
        return False
    weight = layer.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    if not IS_X86 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:  # older processors have no kernels for it
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
