"""Positions behind which a target must not be shown drafted tokens.

Two kinds of borders. A table of learned positions ends: a drafted token behind its end cannot be looked up, although
the text may end before it. And rotary frequencies may depend on the longest position of a forward: a drafted token
behind the border would switch them for every row of the forward. Plain decoding crosses such a border with one token;
so does a round without drafted tokens.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class PositionLimits:
    """The borders of one target."""

    end: int | None = None  # last position that drafted tokens may ever have
    switch: int | None = None  # first position with other rotary frequencies, which are constant on both sides

    def max_depth(self, anchor_position: int) -> int | None:
        """Depth that drafted tokens may have behind an anchor, the foremost of a batch; `None` if any."""
        limits = [] if self.end is None else [self.end - anchor_position]
        if self.switch is not None and anchor_position < self.switch:
            limits.append(self.switch - 1 - anchor_position)
        return max(min(limits), 0) if limits else None


def position_limits(model: PreTrainedModel) -> PositionLimits:
    """The borders of a target."""
    sizes = [*_table_sizes(model), rope_border(model, is_growing=True)]
    end = min((size - 1 for size in sizes if size is not None), default=None)
    return PositionLimits(end, rope_border(model, is_growing=False))


def rope_border(model: PreTrainedModel, is_growing: bool) -> int | None:
    """
    Length of text from which on rotary frequencies are others, the least over the layers; `None` if they never change.

    Args:
        is_growing (`bool`): Asks for frequencies that go on changing with the length (dynamic NTK); else for those
            that change once (longrope).
    """
    text = model.config.get_text_config(decoder=True)
    borders = []
    for rope in _rope_parameters(text):
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if is_growing and "dynamic" in kind:
            borders.append(text.max_position_embeddings)
        elif not is_growing and kind == "longrope":
            original = rope.get("original_max_position_embeddings")
            borders.append(original or getattr(text, "original_max_position_embeddings", text.max_position_embeddings))
    return min(borders, default=None)


def plain_reason(model: PreTrainedModel, num_sequences: int, num_prompt: int, max_length: int | None) -> str | None:
    """
    Why the text of a call crosses a border that only plain decoding crosses exactly; `None` if it does not.

    Args:
        num_prompt (`int`): Tokens of the prompt, padding included.
        max_length (`int`, *optional*): Tokens of the longest text that the call may yield; `None` without a limit.
    """
    text = model.config.get_text_config(decoder=True)
    restart = getattr(text, "original_max_position_embeddings", None)
    if restart is not None and num_prompt <= restart and _is_longer(max_length, restart) and _restarts(model):
        return (
            f"`{text.model_type}` reads its text from scratch once it is longer than {restart} tokens; set "
            "`max_new_tokens` so that the text stays shorter, to draft it"
        )
    if num_sequences > 1:
        limits = position_limits(model)
        borders = [None if limits.end is None else limits.end + 1, limits.switch]
        border = min((border for border in borders if border is not None), default=None)
        if border is not None and _is_longer(max_length, border):
            return (
                f"beyond {border} tokens `{text.model_type}` has other rotary frequencies or no positions, and the "
                "sequences of a batch would get there at different times"
            )
    return None


def _is_longer(max_length: int | None, border: int) -> bool:
    return max_length is None or max_length > border


def _rope_parameters(text: PreTrainedConfig) -> list[dict]:
    """Rotary parameters, one entry for each kind of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [entry for entry in parameters.values() if isinstance(entry, dict)]
    return nested or [parameters]


def _restarts(model: PreTrainedModel) -> bool:
    """Whether the target drops its cache when a text outgrows its original length (Phi-3 and its kin)."""
    prepare = inspect.unwrap(type(model).prepare_inputs_for_generation)
    return "original_max_position_embeddings" in prepare.__code__.co_names + prepare.__code__.co_consts


def _table_sizes(model: PreTrainedModel) -> list[int]:
    """Positions in each table of positions of the text model."""
    body = model.get_decoder()
    body = model.base_model if body is None else body
    sizes = []
    for name, module in body.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding) and ("position" in leaf or leaf == "wpe"):
            sizes.append(module.num_embeddings - getattr(module, "offset", 0))
        table = getattr(module, "embed_positions", None)  # sines by position, as in GPT-J
        if isinstance(table, torch.Tensor) and table.ndim == 2:
            sizes.append(len(table))
    return sizes
