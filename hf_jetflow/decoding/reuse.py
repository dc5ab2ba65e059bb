"""Stores the head's context with the target's cache, so that a follow-up call need not rebuild it.

The cache may be cropped, copied, extended, reset or used for another text in between: only the part that still belongs
to its tokens is loaded. Stored states are never changed: a call copies them, and copies of the cache share them.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache

from ..head.cache import HeadCache
from ..head.modeling_jetflow import JetFlowHead


ATTRIBUTE = "_jetflow_context"  # of the target's cache


@dataclass(frozen=True)
class HeadContext:
    """What a head was shown: the context rows it has read, and the features it has not read yet."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # keys and values (1, heads, read, dim) of each head layer
    position_ids: torch.Tensor  # (1, read), ascending
    features: torch.Tensor  # (1, unread, taps x target_hidden)
    feature_position_ids: torch.Tensor  # (1, unread), ascending, behind those that were read

    @property
    def end(self) -> int:
        """The position behind the newest token."""
        return int(self.feature_position_ids[0, -1]) + 1

    def before(self, position: int) -> "HeadContext":
        """The part about tokens in front of `position`."""
        read = int((self.position_ids < position).sum())
        unread = int((self.feature_position_ids < position).sum())
        return HeadContext(
            layers=tuple((keys[:, :, :read], values[:, :, :read]) for keys, values in self.layers),
            position_ids=self.position_ids[:, :read],
            features=self.features[:, :unread],
            feature_position_ids=self.feature_position_ids[:, :unread],
        )

    def load(self, cache: HeadCache, num_block_rows: int) -> None:
        """Copy the rows that were read into an empty cache for blocks of `num_block_rows` rows."""
        num_rows = self.position_ids.shape[1]
        if num_rows == 0:
            return
        cache.extend_positions(self.position_ids)
        for index, states in enumerate(self.layers):
            keys, values = (pad(rows, (0, 0, 0, num_block_rows)) for rows in states)
            cache.extend(index, keys, values, num_rows)
        cache.count_rows(num_rows)


@dataclass(frozen=True)
class CacheMarks:
    """Fingerprint of a target cache: four key values of each row, to find the common prefix later."""

    numbers: torch.Tensor  # (batch, rows, 4), of the deepest layer's keys: they depend on the whole text before
    num_cached: int  # tokens in the cache; a layer with a window holds the last rows only

    @staticmethod
    def of(cache: Cache) -> "CacheMarks | None":
        """`None` where no layer has keys yet."""
        layers = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
        num_cached = int(cache.get_seq_length())
        if not layers or num_cached == 0:
            return None
        deepest = max(reversed(layers), key=lambda layer: layer.keys.shape[2])
        return CacheMarks(deepest.keys[:, 0, :num_cached, :4].clone(), num_cached)

    def num_common(self, other: "CacheMarks") -> int:
        """Tokens at the start of both caches, compared on the rows that both caches still hold."""
        if len(self.numbers) != len(other.numbers):
            return 0
        fewest = min(self.num_cached, other.num_cached)
        starts = [marks.num_cached - marks.numbers.shape[1] for marks in (self, other)]
        num_compared = fewest - max(starts)
        if num_compared <= 0:  # no common rows: assume the same text; an error costs acceptance, never exactness
            return fewest
        mine, others = (
            marks.numbers[:, max(starts) - start :][:, :num_compared]
            for marks, start in zip((self, other), starts, strict=True)
        )
        is_equal = (mine == others.to(mine.device)).all(dim=-1).all(dim=0)
        num_equal = int(is_equal.cumprod(dim=0).sum())
        return max(starts) + num_equal if num_equal else 0


@dataclass(frozen=True)
class _Stored:
    """What is stored with a cache."""

    head: "weakref.ref[JetFlowHead]"
    dtype: torch.dtype
    device: torch.device
    marks: CacheMarks
    context: HeadContext

    def __deepcopy__(self, _memo: dict[int, Any]) -> "_Stored":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # is not pickled with its cache


def store_context(cache: Cache, head: JetFlowHead, head_context: Callable[[], HeadContext]) -> None:
    """Store with the target's cache what the head was shown of its tokens; for one sequence, not for a batch."""
    marks = CacheMarks.of(cache)
    if marks is not None and len(marks.numbers) == 1:
        stored = _Stored(weakref.ref(head), head.dtype, head.device, marks, head_context())
        setattr(cache, ATTRIBUTE, stored)


def stored_context(cache: Cache | None, head: JetFlowHead) -> HeadContext | None:
    """What the head was shown of the tokens that the cache holds now; `None` if nothing of them."""
    stored: _Stored | None = getattr(cache, ATTRIBUTE, None)
    if stored is None or stored.head() is not head or (stored.dtype, stored.device) != (head.dtype, head.device):
        return None
    assert cache is not None
    marks = CacheMarks.of(cache)
    num_common = 0 if marks is None else stored.marks.num_common(marks)
    if num_common == 0:
        return None
    return stored.context.before(stored.context.end - (stored.marks.num_cached - num_common))
