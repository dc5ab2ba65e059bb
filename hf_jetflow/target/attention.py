"""SDPA for many rows under an explicit mask, without copies of keys and values, registered with transformers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .._compat import CACHE_NAME
from ..errors import JetFlowError
from ..head.masks import additive_mask
from .split_attention import can_split, split_sdpa


NAME = "jetflow_sdpa"


def grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Grouped-query SDPA with a mask, without repeating keys and values per query head.

    transformers' own function copies all keys and values per query head as soon as there is a mask. Same arguments and
    same result; calls of any other kind go to it.

    Args:
        query (`torch.Tensor`, (batch, heads, rows, dim)).
        key, value (`torch.Tensor`, (batch, key_value_heads, keys, dim)).
        attention_mask (`torch.Tensor`, (batch, 1, rows, keys), *optional*): Boolean, or added to the scores.

    Returns:
        (batch, rows, heads, dim), and `None` for the attention weights.
    """
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    is_plain = all(kwargs.get(name) is None for name in ("position_bias", "softcap", "s_aux", "cache"))
    if attention_mask is None or rows == 1 or attention_mask.shape[1] != 1 or not is_plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    node_mask = getattr(attention_mask, "_jetflow_nodes", None)
    grouped = query.reshape(batch, -1, groups * rows, dim)
    if node_mask is not None and dropout == 0 and can_split(grouped, key, value, rows):
        dtype = torch.promote_types(query.dtype, torch.float32)
        output = split_sdpa(grouped, key, value, _repeated_mask(node_mask, groups, dtype), scaling)
    elif groups == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    else:
        output = scaled_dot_product_attention(
            grouped,
            key,
            value,
            attn_mask=_repeated_mask(attention_mask, groups, query.dtype),
            dropout_p=dropout,
            scale=scaling,
        )
    return output.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous(), None


def _repeated_mask(mask: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask repeated for all query heads of a key/value head; made by the first layer and stored with the mask."""
    known = getattr(mask, "_jetflow_repeated", None)
    if known is None or known[0] != (groups, dtype):
        # SDPA would turn booleans into these numbers again in every layer.
        added = additive_mask(mask, dtype, unseen=-math.inf) if mask.dtype == torch.bool else mask
        known = ((groups, dtype), added.repeat(1, 1, groups, 1))
        mask._jetflow_repeated = known  # type: ignore[attr-defined]
    return known[1]


def mask_dtype(model: PreTrainedModel) -> torch.dtype:
    """
    The type of the masks that the target's attention function takes: boolean (True: seen), or numbers that are added
    to the scores. The mask function registered under its name makes a small one to tell.

    Raises:
        JetFlowError: If it takes no masks (batch, 1, rows, keys), in which a draft tree can be written.
    """
    config = model.config.get_text_config(decoder=True)
    name = config._attn_implementation or "eager"
    mask = None
    if name in ALL_MASK_ATTENTION_FUNCTIONS and name != "flex_attention":
        # Padding forces a mask: without it, transformers may return none.
        padding, inputs = torch.tensor([[0, 1]], device="cpu"), torch.zeros(1, 2, 1, dtype=model.dtype, device="cpu")
        mask = create_causal_mask(config, inputs, padding, position_ids=None, **{CACHE_NAME: None})
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise JetFlowError(
            f"the attention implementation {name!r} takes no tree masks; load the target with "
            '`attn_implementation="sdpa"` (or "eager"), or register a function with `AttentionMaskInterface` that '
            "returns masks (batch, 1, rows, keys) for it"
        )
    return mask.dtype


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """
    Use `grouped_sdpa` inside the block, if the model uses transformers' SDPA and looks the function up by name.

    Another thread that runs the same model meanwhile gets the same results, by either function.
    """
    config = model.config.get_text_config(decoder=True)
    # Older models, such as falcon, compare the name themselves: any other one means eager attention to them.
    is_theirs = ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    if config._attn_implementation != "sdpa" or not is_theirs or not model._supports_attention_backend:
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


AttentionInterface.register(NAME, grouped_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
