"""Recurrent layers in the target's cache; those of unknown classes verify chains, on top of a copy of their states.

A recurrent state cannot forget its newest rows. Layers of known classes do without (see `mixer_layers.py`). For the
others, the states are copied before a chain is verified. If not all of it is accepted, they are restored, the other
layers drop the chain's rows, and the target reads the accepted rows again.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import Cache, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .._compat import class_of
from ..errors import JetFlowError


if TYPE_CHECKING:
    from transformers.cache_utils import (
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndStaticFullAttentionLayer,
    )
    from transformers.cache_utils import LinearAttentionLayer as LinearAttentionLayer
else:
    LinearAttentionLayer = class_of(cache_utils, "LinearAttentionLayer")
    LinearAttentionAndFullAttentionLayer = class_of(cache_utils, "LinearAttentionAndFullAttentionLayer")
    LinearAttentionAndStaticFullAttentionLayer = class_of(cache_utils, "LinearAttentionAndStaticFullAttentionLayer")
RECURRENT_LAYERS = (  # all but the first have keys and values, too
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
)


@dataclass
class RecurrentStates:
    """A copy of the states of all recurrent layers."""

    states: list[tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]]  # of convolutions and recurrences, by layer

    @classmethod
    def copy(cls, cache: Cache) -> "RecurrentStates":
        layers = filter(_is_recurrent, cache.layers)
        return cls([(_copies(layer.conv_states), _copies(layer.recurrent_states)) for layer in layers])

    def restore(self, cache: Cache) -> None:
        """Write the states into the tensors that they came from: compiled graphs hold on to these."""
        for layer, copies in zip(filter(_is_recurrent, cache.layers), self.states, strict=True):
            for originals, states in zip((layer.conv_states, layer.recurrent_states), copies, strict=True):
                for index, state in states.items():
                    originals[index].copy_(state)


def check_states(cache: Cache) -> None:
    """
    Refuse a target that keeps recurrent states outside its cache.

    Raises:
        JetFlowError: Saying what to do instead.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    is_stateless = layers and not any(any(layer.has_previous_state.values()) for layer in layers)
    is_unread = any(isinstance(layer, DynamicLayer) and not layer.is_initialized for layer in cache.layers)
    if is_stateless or is_unread:
        raise JetFlowError(
            "the target keeps its recurrent state outside of its cache, where draft heads cannot roll back a rejected "
            "draft; generate without `assistant_model`"
        )


def has_states(cache: Cache) -> bool:
    """Whether some layer is recurrent."""
    return any(map(_is_recurrent, cache.layers))


def _is_recurrent(layer: CacheLayerMixin) -> bool:
    return isinstance(layer, LinearAttentionLayer)


def _copies(states: dict[int, torch.Tensor | None]) -> dict[int, torch.Tensor]:
    return {index: state.clone() for index, state in states.items() if state is not None}
