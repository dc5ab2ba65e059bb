"""Growing cache layers of one sequence.

transformers' dynamic layer concatenates: each forward copies all rows. Here rows live in buffers with spare capacity,
so a forward copies only its new rows. Layers of one shape share a buffer, so a path is compacted with few moves.
"""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..buffers import grown


MAX_LAYERS = 8  # per buffer: more layers mean fewer moves, but more rows held twice while the buffer grows


class SharedBuffer:
    """Keys and values of layers of one shape. It has no reference to the layers, as a reference cycle would delay the
    release of the cache's memory."""

    def __init__(self, num_layers: int = 1):
        self.num_layers = num_layers
        self.buffers: tuple[torch.Tensor, ...] = ()  # of keys and of values, (layers, batch, heads, capacity, dim)

    def is_for(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether rows like these fit its shape; any rows do while it is empty."""
        return not self.buffers or all(
            _kind(buffer[0]) == _kind(rows) for buffer, rows in zip(self.buffers, (keys, values), strict=True)
        )

    def holds(self, num_rows: int) -> bool:
        """Whether each layer has capacity for `num_rows` rows."""
        return bool(self.buffers) and self.buffers[0].shape[-2] >= num_rows

    def allocate(self, keys: torch.Tensor, values: torch.Tensor, num_rows: int) -> None:
        """Replace the buffers by larger ones without rows, for rows like these."""
        self.buffers = tuple(
            grown(rows[:, :, :0].expand(self.num_layers, *[-1] * rows.ndim), num_rows) for rows in (keys, values)
        )


def _kind(rows: torch.Tensor) -> tuple[Any, ...]:
    batch, heads, _, dim = rows.shape
    return batch, heads, dim, rows.dtype, rows.device


def _address_of(rows: torch.Tensor) -> tuple[Any, ...]:
    return _kind(rows), rows.stride(), rows.data_ptr()


class GrowingLayer(DynamicLayer):
    """
    A layer of the target's cache that shares its buffers with other layers of the same shape.

    `keys` and `values` are views of the buffer. Rows behind their end, such as cropped ones, are overwritten by the
    next `update`. Where a caller reorders or replaces the rows, the layer owns them until the next `update`.

    Args:
        shared (`SharedBuffer`, *optional*): The buffer that it shares; its own by default.
        index (`int`): Its index in there.
    """

    def __init__(self, shared: SharedBuffer | None = None, index: int = 0):
        self._shared, self._index = shared or SharedBuffer(), index
        # The rows are either views of `_buffers`, of which `_views` are this layer's, or `_owned`.
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._views: tuple[torch.Tensor, ...] = ()
        self._lengths = [0, 0]  # rows of keys and of values in the buffer
        self._owned: list[torch.Tensor | None] = [None, None]
        super().__init__()

    @property
    def keys(self) -> torch.Tensor:
        return self._rows(0)

    @keys.setter
    def keys(self, rows: torch.Tensor | None) -> None:
        self._set_rows(0, rows)

    @property
    def values(self) -> torch.Tensor:
        return self._rows(1)

    @values.setter
    def values(self, rows: torch.Tensor | None) -> None:
        self._set_rows(1, rows)

    def _rows(self, which: int) -> Any:
        return self._views[which].narrow(2, 0, self._lengths[which]) if self._buffers else self._owned[which]

    def _set_rows(self, which: int, rows: torch.Tensor | None) -> None:
        if self._buffers:
            view = self._views[which]
            if rows is not None and _address_of(rows) == _address_of(view):  # cropped
                self._lengths[which] = rows.shape[2]
                return
            self._owned, self._buffers = [self.keys, self.values], ()
        self._owned[which] = rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows (batch, heads, rows, dim); returns all rows."""
        if torch.compiler.is_compiling():  # comparing addresses would break the graph
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.adopt(key_states[:, :, :0], value_states[:, :, :0])
        start, num_new = self.get_seq_length(), key_states.shape[2]
        if not (self.shared_buffers and self._shared.holds(start + num_new)):
            self._move_to_buffer(start + num_new)
        for view, rows in zip(self._views, (key_states, value_states), strict=True):
            view.narrow(2, start, num_new).copy_(rows)
        self.truncate(start + num_new)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._lengths[0] if self._buffers else super().get_seq_length()

    def truncate(self, num_rows: int) -> None:
        """Hold the first `num_rows` rows of its part of the buffer."""
        self._lengths = [num_rows, num_rows]

    def adopt(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Start with these rows (batch, heads, rows, dim); they are copied at the next `update`."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    @property
    def shared_buffers(self) -> tuple[torch.Tensor, ...]:
        """Buffers of keys and values, (layers, batch, heads, capacity, dim); empty while the layer owns its rows, or
        still views a buffer that another layer has replaced."""
        return self._buffers if self._buffers is self._shared.buffers else ()

    def _move_to_buffer(self, num_rows: int) -> None:
        """Move the rows to a buffer with capacity for `num_rows`; the layers that share it follow one by one."""
        known = self.keys, self.values
        if not self._shared.is_for(*known):
            self._shared, self._index = SharedBuffer(), 0
        if not self._shared.holds(num_rows):
            self._shared.allocate(*known, num_rows)
        self._buffers, self._owned = self._shared.buffers, [None, None]
        self._views = tuple(buffer[self._index] for buffer in self._buffers)
        for view, rows in zip(self._views, known, strict=True):
            view.narrow(2, 0, rows.shape[2]).copy_(rows)


def grow_layers(cache: DynamicCache) -> None:
    """Replace the cache's dynamic layers by growing ones, for the time of a generation."""
    buffers: dict[tuple[Any, ...], SharedBuffer] = {}
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            continue
        if not layer.get_seq_length():
            cache.layers[index] = GrowingLayer()
            continue
        kind = (_kind(layer.keys), _kind(layer.values))
        shared = buffers.get(kind)
        if shared is None or shared.num_layers == MAX_LAYERS:
            shared = buffers[kind] = SharedBuffer(0)
        cache.layers[index] = growing = GrowingLayer(shared, shared.num_layers)
        shared.num_layers += 1
        growing.adopt(layer.keys, layer.values)


def settle_layers(cache: DynamicCache) -> None:
    """Restore the cache's dynamic layers, with the same rows."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, GrowingLayer) and layer.is_initialized:
            cache.layers[index] = settled = DynamicLayer()
            settled.lazy_initialization(layer.keys, layer.values)
            settled.keys, settled.values = layer.keys, layer.values
