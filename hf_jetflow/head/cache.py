"""Context caches of the head: keys and values of the context rows it has read, growing or of fixed size."""

from typing import Protocol

import torch

from ..buffers import grown


UNSEEN_POSITION = torch.iinfo(torch.int32).max  # of padding among context rows: no block row sees past its anchor


class HeadCache(Protocol):
    """What the head's forward asks of its cache. It stores context rows; block rows follow them for one forward."""

    def extend(
        self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor, num_context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a layer's rows (batch, heads, rows, dim), of which the first `num_context` stay; returns all rows."""

    def extend_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Append positions (batch, rows) of new context rows; returns those of all context rows."""

    def count_rows(self, num_rows: int) -> None:
        """Count the first `num_rows` new context rows of a forward, when it is over; others were padding."""

    def context_rows(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor | None]:
        """Keys and values (batch, heads, rows, dim) of the context in each layer, and positions (batch, rows)."""


class GrowingHeadCache:
    """
    Keys and values of the context rows, per head layer, in buffers with spare capacity.

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
        start = self._lengths[layer_idx]
        end = start + keys.shape[2]
        for store, rows in ((self._keys, keys), (self._values, values)):
            buffer = store[layer_idx]
            if buffer is None or buffer.shape[2] < end:
                store[layer_idx] = buffer = grown(rows[:, :, :0] if buffer is None else buffer[:, :, :start], end)
            buffer[:, :, start:end] = rows
        self._lengths[layer_idx] += num_context
        return self._keys[layer_idx][:, :, :end], self._values[layer_idx][:, :, :end]  # type: ignore[index]

    def extend_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        known = self._position_ids
        self._position_ids = position_ids if known is None else torch.cat([known, position_ids], dim=1)
        return self._position_ids

    def count_rows(self, num_rows: int) -> None:
        """Nothing to do: without padding, the rows are counted as they come."""

    def select_sequences(self, index: torch.Tensor) -> None:
        """Keep only these sequences of the batch, in this order."""
        if self._position_ids is not None:
            self._position_ids = self._position_ids[index]
            self._keys = [None if keys is None else keys[index] for keys in self._keys]
            self._values = [None if values is None else values[index] for values in self._values]

    def context_rows(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor | None]:
        if self._position_ids is None:
            return [], None
        stores = zip(self._keys, self._values, self._lengths, strict=True)
        return [(keys[:, :, :end], values[:, :, :end]) for keys, values, end in stores], self._position_ids  # type: ignore[index]


class StaticHeadCache:
    """
    Keys and values of the context rows in buffers of fixed size, for forwards of one shape: context rows first, the
    block behind the last of them.

    Padding among the context rows is written, too; `count_rows` leaves it out, and the next forward overwrites it.

    Args:
        num_layers (`int`): Layers of the head.
        capacity (`int`): Maximum number of context rows, padding included.
        device (`torch.device`): The head's.
    """

    def __init__(self, num_layers: int, capacity: int, device: torch.device | str = "cpu"):
        self.capacity = capacity
        self.is_empty = True  # nothing was written yet
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self._length = _static(torch.zeros((), dtype=torch.long, device=device))
        self._position_ids: torch.Tensor | None = None  # (batch, capacity); beyond all anchors where empty

    def reset(self) -> None:
        """Empty the buffers, which stay where they are: compiled graphs hold on to them."""
        self.is_empty = True
        self._length.zero_()
        if self._position_ids is not None:
            self._position_ids.fill_(torch.iinfo(torch.long).max)
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
        indices = torch.arange(num_context, device=keys.device) + self._length
        for buffer, rows_of in zip(buffers, (keys, values), strict=True):
            buffer.index_copy_(2, indices, rows_of[:, :, :num_context])
            buffer[:, :, self.capacity :] = rows_of[:, :, num_context:]
        return buffers

    def extend_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Write positions (batch, rows) of new context rows; returns the positions of the full buffers."""
        if self._position_ids is None:
            shape, device = (len(position_ids), self.capacity), position_ids.device
            self._position_ids = _static(torch.full(shape, torch.iinfo(torch.long).max, device=device))
        self.is_empty = False
        indices = torch.arange(position_ids.shape[1], device=position_ids.device) + self._length
        return self._position_ids.index_copy_(1, indices, position_ids)

    def context_rows(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor | None]:
        """Copies of keys and values (batch, heads, rows, dim) of the context in each layer, and of positions (batch,
        rows)."""
        if self.is_empty or self._position_ids is None:
            return [], None
        end = int(self._length)
        rows = [tuple(buffer[:, :, :end].clone() for buffer in buffers) for buffers in self._layers if buffers]
        return rows, self._position_ids[:, :end].clone()  # type: ignore[return-value]

    def count_rows(self, num_rows: int | torch.Tensor) -> None:
        """Count the first `num_rows` of the newest context rows; the others were padding."""
        self._length.add_(num_rows)


def _static(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer, marked as one whose address stays: CUDA graphs may then change it in place."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(buffer, guard=False)
    return buffer
