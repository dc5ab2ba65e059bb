"""The target's cache of a batch whose sequences advance by different lengths."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..transfer import to_device
from .adapters import AdapterNames
from .caches import DynamicSlidingWindowLayer


# moves(heads, capacity, device): where rows lie and where they go in a buffer (batch, heads, capacity, dim).
Moves = Callable[[int, int, torch.device], tuple[torch.Tensor, ...]]


class BatchRows:
    """
    Maps batch slots to sequences and tracks how many tokens of each are cached.

    Args:
        num_rows (`int`): Sequences of the batch.
        num_cached (`int`): Tokens in the cache, for each of them.
        adapter_names ([`AdapterNames`], *optional*): The sequences' peft adapters.
    """

    def __init__(self, num_rows: int, num_cached: int, adapter_names: AdapterNames | None = None):
        self._adapter_names = adapter_names
        self.order = list(range(num_rows))  # the sequence in each slot; active ones come first
        self.lengths = torch.full((num_rows,), num_cached, device="cpu")  # (active,) cached tokens by slot
        self._finished: dict[int, int] = {}  # cached tokens of the others
        self._new_slots: dict[tuple[Any, ...], torch.Tensor] = {}  # cached for the current lengths

    @property
    def decoded(self) -> list[int]:
        """The active sequences, by slot."""
        return self.order[: len(self.lengths)]

    def advance(self, paths: list[list[int]]) -> None:
        """Count the tokens of each sequence's path as cached."""
        self._set_lengths(self.lengths + torch.tensor([len(path) for path in paths], device="cpu"))

    def _set_lengths(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths
        self._new_slots = {}

    def new_slots(self, num_new: int, heads: int, capacity: int, device: torch.device) -> torch.Tensor:
        """Where new rows go in a buffer (batch, heads, capacity, dim), seen as rows of one list; every layer asks."""
        key = (num_new, heads, capacity, device)
        if key not in self._new_slots:
            slots = self.lengths[:, None] + torch.arange(num_new, device="cpu")
            self._new_slots[key] = to_device(_flat(slots, heads, capacity), device)
        return self._new_slots[key]

    def retire(self, slot: int) -> int:
        """Swap the sequence in `slot` with the last active one and deactivate it; returns the last slot."""
        last = len(self.lengths) - 1
        self.order[slot], self.order[last] = self.order[last], self.order[slot]
        self._finished[self.order[last]] = int(self.lengths[slot])
        lengths = self.lengths.clone()
        lengths[slot] = lengths[last]
        self._set_lengths(lengths[:last])
        self._select_adapters()
        return last

    def cut(self, lengths: list[int]) -> None:
        """Truncate the cached lengths; tokens beyond `lengths` were surplus."""
        self._finished = {row: min(known, lengths[row]) for row, known in self._finished.items()}
        self._set_lengths(self.lengths.minimum(torch.tensor(lengths, device="cpu")[self.decoded]))

    def recall(self) -> None:
        """Reactivate all sequences in their current slots."""
        known = dict(zip(self.order, self.lengths.tolist(), strict=False)) | self._finished
        self._set_lengths(torch.tensor([known[row] for row in self.order], device="cpu"))
        self._finished = {}
        self._select_adapters()

    def _select_adapters(self) -> None:
        if self._adapter_names is not None:
            self._adapter_names.select(self.decoded)


def _flat(slots: torch.Tensor, heads: int, capacity: int) -> torch.Tensor:
    """Slots (active, count) of a buffer (batch, heads, capacity, dim) as rows of one list."""
    firsts = torch.arange(len(slots) * heads, device=slots.device).view(-1, heads, 1) * capacity
    return (firsts + slots[:, None]).flatten()


class BatchLayer(DynamicLayer):
    """
    A layer of the target's cache in which every sequence has a length of its own.

    Rows are contiguous from slot 0, in buffers with spare capacity. New rows are written behind each sequence's own
    end, so nothing else is copied. Rows behind the end must be masked. Sliding-window layers retain all rows until
    `settle`.

    Args:
        rows ([`BatchRows`]): Shared by the layers.
        layer (`DynamicLayer`): The cache's own layer, which gets the rows back in the end.
    """

    def __init__(self, rows: BatchRows, layer: DynamicLayer):
        super().__init__()
        self._rows, self.settled = rows, layer
        self.lazy_initialization(layer.keys, layer.values)
        self._buffers: list[torch.Tensor] = []
        num_cached, num_kept = layer.get_seq_length(), layer.keys.shape[2]
        for known in (layer.keys, layer.values):
            self._buffers.append(_with_spare_capacity(known[:, :, :0], num_cached))
            self._buffers[-1][:, :, num_cached - num_kept : num_cached] = known
        self.keys, self.values = (buffer[:, :, :num_cached] for buffer in self._buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows (decoded, heads, rows, dim) behind each sequence; returns the slots up to the last one."""
        num_new, lengths = key_states.shape[2], self._rows.lengths
        end = int(lengths.max()) + num_new
        if self._buffers[0].shape[2] < end:
            self._buffers = [_with_spare_capacity(buffer, end) for buffer in self._buffers]
        heads, capacity = self._buffers[0].shape[1:3]
        slots = self._rows.new_slots(num_new, heads, capacity, key_states.device)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, slots, states.reshape(-1, buffer.shape[-1]))
        self.keys, self.values = (buffer[: len(lengths), :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._rows.lengths.max())

    def move(self, moves: Moves) -> None:
        """Copy rows to other slots; `moves` gives both as rows of one list."""
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

    def settle(self, slots: torch.Tensor, length: int) -> DynamicLayer:
        """The cache's own layer again, with `length` rows of the sequences in `slots`."""
        layer, first = self.settled, 0
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = length
            first = max(length - layer.sliding_window + 1, 0)
        slots = slots.to(self._buffers[0].device)
        layer.keys, layer.values = (buffer[slots, :, first:length] for buffer in self._buffers)
        return layer


def _with_spare_capacity(states: torch.Tensor, num_slots: int) -> torch.Tensor:
    """A buffer for more than `num_slots` rows that starts with `states`. The rest is zero: a masked NaN would still
    spoil a sum."""
    batch, heads, known, dim = states.shape
    buffer = states.new_zeros(batch, heads, num_slots + max(num_slots // 4, 256), dim)
    buffer[:, :, :known] = states
    return buffer


def spread_layers(cache: Cache, rows: BatchRows) -> None:
    """Let the sequences of the cache have different lengths, for the time of a generation."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            cache.layers[index] = BatchLayer(rows, layer)


def commit_paths(cache: Cache, rows: BatchRows, paths: list[list[int]]) -> None:
    """
    Compact the KV rows of each sequence's path behind its prefix.

    Args:
        cache (`Cache`): The cache, behind whose sequences the nodes of their trees lie.
        rows ([`BatchRows`]): Of that cache.
        paths (`list[list[int]]`): Accepted node ids of each sequence decoded, root first, ascending.
    """
    longest = max(len(path) for path in paths)
    if any(path != list(range(len(path))) for path in paths):
        # The root is there already; a shorter path is padded with slots that stay where they are.
        sources = torch.tensor([[*path[1:], *range(len(path), longest)] for path in paths], device="cpu")
        both = [slots + rows.lengths[:, None] for slots in (sources, torch.arange(1, longest, device="cpu"))]

        @functools.cache  # alike for most layers
        def moves(heads: int, capacity: int, device: torch.device) -> tuple[torch.Tensor, ...]:
            return tuple(to_device(_flat(slots, heads, capacity), device) for slots in both)

        for layer in cache.layers:
            if isinstance(layer, BatchLayer):
                layer.move(moves)


def retire_row(cache: Cache, rows: BatchRows, slot: int) -> None:
    """Retire the sequence in `slot`; the last active sequence takes over the slot."""
    last = rows.retire(slot)
    for layer in cache.layers:
        if isinstance(layer, BatchLayer):
            layer.swap(slot, last)


def settle_batch(cache: Cache, rows: BatchRows, length: int) -> None:
    """The cache's own layers again, with `length` rows of every sequence in the caller's order."""
    slots = torch.tensor(rows.order, device="cpu").argsort()
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, BatchLayer):
            cache.layers[index] = layer.settle(slots, length)
