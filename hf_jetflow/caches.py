"""Everything that moves keys and values: the head's context cache, and commits in the target's cache."""

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


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


class GrowingLayer(DynamicLayer):
    """
    A layer of the target's cache in buffers with room to grow, so that a forward copies its new rows only.

    transformers' own layer copies all rows in every forward. `keys` and `values` are views of the buffers: what lies
    behind their end, such as rows that were cropped, is overwritten by the next `update`.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        self.keys, self.values = self._buffers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows (batch, heads, rows, dim); returns all rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for place, (known, rows) in enumerate(((self.keys, key_states), (self.values, value_states))):
            if not _lies_in(known, self._buffers[place]) or self._buffers[place].shape[2] < end:
                batch, heads, _, dim = rows.shape
                self._buffers[place] = rows.new_empty(batch, heads, end + max(end // 4, 256), dim)
                self._buffers[place][:, :, :start] = known
            self._buffers[place][:, :, start:end] = rows
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


def grow_layers(cache: DynamicCache) -> None:
    """Give the rows of the cache's ordinary layers room to grow, for the time of a generation."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = grown = GrowingLayer()
            if layer.get_seq_length():
                grown.update(layer.keys, layer.values)


def settle_layers(cache: DynamicCache) -> None:
    """The ordinary layers again, as the caller knows them, with the same rows."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, GrowingLayer) and layer.is_initialized:
            cache.layers[index] = settled = DynamicLayer()
            settled.lazy_initialization(layer.keys, layer.values)
            settled.keys, settled.values = layer.keys, layer.values


def _lies_in(rows: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Whether `rows` are the buffer's first; they are not once a caller has reordered or replaced them."""
    return rows.data_ptr() == buffer.data_ptr() and rows.stride() == buffer.stride()


def check_target_cache(cache: Cache | None) -> DynamicCache:
    """
    Refuse caches that cannot hold a tree and roll back; returns the others.

    Raises:
        ValueError: Naming the cache and the way round.
    """
    if cache is None:
        raise ValueError("this call runs without a cache, but a draft tree needs one; leave `use_cache` at True")
    if not isinstance(cache, DynamicCache) or cache.offloading:
        kind = "an offloaded cache" if isinstance(cache, DynamicCache) else f"`{type(cache).__name__}`"
        raise ValueError(
            f"draft trees are not supported with {kind} yet; leave `cache_implementation` unset to use the dynamic "
            "cache, or generate without `assistant_model`"
        )
    known = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer)
    foreign = {type(layer).__name__ for layer in cache.layers if type(layer) not in known}
    if foreign:
        raise ValueError(
            f"the target's cache has {sorted(foreign)} layers, whose state cannot be rolled back after a draft tree; "
            "hybrid and linear-attention targets are not supported yet, generate without `assistant_model`"
        )
    return cache


def cache_windows(cache: DynamicCache) -> list[int | None]:
    """Window of each layer of the target's cache in positions, `None` where a layer keeps every token."""
    return [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in cache.layers]


def commit_path(cache: DynamicCache, path: torch.Tensor, num_nodes: int) -> None:
    """
    Keep the keys and values of the path, compacted behind the prefix, and drop the other nodes.

    Moves only the accepted rows: the prefix stays where it is.

    Args:
        cache (`DynamicCache`): The target's cache, whose last `num_nodes` rows are the tree's nodes.
        path (`torch.Tensor`, (length,)): Accepted node ids, root first, ascending.
        num_nodes (`int`): Nodes of the verified tree.
    """
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        start = layer.keys.shape[2] - num_nodes
        end = start + len(path)
        if len(path) > 1:  # the root is in its place already
            rows = path[1:].to(layer.keys.device) + start
            for states in (layer.keys, layer.values):
                states[:, :, start + 1 : end] = states[:, :, rows]
        layer.keys, layer.values = layer.keys[:, :, :end], layer.values[:, :, :end]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= num_nodes - len(path)
            layer.crop(0)  # forgets the rows that have left the window
            layer.record_past = False  # so that a later prefill, maybe the caller's own, forgets them by itself
