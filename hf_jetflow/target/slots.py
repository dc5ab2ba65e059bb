"""`BatchSlots`: which sequence each batch slot holds. The emitter, the masks and the caches share one."""

from typing import Any

import torch

from ..transfer import to_device
from .adapters import AdapterNames


class BatchSlots:
    """
    Maps batch slots to sequences, active ones first, and tracks how many tokens of each are cached.

    Args:
        num_sequences (`int`): Sequences of the batch.
        adapter_names ([`AdapterNames`]): The sequences' peft adapters, which follow the slots.
    """

    def __init__(self, num_sequences: int, adapter_names: AdapterNames):
        self._adapter_names = adapter_names
        self.order = list(range(num_sequences))  # the sequence in each slot
        self.lengths = torch.zeros(num_sequences, dtype=torch.long, device="cpu")  # (active,) cached tokens by slot
        self._finished: dict[int, int] = {}  # cached tokens of the others
        self._new_offsets: dict[tuple[Any, ...], torch.Tensor] = {}  # stored for the current lengths

    @property
    def active(self) -> list[int]:
        """The active sequences, by slot."""
        return self.order[: len(self.lengths)]

    def fill(self, num_cached: int) -> None:
        """Count the prompts as cached, `num_cached` tokens of each sequence."""
        self._set_lengths(torch.full_like(self.lengths, num_cached))

    def advance(self, paths: list[list[int]]) -> None:
        """Count the tokens of each sequence's path as cached."""
        self._set_lengths(self.lengths + torch.tensor([len(path) for path in paths], device="cpu"))

    def _set_lengths(self, lengths: torch.Tensor) -> None:
        # Replaced, never changed in place: `PrefilledTarget` knows by the object whether its copy is of these lengths.
        self.lengths = lengths
        self._new_offsets = {}

    def new_offsets(self, num_new: int, heads: int, capacity: int, device: torch.device) -> torch.Tensor:
        """`flat_offsets` of the next `num_new` rows of each sequence, computed once for all layers."""
        key = (num_new, heads, capacity, device)
        if key not in self._new_offsets:
            indices = self.lengths[:, None] + torch.arange(num_new, device="cpu")
            self._new_offsets[key] = to_device(flat_offsets(indices, heads, capacity), device)
        return self._new_offsets[key]

    def retire(self, slot: int) -> None:
        """Swap the sequence in `slot` with the last active one, and deactivate it."""
        last = len(self.lengths) - 1
        self.order[slot], self.order[last] = self.order[last], self.order[slot]
        self._finished[self.order[last]] = int(self.lengths[slot])
        lengths = self.lengths.clone()
        lengths[slot] = lengths[last]
        self._set_lengths(lengths[:last])
        self._adapter_names.select(self.active)

    def cut(self, lengths: list[int]) -> None:
        """Truncate the cached lengths; tokens beyond `lengths` were surplus."""
        self._finished = {sequence: min(known, lengths[sequence]) for sequence, known in self._finished.items()}
        self._set_lengths(self.lengths.minimum(torch.tensor(lengths, device="cpu")[self.active]))

    def reactivate(self) -> None:
        """Reactivate all sequences in their current slots."""
        known = dict(zip(self.order, self.lengths.tolist(), strict=False)) | self._finished
        self._set_lengths(torch.tensor([known[sequence] for sequence in self.order], device="cpu"))
        self._finished = {}
        self._adapter_names.select(self.active)


def flat_offsets(indices: torch.Tensor, heads: int, capacity: int) -> torch.Tensor:
    """Indices (active, count) along the rows of a buffer (batch, heads, capacity, dim), as indices into the list of
    all its rows; one for each head."""
    firsts = torch.arange(len(indices) * heads, device=indices.device).view(-1, heads, 1) * capacity
    return (firsts + indices[:, None]).flatten()
