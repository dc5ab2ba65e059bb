"""The target's cache of one sequence in buffers with room to grow: a forward copies its new rows only, a path is kept
with few moves."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


MAX_SHARING = 8  # layers in one buffer: more would mean fewer moves, but more rows to hold twice while it grows


class _Room:
    """Buffers for the rows of layers of one shape. It knows none of the layers: a cache that referred to itself would
    not be freed at once."""

    def __init__(self, num_layers: int = 1):
        self.num_layers = num_layers
        self.buffers: tuple[torch.Tensor, ...] = ()  # of keys and of values, (layers, batch, heads, capacity, dim)

    def is_for(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether there are no buffers yet, or some for rows like these."""
        return not self.buffers or all(
            _kind(buffer[0]) == _kind(rows) for buffer, rows in zip(self.buffers, (keys, values), strict=True)
        )

    def has(self, num_rows: int) -> bool:
        """Whether so many rows of a layer fit in."""
        return bool(self.buffers) and self.buffers[0].shape[-2] >= num_rows

    def renew(self, keys: torch.Tensor, values: torch.Tensor, num_rows: int) -> None:
        """Larger buffers, still empty, for rows like these."""
        buffers = []
        for rows in (keys, values):
            batch, heads, _, dim = rows.shape
            capacity = num_rows + max(num_rows // 4, 256)
            buffers.append(rows.new_empty(self.num_layers, batch, heads, capacity, dim))
        self.buffers = tuple(buffers)


def _kind(rows: torch.Tensor) -> tuple[Any, ...]:
    batch, heads, _, dim = rows.shape
    return batch, heads, dim, rows.dtype, rows.device


class GrowingLayer(DynamicLayer):
    """
    A layer of the target's cache that shares its buffers with other layers of the same shape.

    transformers' own layer copies all rows in every forward. `keys` and `values` are views of the buffers: what lies
    behind their end, such as rows that were cropped, is overwritten by the next `update`.

    Args:
        room (`_Room`, *optional*): Where it shares one; its own by default.
        place (`int`): Its place there.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, room: _Room | None = None, place: int = 0):
        super().__init__()
        self._room, self._place = room or _Room(), place
        self._shown: tuple[Any, ...] = (None, None, None)  # keys, values and the buffers that `show` took them from

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows (batch, heads, rows, dim); returns all rows."""
        if torch.compiler.is_compiling():  # where tensors lie would break the graph
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.hold(key_states[:, :, :0], value_states[:, :, :0])
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not (self._room.has(end) and self.shared_buffers):
            self._move_in(end)
        for buffer, rows in zip(self._room.buffers, (key_states, value_states), strict=True):
            buffer[self._place, :, :, start:end] = rows
        self.show(end)
        return self.keys, self.values

    def show(self, num_rows: int) -> None:
        """Hold the first rows of its place in the buffers."""
        keys, values = self._room.buffers
        self.keys, self.values = keys[self._place, :, :, :num_rows], values[self._place, :, :, :num_rows]
        self._shown = self.keys, self.values, self._room.buffers

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Begin with these rows (batch, heads, rows, dim), which are copied once more follow."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    @property
    def shared_buffers(self) -> tuple[torch.Tensor, ...]:
        """Those of keys and of values, (layers, batch, heads, capacity, dim); none where the rows do not lie in them,
        as at first, or since a caller has reordered or replaced them."""
        now = self.keys, self.values, self._room.buffers
        if all(one is other for one, other in zip(now, self._shown, strict=True)):
            return self._room.buffers
        for buffer, rows in zip(self._room.buffers, (self.keys, self.values), strict=False):
            place = buffer.data_ptr() + self._place * buffer.stride(0) * buffer.element_size()
            if rows.data_ptr() != place or rows.stride() != buffer.stride()[1:]:
                return ()
        return self._room.buffers

    def _move_in(self, num_rows: int) -> None:
        """Bring the rows to buffers with room for `num_rows`; the layers that share them follow one by one."""
        if not self._room.is_for(self.keys, self.values):
            self._room, self._place = _Room(), 0
        if not self._room.has(num_rows):
            self._room.renew(self.keys, self.values, num_rows)
        for buffer, rows in zip(self._room.buffers, (self.keys, self.values), strict=True):
            buffer[self._place, :, :, : rows.shape[2]] = rows


def grow_layers(cache: DynamicCache) -> None:
    """Give the rows of the cache's ordinary layers room to grow, for the time of a generation."""
    rooms: dict[tuple[Any, ...], _Room] = {}
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            continue
        if not layer.get_seq_length():
            cache.layers[index] = GrowingLayer()
            continue
        kind = (_kind(layer.keys), _kind(layer.values))
        room = rooms.get(kind)
        if room is None or room.num_layers == MAX_SHARING:
            room = rooms[kind] = _Room(0)
        cache.layers[index] = grown = GrowingLayer(room, room.num_layers)
        room.num_layers += 1
        grown.hold(layer.keys, layer.values)


def settle_layers(cache: DynamicCache) -> None:
    """The ordinary layers again, as the caller knows them, with the same rows."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, GrowingLayer) and layer.is_initialized:
            cache.layers[index] = settled = DynamicLayer()
            settled.lazy_initialization(layer.keys, layer.values)
            settled.keys, settled.values = layer.keys, layer.values
