"""Context caches of the head; checks and commits of the target's cache (of batches: `batch_caches.py`)."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer

from .._compat import class_of
from ..transfer import to_device
from .growing_cache import GrowingLayer
from .recurrent import RECURRENT_LAYERS


UNSEEN_POSITION = torch.iinfo(torch.int32).max  # of padding among context rows: no block row sees past its anchor
# Layers that read other layers' rows, or none; early releases have no such class.
EMPTY_LAYERS = (class_of(cache_utils, "DummyLayer"),)
DynamicSlidingWindowLayer = class_of(cache_utils, "DynamicSlidingWindowLayer")
StaticLayer = class_of(cache_utils, "StaticLayer")
# moves(device): rows of the tree to move, and their new indices among the tree's rows.
Moves = Callable[[torch.device], tuple[torch.Tensor, torch.Tensor]]
STATIC_ROWS = (1, 4, 8, 16, 32, 64, 128, 256)  # sizes of a forward with a static cache; each compiles one graph


class HeadCache:
    """
    Keys and values of the context rows, per head layer, in buffers that double when full.

    Block rows are written behind the context for one forward and overwritten by the next, so a round copies only new
    rows.
    """

    def __init__(self, num_layers: int):
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self._lengths = [0] * num_layers  # context rows by layer: layers are extended one after another
        self._position_ids: torch.Tensor | None = None  # (batch, seq) absolute positions of the context rows

    def extend(
        self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor, num_context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows (batch, heads, rows, dim), of which the first `num_context` stay; returns all rows."""
        start = self._lengths[layer_idx]
        end = start + keys.shape[2]
        for store, rows in ((self._keys, keys), (self._values, values)):
            buffer = store[layer_idx]
            if buffer is None or buffer.shape[2] < end:
                batch, heads, _, dim = rows.shape
                grown = rows.new_empty(batch, heads, max(2 * end, 256), dim)
                if buffer is not None:
                    grown[:, :, :start] = buffer[:, :, :start]
                store[layer_idx] = buffer = grown
            buffer[:, :, start:end] = rows
        self._lengths[layer_idx] += num_context
        return self._keys[layer_idx][:, :, :end], self._values[layer_idx][:, :, :end]  # type: ignore[index]

    def extend_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Append positions (batch, rows) of new context rows; returns the positions of all context rows."""
        known = self._position_ids
        self._position_ids = position_ids if known is None else torch.cat([known, position_ids], dim=1)
        return self._position_ids

    def select_sequences(self, index: torch.Tensor) -> None:
        """Keep only these sequences of the batch, in this order."""
        if self._position_ids is not None:
            self._position_ids = self._position_ids[index]
            self._keys = [None if keys is None else keys[index] for keys in self._keys]
            self._values = [None if values is None else values[index] for values in self._values]

    def context_rows(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor | None]:
        """Keys and values (batch, heads, rows, dim) of the context in each layer, and positions (batch, rows)."""
        if self._position_ids is None:
            return [], None
        stores = zip(self._keys, self._values, self._lengths, strict=True)
        return [(keys[:, :, :end], values[:, :, :end]) for keys, values, end in stores], self._position_ids  # type: ignore[index]


class StaticHeadCache:
    """
    Keys and values of the context rows in buffers of fixed size, for forwards of one shape: context rows first, the
    block behind the last slot.

    Padding among the context rows is written, too; `count_rows` leaves it out, and the next forward overwrites it.

    Args:
        num_layers (`int`): Layers of the head.
        capacity (`int`): Maximum number of context rows, padding included.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.capacity = capacity
        self.is_empty = True  # nothing was written yet
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self._length = torch.zeros((), dtype=torch.long, device="cpu")
        self._position_ids: torch.Tensor | None = None  # (batch, capacity); beyond every anchor in empty slots

    def reset(self) -> None:
        """Empty the buffers, which stay where they are: compiled graphs hold on to them."""
        self.is_empty = True
        if self._position_ids is not None:
            self._position_ids.fill_(torch.iinfo(torch.long).max)
            self._length.zero_()
        for buffers in self._layers:
            for buffer in buffers or ():
                buffer.zero_()  # a masked NaN would still spoil a sum

    def extend(
        self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor, num_context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows (batch, heads, rows, dim), the first `num_context` of them context; returns the full buffers."""
        if self._layers[layer_idx] is None:
            batch, heads, rows, dim = keys.shape
            shape = (batch, heads, self.capacity + rows - num_context, dim)
            self._layers[layer_idx] = (_static(keys.new_zeros(shape)), _static(keys.new_zeros(shape)))
        buffers = self._layers[layer_idx]
        assert buffers is not None
        slots = torch.arange(num_context, device=keys.device) + self._length
        for buffer, rows_of in zip(buffers, (keys, values), strict=True):
            buffer.index_copy_(2, slots, rows_of[:, :, :num_context])
            buffer[:, :, self.capacity :] = rows_of[:, :, num_context:]
        return buffers

    def extend_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Write positions (batch, rows) of new context rows; returns the positions of all slots."""
        if self._position_ids is None:
            shape, device = (len(position_ids), self.capacity), position_ids.device
            self._position_ids = _static(torch.full(shape, torch.iinfo(torch.long).max, device=device))
            self._length = _static(torch.zeros((), dtype=torch.long, device=device))
        self.is_empty = False
        slots = torch.arange(position_ids.shape[1], device=position_ids.device) + self._length
        return self._position_ids.index_copy_(1, slots, position_ids)

    def context_rows(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor | None]:
        """Copies of keys and values (batch, heads, rows, dim) of the context in each layer, and of positions (batch,
        rows)."""
        if self.is_empty or self._position_ids is None:
            return [], None
        end = int(self._length)
        rows = [tuple(buffer[:, :, :end].clone() for buffer in buffers) for buffers in self._layers if buffers]
        return rows, self._position_ids[:, :end].clone()  # type: ignore[return-value]

    def count_rows(self, num_rows: int) -> None:
        """Count the first `num_rows` of the newest context rows; the others were padding."""
        self._length.add_(num_rows)


def _static(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer, marked as one whose address stays: CUDA graphs may then change it in place."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(buffer, guard=False)
    return buffer


def check_target_cache(cache: Cache | None) -> DynamicCache | StaticCache:
    """
    Refuse a cache that cannot hold a tree and roll back; returns any other.

    Raises:
        ValueError: Naming the cache and what to use instead.
    """
    without = "generate without `assistant_model`"
    if cache is None:
        raise ValueError(
            "this call runs without a cache, or the target makes one of its own, which draft heads cannot roll back; "
            f"leave `use_cache` at True, or {without}"
        )
    if not isinstance(cache, (DynamicCache, StaticCache)) or cache.offloading:
        kind = f"`{type(cache).__name__}`" if not getattr(cache, "offloading", False) else "an offloaded cache"
        raise ValueError(
            f"draft trees are not supported with {kind} yet; leave `cache_implementation` unset to use the dynamic "
            f"cache, or {without}"
        )
    known = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer, StaticLayer, *EMPTY_LAYERS, *RECURRENT_LAYERS)
    unknown = {type(layer).__name__ for layer in cache.layers if type(layer) not in known}
    if "StaticSlidingWindowLayer" in unknown:
        raise ValueError(
            "the static cache of a sliding-window target overwrites rows that a draft tree still needs; leave "
            f"`cache_implementation` unset, or {without}"
        )
    if unknown:
        raise ValueError(
            f"the target's cache has {sorted(unknown)} layers, whose state draft heads cannot roll back after a "
            f"rejected draft; {without}"
        )
    return cache


def check_padded_rows(cache: Cache, is_padding: torch.Tensor) -> None:
    """
    Refuse a cache that dropped rows of a padded prompt, as hooks that compress it do.

    Args:
        is_padding (`torch.Tensor`, (batch, prompt)): Where the prompts are padded.

    Raises:
        ValueError: Saying how many rows are missing.
    """
    lengths = {layer.get_seq_length() for layer in cache.layers if type(layer) in (DynamicLayer, GrowingLayer)}
    if is_padding.any() and lengths and min(lengths) < is_padding.shape[1]:
        raise ValueError(
            f"the cache holds {min(lengths)} of the prompt's {is_padding.shape[1]} tokens, so draft heads cannot tell "
            "which of them are padding; give one prompt without padding, or generate without `assistant_model`"
        )


def check_even_rows(cache: Cache) -> None:
    """
    Refuse a cache whose layers hold different numbers of tokens, as some hooks that compress it leave it.

    Raises:
        ValueError: Saying how many tokens the layers hold.
    """
    lengths = {layer.get_seq_length() for layer in cache.layers if type(layer) in (DynamicLayer, GrowingLayer)} - {0}
    if len(lengths) > 1:
        raise ValueError(
            f"the layers of the cache hold {min(lengths)} to {max(lengths)} tokens, but a draft tree has one mask for "
            "all layers; compress every layer to the same length, or generate without `assistant_model`"
        )


def cache_windows(cache: Cache) -> list[int | None]:
    """Window of each layer of the target's cache in positions; `None` for layers that hold every token."""
    return [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in cache.layers]


def static_rows(num_nodes: int) -> int:
    """Rows of a forward that verifies `num_nodes` nodes with a static cache: padded to one of few sizes."""
    return next((rows for rows in STATIC_ROWS if rows >= num_nodes), num_nodes)


def max_static_nodes(num_free: int) -> int:
    """Rows, padding included, that fit into a static cache with `num_free` free slots; at least the root."""
    return max(rows for rows in (*STATIC_ROWS, 1) if rows <= max(num_free, 1))


def commit_path(cache: Cache, path: list[int], num_rows: int) -> None:
    """
    Compact the keys and values of the path behind the prefix, and drop the other nodes. The prefix is not moved.

    Args:
        cache (`DynamicCache` or `StaticCache`): The target's cache, whose last `num_rows` rows are the tree's nodes
            and, with a static cache, padding.
        path (`list[int]`): Accepted node ids, root first, ascending; an empty path drops all nodes.
        num_rows (`int`): Rows of the verifying forward.
    """
    # The root is in place, and so are the nodes behind it whose ids equal their index on the path.
    first = next((index for index, node in enumerate(path) if index != node), len(path))

    @functools.cache  # the same for most layers
    def moves(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return to_device(path[first:], device), torch.arange(first, len(path), device=device)

    layers = [layer for layer in cache.layers if not isinstance(layer, EMPTY_LAYERS)]
    _commit_static([layer for layer in layers if isinstance(layer, StaticLayer)], moves, len(path), first, num_rows)
    moved: dict[int, tuple[torch.Tensor, ...]] = {}  # buffers that layers share
    for layer in layers:
        if isinstance(layer, DynamicLayer) and (layer.is_sliding or len(path) < num_rows):
            if isinstance(layer, GrowingLayer) and (buffers := layer.shared_buffers):
                start = layer.get_seq_length() - num_rows
                if first < len(path) and id(buffers) not in moved:
                    _move(buffers, start, moves)
                    moved[id(buffers)] = buffers
                layer.truncate(start + len(path))
                continue
            start = layer.keys.shape[2] - num_rows
            if first < len(path):
                _move((layer.keys, layer.values), start, moves)
            _end_at(layer, start + len(path), num_rows - len(path))


def _commit_static(layers: list[Any], moves: Moves, length: int, first: int, num_rows: int) -> None:
    """The part of `commit_path` for static layers, which all have one length, given that of the path."""
    if not layers:
        return
    lengths = [layer.cumulative_length for layer in layers]

    @functools.cache
    def shifted(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        start = lengths[0].to(device) - num_rows
        rows, slots = moves(device)
        return rows + start, slots + start

    if first < length:
        for layer in layers:
            _move((layer.keys, layer.values), 0, shifted)
    torch._foreach_add_(lengths, length - num_rows)  # in place: compiled graphs hold on to them


def _move(buffers: Iterable[torch.Tensor], start: int, moves: Moves) -> None:
    """Compact rows of buffers (..., rows, dim) behind `start`, in place."""
    for states in buffers:
        rows, slots = (numbers + start if start else numbers for numbers in moves(states.device))
        states.index_copy_(-2, slots, states.index_select(-2, rows))


def _end_at(layer: DynamicLayer, length: int, num_dropped: int) -> None:
    layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length -= num_dropped
        layer.crop(0)  # drops the rows that have left the window
        layer.record_past = False  # so that later forwards, maybe the caller's own, drop them as usual
