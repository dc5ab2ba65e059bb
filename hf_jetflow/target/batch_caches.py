"""The target's cache of a batch whose sequences advance by different lengths."""

import functools
from collections.abc import Callable

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..buffers import grown
from ..transfer import to_device
from .caches import DynamicSlidingWindowLayer
from .slots import BatchSlots, flat_offsets


# moves(heads, capacity, device): `flat_offsets` of rows to move, and of where they go.
Moves = Callable[[int, int, torch.device], tuple[torch.Tensor, ...]]


class BatchLayer(DynamicLayer):
    """
    A layer of the target's cache in which every sequence has a length of its own.

    Rows are contiguous from index 0, in buffers with spare capacity. New rows are written behind each sequence's own
    end, so nothing else is copied. Rows behind the end must be masked. Sliding-window layers retain all rows until
    `settle`.

    Args:
        slots ([`BatchSlots`]): Shared by the layers.
        layer (`DynamicLayer`): The cache's own layer, which gets the rows back in the end.
    """

    def __init__(self, slots: BatchSlots, layer: DynamicLayer):
        super().__init__()
        self._slots, self.settled = slots, layer
        self.lazy_initialization(layer.keys, layer.values)
        self._buffers: list[torch.Tensor] = []
        num_cached, num_rows = layer.get_seq_length(), layer.keys.shape[2]
        for known in (layer.keys, layer.values):
            self._buffers.append(grown(known[:, :, :0], num_cached, fill=0))  # a masked NaN would still spoil a sum
            self._buffers[-1][:, :, num_cached - num_rows : num_cached] = known
        self.keys, self.values = (buffer[:, :, :num_cached] for buffer in self._buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows (active, heads, rows, dim) behind each sequence; returns all rows up to the last end."""
        num_new, lengths = key_states.shape[2], self._slots.lengths
        end = int(lengths.max()) + num_new
        if self._buffers[0].shape[2] < end:
            self._buffers = [grown(buffer, end, fill=0) for buffer in self._buffers]
        heads, capacity = self._buffers[0].shape[1:3]
        offsets = self._slots.new_offsets(num_new, heads, capacity, key_states.device)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, offsets, states.reshape(-1, buffer.shape[-1]))
        self.keys, self.values = (buffer[: len(lengths), :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._slots.lengths.max())

    def move(self, moves: Moves) -> None:
        """Copy rows within the buffers."""
        heads, capacity = self._buffers[0].shape[1:3]
        sources, targets = moves(heads, capacity, self.device)
        for buffer in self._buffers:
            rows = buffer.view(-1, buffer.shape[-1])
            rows.index_copy_(0, targets, rows.index_select(0, sources))

    def swap(self, one: int, other: int) -> None:
        """Exchange the sequences in two slots."""
        if one != other:
            for buffer in self._buffers:
                buffer[[one, other]] = buffer[[other, one]]

    def settle(self, order: torch.Tensor, length: int) -> DynamicLayer:
        """The cache's own layer again, with `length` rows of the sequences in the slots `order`."""
        layer, first = self.settled, 0
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = length
            first = max(length - layer.sliding_window + 1, 0)
        order = order.to(self._buffers[0].device)
        layer.keys, layer.values = (buffer[order, :, first:length] for buffer in self._buffers)
        return layer


def spread_layers(cache: Cache, slots: BatchSlots) -> None:
    """Let the sequences of the cache have different lengths, for the time of a generation."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            cache.layers[index] = BatchLayer(slots, layer)


def commit_paths(cache: Cache, slots: BatchSlots, paths: list[list[int]]) -> None:
    """
    Compact the KV rows of each sequence's path behind its prefix.

    Args:
        cache (`Cache`): The cache, behind whose sequences the nodes of their trees lie.
        slots ([`BatchSlots`]): Of that cache.
        paths (`list[list[int]]`): Accepted node ids of each active sequence, root first, ascending.
    """
    longest = max(len(path) for path in paths)
    if any(path != list(range(len(path))) for path in paths):
        # The root is there already; a shorter path is padded with rows that stay where they are.
        sources = torch.tensor([[*path[1:], *range(len(path), longest)] for path in paths], device="cpu")
        both = [indices + slots.lengths[:, None] for indices in (sources, torch.arange(1, longest, device="cpu"))]

        @functools.cache  # the same for most layers
        def moves(heads: int, capacity: int, device: torch.device) -> tuple[torch.Tensor, ...]:
            return tuple(to_device(flat_offsets(indices, heads, capacity), device) for indices in both)

        for layer in cache.layers:
            if isinstance(layer, BatchLayer):
                layer.move(moves)


def settle_batch(cache: Cache, slots: BatchSlots, length: int) -> None:
    """The cache's own layers again, with `length` rows of every sequence in the caller's order."""
    order = torch.tensor(slots.order, device="cpu").argsort()
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, BatchLayer):
            cache.layers[index] = layer.settle(order, length)
