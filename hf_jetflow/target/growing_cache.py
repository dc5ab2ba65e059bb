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


def _place_of(rows: torch.Tensor) -> tuple[Any, ...]:
    return _kind(rows), rows.stride(), rows.data_ptr()


class GrowingLayer(DynamicLayer):
    """
    A layer of the target's cache that shares its buffers with other layers of the same shape.

    transformers' own layer copies all rows in every forward. `keys` and `values` are views of the buffers: what lies
    behind their end, such as rows that were cropped, is overwritten by the next `update`.

    Args:
        room (`_Room`, *optional*): Where it shares one; its own by default.
        place (`int`): Its place there.
    """

    def __init__(self, room: _Room | None = None, place: int = 0):
        self._room, self._place = room or _Room(), place
        # The rows lie either in buffers, of which `_whole` is this layer's part, or, where there are none, by
        # themselves: as at first, or since a caller has reordered or replaced them.
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._whole: tuple[torch.Tensor, ...] = ()
        self._lengths = [0, 0]  # rows of keys and of values in there
        self._apart: list[torch.Tensor | None] = [None, None]
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
        return self._whole[which].narrow(2, 0, self._lengths[which]) if self._buffers else self._apart[which]

    def _set_rows(self, which: int, rows: torch.Tensor | None) -> None:
        if self._buffers:
            whole = self._whole[which]
            if rows is not None and _place_of(rows) == _place_of(whole):  # cropped
                self._lengths[which] = rows.shape[2]
                return
            self._apart, self._buffers = [self.keys, self.values], ()
        self._apart[which] = rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows (batch, heads, rows, dim); returns all rows."""
        if torch.compiler.is_compiling():  # where tensors lie would break the graph
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.hold(key_states[:, :, :0], value_states[:, :, :0])
        start, num_new = self.get_seq_length(), key_states.shape[2]
        if not (self.shared_buffers and self._room.has(start + num_new)):
            self._move_in(start + num_new)
        for whole, rows in zip(self._whole, (key_states, value_states), strict=True):
            whole.narrow(2, start, num_new).copy_(rows)
        self.show(start + num_new)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._lengths[0] if self._buffers else super().get_seq_length()

    def show(self, num_rows: int) -> None:
        """Hold the first rows of its part of the buffers."""
        self._lengths = [num_rows, num_rows]

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Begin with these rows (batch, heads, rows, dim), which are copied once more follow."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    @property
    def shared_buffers(self) -> tuple[torch.Tensor, ...]:
        """Those of keys and of values, (layers, batch, heads, capacity, dim); none where the rows lie elsewhere."""
        return self._buffers if self._buffers is self._room.buffers else ()

    def _move_in(self, num_rows: int) -> None:
        """Bring the rows to buffers with room for `num_rows`; the layers that share them follow one by one."""
        known = self.keys, self.values
        if not self._room.is_for(*known):
            self._room, self._place = _Room(), 0
        if not self._room.has(num_rows):
            self._room.renew(*known, num_rows)
        self._buffers, self._apart = self._room.buffers, [None, None]
        self._whole = tuple(buffer[self._place] for buffer in self._buffers)
        for whole, rows in zip(self._whole, known, strict=True):
            whole.narrow(2, 0, rows.shape[2]).copy_(rows)


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
