"""Everything that moves keys and values: the head's context cache, and commits in the target's cache of one sequence
(those of a batch: `batch_caches`)."""

import functools
from collections.abc import Callable, Iterable

import torch
from transformers import Cache, DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer

from .._compat import class_of
from .growing_cache import GrowingLayer
from .recurrent import RECURRENT_LAYERS, LinearAttentionLayer, drop_rows


UNSEEN_POSITION = torch.iinfo(torch.int32).max  # of context rows that pad: no block row sees what is behind its anchor
# Layers that read what others keep, or nothing; early releases have no such class, nor layers of it.
EMPTY_LAYERS = (class_of(cache_utils, "DummyLayer"),)
DynamicSlidingWindowLayer = class_of(cache_utils, "DynamicSlidingWindowLayer")
StaticLayer = class_of(cache_utils, "StaticLayer")
# moves(device): rows of the tree that a path keeps, and where they go among the tree's rows.
Moves = Callable[[torch.device], tuple[torch.Tensor, torch.Tensor]]
STATIC_ROWS = (1, 4, 8, 16, 32, 64, 128, 256)  # rows of a forward with a static cache: one compiled graph for each


class HeadCache:
    """
    Keys and values of the context rows, per head layer, in buffers that double when full.

    Block rows are written behind the context for one forward and overwritten by the next, so a round copies only new
    rows.
    """

    def __init__(self, num_layers: int):
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self._lengths = [0] * num_layers  # context rows kept, read per layer: layers are extended one after another
        self._position_ids: torch.Tensor | None = None  # (batch, seq) absolute positions of the context rows

    def extend(
        self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor, num_context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows (batch, heads, rows, dim), keep the first `num_context`; returns all up to the last new one."""
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
        """Append the positions (batch, rows) of new context rows; returns those of all context rows."""
        known = self._position_ids
        self._position_ids = position_ids if known is None else torch.cat([known, position_ids], dim=1)
        return self._position_ids

    def keep_rows(self, index: torch.Tensor) -> None:
        """Go on with the sequences (kept,) of the batch only, in that order."""
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
    The same in buffers of one size, for forwards of one shape: context rows first, the block behind the last slot.

    Context rows that are padding are written, too, and overwritten by the next forward, as `keep` does not count them.

    Args:
        num_layers (`int`): Layers of the head.
        capacity (`int`): Context rows that fit, padding included.
    """

    def __init__(self, num_layers: int, capacity: int):
        self._capacity = capacity
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self._length = torch.zeros((), dtype=torch.long, device="cpu")
        self._position_ids: torch.Tensor | None = None  # (batch, capacity), beyond every anchor where no row is

    def extend(
        self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor, num_context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows (batch, heads, rows, dim), the first `num_context` of them context; returns whole buffers."""
        if self._layers[layer_idx] is None:
            batch, heads, rows, dim = keys.shape
            shape = (batch, heads, self._capacity + rows - num_context, dim)
            self._layers[layer_idx] = (keys.new_zeros(shape), keys.new_zeros(shape))
        buffers = self._layers[layer_idx]
        assert buffers is not None
        places = torch.arange(num_context, device=keys.device) + self._length
        for buffer, rows_of in zip(buffers, (keys, values), strict=True):
            buffer.index_copy_(2, places, rows_of[:, :, :num_context])
            buffer[:, :, self._capacity :] = rows_of[:, :, num_context:]
        return buffers

    def extend_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Write the positions (batch, rows) of new context rows; returns those of all slots."""
        if self._position_ids is None:
            shape, device = (len(position_ids), self._capacity), position_ids.device
            self._position_ids = torch.full(shape, torch.iinfo(torch.long).max, device=device)
            self._length = self._length.to(device)
        places = torch.arange(position_ids.shape[1], device=position_ids.device) + self._length
        return self._position_ids.index_copy_(1, places, position_ids)

    def context_rows(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor | None]:
        """Keys and values (batch, heads, rows, dim) of the context in each layer, and positions (batch, rows)."""
        if self._position_ids is None:
            return [], None
        end = int(self._length)
        rows = [(keys[:, :, :end], values[:, :, :end]) for keys, values in self._layers]  # type: ignore[misc]
        return rows, self._position_ids[:, :end]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written yet."""
        return self._position_ids is None

    def keep(self, num_rows: int) -> None:
        """Count the first of the newest context rows; the others were padding."""
        self._length.add_(num_rows)


def check_target_cache(cache: Cache | None) -> DynamicCache | StaticCache:
    """
    Refuse caches that cannot hold a tree and roll back; returns the others.

    Raises:
        ValueError: Naming the cache and the way round.
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
    foreign = {type(layer).__name__ for layer in cache.layers if type(layer) not in known}
    if "StaticSlidingWindowLayer" in foreign:
        raise ValueError(
            "the static cache of a sliding-window target overwrites rows that a draft tree still needs; leave "
            f"`cache_implementation` unset, or {without}"
        )
    if foreign:
        raise ValueError(
            f"the target's cache has {sorted(foreign)} layers, whose state draft heads cannot take back after a "
            f"rejected draft; {without}"
        )
    return cache


def cache_windows(cache: Cache) -> list[int | None]:
    """Window of each layer of the target's cache in positions, `None` where a layer keeps every token."""
    return [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in cache.layers]


def static_rows(num_nodes: int) -> int:
    """Rows of the forward that verifies `num_nodes` with a static cache: the nodes, padded to one of few sizes."""
    return next((rows for rows in STATIC_ROWS if rows >= num_nodes), num_nodes)


def most_static_nodes(num_free: int) -> int:
    """Nodes that a static cache with `num_free` rows left can take, padding included; at least the root."""
    return max(rows for rows in (*STATIC_ROWS, 1) if rows <= max(num_free, 1))


def commit_path(cache: Cache, path: list[int], num_rows: int) -> None:
    """
    Keep the keys and values of the path, compacted behind the prefix, and drop the other nodes.

    Moves only the accepted rows: the prefix stays where it is.

    Args:
        cache (`DynamicCache` or `StaticCache`): The target's cache, whose last `num_rows` rows are the tree's nodes
            and, with a static cache, padding.
        path (`list[int]`): Accepted node ids, root first, ascending; none drops all nodes.
        num_rows (`int`): Rows of the verifying forward.
    """
    # The root is there already, and so are the nodes behind it whose numbers are their places on the path.
    first = next((place for place, node in enumerate(path) if place != node), len(path))

    @functools.cache  # alike for most layers
    def moves(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(path[first:], device=device), torch.arange(first, len(path), device=device)

    moved: dict[int, tuple[torch.Tensor, ...]] = {}  # buffers that layers share
    for layer in cache.layers:
        if isinstance(layer, EMPTY_LAYERS):
            continue
        if isinstance(layer, LinearAttentionLayer):
            drop_rows(layer, num_rows - len(path))
        if isinstance(layer, StaticLayer):
            if first < len(path):
                _move((layer.keys, layer.values), layer.cumulative_length - num_rows, moves)
            layer.cumulative_length.add_(len(path) - num_rows)  # in place: compiled graphs hold on to it
        elif isinstance(layer, DynamicLayer) and (layer.is_sliding or len(path) < num_rows):
            if isinstance(layer, GrowingLayer) and (buffers := layer.shared_buffers):
                start = layer.get_seq_length() - num_rows
                if first < len(path) and id(buffers) not in moved:
                    _move(buffers, start, moves)
                    moved[id(buffers)] = buffers
                layer.show(start + len(path))
                continue
            start = layer.keys.shape[2] - num_rows
            if first < len(path):
                _move((layer.keys, layer.values), start, moves)
            _end_at(layer, start + len(path), num_rows - len(path))


def _move(buffers: Iterable[torch.Tensor], start: int | torch.Tensor, moves: Moves) -> None:
    """Bring rows of buffers (..., rows, dim) together, in place, behind `start`."""
    for states in buffers:
        rows, places = (numbers + start for numbers in moves(states.device))
        states.index_copy_(-2, places, states.index_select(-2, rows))


def _end_at(layer: DynamicLayer, length: int, num_dropped: int) -> None:
    layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length -= num_dropped
        layer.crop(0)  # forgets the rows that have left the window
        layer.record_past = False  # so that a later prefill, maybe the caller's own, forgets them by itself
