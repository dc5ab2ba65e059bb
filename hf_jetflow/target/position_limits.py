"""Positions that the rows of one forward must not straddle.

Three kinds of borders. A table of positions ends: a drafted token behind its end cannot be looked up, although the
text may end before it. Rotary frequencies depend on the longest position of a forward: a drafted token behind the
border would switch them for every row. And plain decoding may read the whole text again there, into a new cache
(Phi-3). Plain decoding comes to a border with a forward of one row, so a round ends in front of it or starts on it.
"""

import inspect
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)
# Lengths in configurations. A superfluous name costs a short round; a missing one may cause an index error.
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_target_positions",
    "original_max_position_embeddings",
)
SINES = ("embed_positions", "pos_encoding")  # tensors of sines by position, as in GPT-J and CTRL


@dataclass(frozen=True)
class PositionLimits:
    """The borders of one target."""

    borders: tuple[int, ...] = ()  # ascending; no round has rows on both sides of one
    plain_from: int | None = None  # from here on every length has frequencies of its own, so a forward reads one row
    fresh_at: int | None = None  # cached tokens at which plain decoding starts a new cache
    batch_end: int | None = None  # a longer text changes how the other sequences of its batch are read, or fails

    def max_depth(self, position: int) -> int | None:
        """Depth that drafted tokens may have behind an anchor at `position`; `None` if any."""
        if self.plain_from is not None and position >= self.plain_from:
            logger.warning_once(
                f"from position {self.plain_from} on, the target's dynamic RoPE changes with every token: the rest of "
                "the text is decoded plainly, without the draft head."
            )
            return 0
        index = bisect_right(self.borders, position)
        return self.borders[index] - 1 - position if index < len(self.borders) else None


def position_limits(model: PreTrainedModel) -> PositionLimits:
    """The borders of a target."""
    text = model.config.get_text_config(decoder=True)
    lengths = [getattr(text, name, None) for name in LENGTHS]
    tables, growing, switching = _table_sizes(model), [], []
    for rope in _rope_parameters(text):
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if "dynamic" in kind:
            growing.append(text.max_position_embeddings)
        elif kind == "longrope":
            original = rope.get("original_max_position_embeddings")
            switching.append(original or getattr(text, LENGTHS[-1], None) or text.max_position_embeddings)
    fresh_at = getattr(text, LENGTHS[-1], None) if _restarting_names(model) else None
    ends = [end for end in (*tables, *growing, *switching, fresh_at) if end is not None]
    return PositionLimits(
        borders=tuple(sorted({*ends, *(length for length in lengths if isinstance(length, int))})),
        plain_from=min(growing, default=None),
        fresh_at=fresh_at,
        batch_end=min(ends, default=None),
    )


def border_reason(
    model: PreTrainedModel, cache: Cache | None, num_sequences: int, num_prompt: int, max_length: int | None
) -> str | None:
    """
    Reason to decode a call plainly because its text crosses a border; `None` if there is none.

    Args:
        cache (`Cache`, *optional*): The one that the call is given.
        num_prompt (`int`): Tokens of the prompt; padding and those given as embeddings or cached are included.
        max_length (`int`, *optional*): Tokens of the longest text that the call may yield; `None` without a limit.
    """
    limits, kind = position_limits(model), model.config.model_type

    def reaches(end: int | None) -> bool:
        return end is not None and (max_length is None or max_length - 1 > end)  # the last token is not read

    if num_sequences > 1 and reaches(limits.batch_end):
        return (
            f"beyond {limits.batch_end} tokens `{kind}` has other rotary frequencies or no positions, and the "
            "sequences of a batch would get there at different times"
        )
    if limits.fresh_at is not None and reaches(limits.fresh_at) and _forgets(model):
        num_read = (0 if cache is None else int(cache.get_seq_length())) or num_prompt
        if num_read > limits.fresh_at:  # never again
            return None
        return (
            f"beyond {limits.fresh_at} tokens `{kind}` starts a new cache, and this release of transformers then "
            "forgets the text; use transformers 5.24 or newer"
        )
    return None


def _forgets(model: PreTrainedModel) -> bool:
    """Whether the step that starts a new cache is given the last token only, as early releases of transformers do."""
    return "next_sequence_length" not in _restarting_names(model)


def _restarting_names(model: PreTrainedModel) -> tuple[Any, ...]:
    """Names and constants in the method that starts a new cache at the original length; empty if none does."""
    for kind in type(model).__mro__:
        prepare = vars(kind).get("prepare_inputs_for_generation")
        code = getattr(inspect.unwrap(prepare), "__code__", None) if callable(prepare) else None
        if code is not None and LENGTHS[-1] in (names := code.co_names + code.co_consts):
            return names
    return ()


def _rope_parameters(text: PreTrainedConfig) -> list[dict]:
    """Rotary parameters, one entry for each kind of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [entry for entry in parameters.values() if isinstance(entry, dict)]
    return nested or [parameters]


def _table_sizes(model: PreTrainedModel) -> list[int]:
    """Positions in each table of positions of the text model."""
    body = model.get_decoder()
    body = model.base_model if body is None else body
    sizes = []
    for name, module in _text_modules(body, type(model.config.get_text_config(decoder=True))):
        if isinstance(module, nn.Embedding) and ("position" in name or name == "wpe"):
            sizes.append(module.num_embeddings - getattr(module, "offset", 0))
        tables = [module._buffers.get(sines, vars(module).get(sines)) for sines in SINES]
        sizes += [len(table) for table in tables if isinstance(table, torch.Tensor) and table.ndim == 2]
    return sizes


def _text_modules(module: nn.Module, config_class: type, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules below and their own names, without vision towers, whose positions are not those of tokens."""
    yield name, module
    for name, child in module.named_children():
        if not isinstance(child, PreTrainedModel) or isinstance(child.config, config_class):
            yield from _text_modules(child, config_class, name)
