"""Recurrent layers in the target's cache: chains are verified on top of a copy of their states.

A recurrent state cannot forget its newest rows. Before a chain is verified the states are copied; where not all of it
is accepted they are put back, the other layers drop the chain's rows, and the accepted rows are read once more. Layers
that keep the rows of a short convolution only (lfm2) drop rows as attention layers do, without a second reading.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import Cache, cache_utils
from transformers.cache_utils import DynamicLayer

from .._compat import class_of


if TYPE_CHECKING:
    from transformers.cache_utils import LinearAttentionAndFullAttentionLayer
    from transformers.cache_utils import LinearAttentionLayer as LinearAttentionLayer
else:
    LinearAttentionLayer = class_of(cache_utils, "LinearAttentionLayer")
    LinearAttentionAndFullAttentionLayer = class_of(cache_utils, "LinearAttentionAndFullAttentionLayer")
RECURRENT_LAYERS = (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)  # the second has keys and values, too


@dataclass
class RecurrentStates:
    """A copy of the states of all recurrent layers."""

    states: list[tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]]  # of convolutions and recurrences, by layer

    @classmethod
    def copy(cls, cache: Cache) -> "RecurrentStates":
        return cls([(_copies(layer.conv_states), _copies(layer.recurrent_states)) for layer in _replayed(cache)])

    def put_back(self, cache: Cache) -> None:
        """Into the very tensors that they came from: compiled graphs hold on to them."""
        for layer, kept in zip(_replayed(cache), self.states, strict=True):
            for places, states in zip((layer.conv_states, layer.recurrent_states), kept, strict=True):
                for index, state in states.items():
                    places[index].copy_(state)


def check_states(cache: Cache) -> None:
    """
    Refuse a target that, after the prompt, keeps what it read anywhere but in its cache.

    Raises:
        ValueError: Saying what to do instead.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    is_stateless = layers and not any(any(layer.has_previous_state.values()) for layer in layers)
    is_unread = any(isinstance(layer, DynamicLayer) and not layer.is_initialized for layer in cache.layers)
    if is_stateless or is_unread:
        raise ValueError(
            "the target keeps its recurrent state outside of its cache, where draft heads cannot take back a rejected "
            "draft; generate without `assistant_model`"
        )


def needs_replay(cache: Cache) -> bool:
    """Whether rejected rows can only be taken back by reading the accepted ones again."""
    return bool(_replayed(cache))


def record_rows(cache: Cache) -> None:
    """Let the layers that can drop rows keep all rows of the next forward, until `drop_rows`."""
    for layer in cache.layers:
        if not isinstance(layer, LinearAttentionLayer):
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        elif layer.is_croppable:
            layer.activate_past_recording()


def drop_rows(layer: LinearAttentionLayer, num_rows: int) -> None:
    """Forget the newest rows of a convolution's; a recurrence is replayed instead."""
    if layer.record_past:
        LinearAttentionLayer.crop(layer, -num_rows)
        layer.record_past = False


def _replayed(cache: Cache) -> list[LinearAttentionLayer]:
    return [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer) and not layer.is_croppable]


def _copies(states: dict[int, torch.Tensor | None]) -> dict[int, torch.Tensor]:
    return {index: state.clone() for index, state in states.items() if state is not None}
