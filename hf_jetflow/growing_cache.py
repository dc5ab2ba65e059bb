"""The target's cache of one sequence in buffers with room to grow: a forward copies its new rows only, a path is kept
with few moves."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


MAX_SHARING = 8  # layers in one buffer: more would mean fewer moves, but more rows to hold twice while it grows


class GrowingLayer(DynamicLayer):
    """
    A layer of the target's cache that shares its buffers with other layers of the same shape.

    transformers' own layer copies all rows in every forward. `keys` and `values` are views of the buffers: what lies
    behind their end, such as rows that were cropped, is overwritten by the next `update`.

    Args:
        layers (`list[GrowingLayer]`, *optional*): The growing layers of the cache; this one joins them.
    """

    def __init__(self, layers: "list[GrowingLayer] | None" = None):
        super().__init__()
        self._layers = [] if layers is None else layers
        self._layers.append(self)
        self._buffers: tuple[torch.Tensor, ...] = ()  # of keys and of values, (layers, batch, heads, capacity, dim)
        self._place = 0  # in the buffers
        self._lie: tuple[Any, ...] = ()  # where its rows lie there

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows (batch, heads, rows, dim); returns all rows."""
        if torch.compiler.is_compiling():  # where tensors lie would break the graph
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.hold(key_states[:, :, :0], value_states[:, :, :0])
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not self.shared_buffers or self._buffers[0].shape[-2] < end:
            self._make_room(end)
        for buffer, rows in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[self._place, :, :, start:end] = rows
        self._show(end)
        return self.keys, self.values

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Begin with these rows (batch, heads, rows, dim), which are copied once more follow."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    @property
    def shared_buffers(self) -> tuple[torch.Tensor, ...]:
        """Those of keys and of values, (layers, batch, heads, capacity, dim); none where the rows do not lie in them,
        as at first, or since a caller has reordered or replaced them."""
        return self._buffers if _lie(self.keys, self.values) == self._lie else ()

    def _make_room(self, num_rows: int) -> None:
        """New buffers for more than `num_rows` rows of this layer and of others that are like it by now."""
        alike = [layer for layer in self._layers if layer.is_initialized and layer._shape == self._shape]
        first = alike.index(self) // MAX_SHARING * MAX_SHARING
        alike = alike[first : first + MAX_SHARING]
        buffers = []
        for rows in (self.keys, self.values):
            batch, heads, _, dim = rows.shape
            buffers.append(rows.new_empty(len(alike), batch, heads, num_rows + max(num_rows // 4, 256), dim))
        for place, layer in enumerate(alike):
            length = layer.keys.shape[2]
            for buffer, rows in zip(buffers, (layer.keys, layer.values), strict=True):
                buffer[place, :, :, :length] = rows
            layer._buffers, layer._place = tuple(buffers), place
            layer._show(length)
            layer._lie = _lie(*(buffer[place] for buffer in buffers))

    @property
    def _shape(self) -> tuple[Any, ...]:
        return self.keys.shape, self.values.shape, self.keys.dtype, self.keys.device

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[self._place, :, :, :length] for buffer in self._buffers)


def _lie(keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
    return keys.data_ptr(), keys.stride(), values.data_ptr(), values.stride()


def grow_layers(cache: DynamicCache) -> None:
    """Give the rows of the cache's ordinary layers room to grow, for the time of a generation."""
    layers: list[GrowingLayer] = []
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = grown = GrowingLayer(layers)
            if layer.get_seq_length():
                grown.hold(layer.keys, layer.values)


def settle_layers(cache: DynamicCache) -> None:
    """The ordinary layers again, as the caller knows them, with the same rows."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, GrowingLayer) and layer.is_initialized:
            cache.layers[index] = settled = DynamicLayer()
            settled.lazy_initialization(layer.keys, layer.values)
            settled.keys, settled.values = layer.keys, layer.values
