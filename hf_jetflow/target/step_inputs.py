"""The inputs of plain decoding's forwards after the prompt, which verifies must pass on.

The model's own `prepare_inputs_for_generation` is called three times: for two consecutive steps of one token, and for
one step of both tokens. A keyword with one value in all three is passed on as it is. A keyword with one row per token,
all alike, gets as many rows as a verify. Anything else would need a rule that only the model knows, and is refused.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .._compat import CACHE_NAME
from ..errors import JetFlowError


# Keywords that a verify sets itself. `logits_to_keep` is plain decoding's own saving.
SET_BY_VERIFY = {
    CACHE_NAME,
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
}
# Early releases pass it for the whole text, later ones for the tokens of a step; new tokens are text in both.
TYPES_OF_TEXT = "mm_token_type_ids"
COUNTS_TOKENS = "the target numbers positions by the tokens of each forward"  # of which padding tokens count none
REFUSED_TYPES = {
    "kosmos-2": COUNTS_TOKENS,
    "kosmos-2.5": COUNTS_TOKENS,
    "git": "the target adjusts masks and positions in forwards of one token only",
    "cpmant": "the target puts trained rows in front of the tokens of each forward",
    "doge": "behind its `keep_window_size`, which keys a row sees depends on the other rows of its forward",
}
# What a model raises that builds its step's inputs from more than it is given.
NEEDS_MORE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
PLAIN_TYPES = (bool, int, float, complex, str, torch.Tensor, torch.dtype, torch.device, type(None))


@dataclass
class StepInputs:
    """Keywords and positions of a plain step's forward."""

    position_ids: torch.Tensor | None = None  # (1 or batch, 1) or (kinds, batch, 1), of the first step
    constants: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, tuple[Any, int]] = field(default_factory=dict)  # one row, and its dimension
    num_sequences: int = 1

    def keywords(self, sequences: list[int], num_rows: int) -> dict[str, Any]:
        """Keywords of a verify with `num_rows` rows of these sequences of the batch, in this order."""
        keywords = {name: self._of_sequences(value, sequences) for name, value in self.constants.items()}
        for name, (value, dim) in self.rows.items():
            keywords[name] = self._of_sequences(value, sequences).repeat_interleave(num_rows, dim)
        return keywords

    def _of_sequences(self, value: Any, sequences: list[int]) -> Any:
        """The value's entries of these sequences, if it has an entry for each; one sequence owns any value."""
        is_batch = self.num_sequences > 1 and isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) > 1
        return value[sequences] if is_batch else value


def check_step_inputs(model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
    """
    Refuse, before the prompt is read, targets and keywords whose plain steps a verify cannot repeat.

    A model that makes keywords from the prompt's outputs is left to `read_step_inputs`.

    Raises:
        JetFlowError: Naming the keyword.
    """
    reason = REFUSED_TYPES.get(model.config.model_type)
    if reason is not None:
        raise _refusal(model, reason)
    if hasattr(model, "depth_decoder"):
        raise _refusal(model, "another model decodes between its steps (`depth_decoder`)")
    adapters = _last_row_adapters(model)
    if adapters:
        raise JetFlowError(
            f"the adapter {adapters[0]!r} (activated LoRA) adapts only the last rows of a forward, so draft heads "
            "cannot verify several tokens at once; delete or disable it, or generate without `assistant_model`"
        )
    consumed = [name for name, value in model_kwargs.items() if isinstance(value, Iterator)]
    if consumed:
        raise _refusal(model, f"`{consumed[0]}` is an iterator that every step advances")
    mask, batch = model_kwargs.get("attention_mask"), len(input_ids)
    length = (input_ids if mask is None or mask.ndim != 2 else mask).shape[1]
    outputs = CausalLMOutputWithPast(**{CACHE_NAME: _filled_cache(batch, length)})
    try:
        steps = _plain_steps(model, input_ids, model_kwargs, outputs)
    except NEEDS_MORE:  # of the prompt's outputs
        return
    _compare(model, steps, model_kwargs, batch)


def read_step_inputs(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: dict[str, Any], outputs: ModelOutput
) -> StepInputs:
    """
    The inputs of plain decoding's steps after the prompt.

    Args:
        input_ids (`torch.Tensor`, (batch, seq)): The prompt; seq may be 0.
        model_kwargs (`dict`): As `generate` prepared them for the prompt.
        outputs (`ModelOutput`): Of the prompt's forward.

    Raises:
        JetFlowError: Naming the keyword that a verify cannot pass on as plain steps do.
    """
    return _compare(model, _plain_steps(model, input_ids, model_kwargs, outputs), model_kwargs, len(input_ids))


def passes_positions(model: PreTrainedModel) -> bool:
    """Whether plain decoding passes the positions of new tokens to the forward, which then computes none."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return False
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    positions = torch.arange(2, device=ids.device)[None]
    known: dict[str, Any] = dict(position_ids=positions, attention_mask=torch.ones_like(ids))
    known |= {CACHE_NAME: _filled_cache(1, 1), "use_cache": True}
    try:
        step = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **known)
    except NEEDS_MORE:  # than this: `read_step_inputs` decides
        return True
    return step.get("position_ids") is not None


def _filled_cache(batch: int, length: int) -> DynamicCache:
    """A cache that says it holds `length` tokens of each sequence."""
    cache = DynamicCache()
    cache.update(*torch.zeros(2, batch, 1, length, 1, device="cpu"), 0)
    return cache


def _last_row_adapters(model: PreTrainedModel) -> list[str]:
    """Names of the activated LoRA adapters of peft that are loaded and not disabled."""
    configs = getattr(model, "peft_config", None) or {}
    names = [name for name, config in configs.items() if getattr(config, "alora_invocation_tokens", None)]
    layers = [module for module in model.modules() if hasattr(module, "lora_variant")] if names else []
    return names if any(not layer.disable_adapters for layer in layers) else []


def _plain_steps(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: dict[str, Any], outputs: ModelOutput
) -> list[dict[str, Any]]:
    """Inputs of the first step, of the second, and of one step over both tokens."""
    last = input_ids[:, -1:] if input_ids.shape[1] else input_ids.new_zeros(len(input_ids), 1)
    # Unlike tokens, so that a keyword made from the ids is not taken for a constant.
    other = torch.where(last > 0, last - 1, last + 1)
    one = torch.cat([input_ids, last], dim=1)
    both = torch.cat([one, other], dim=1)
    # Updates write into the dictionary that they are given.
    after_one = model._update_model_kwargs_for_generation(outputs, dict(model_kwargs), is_encoder_decoder=False)
    first = model.prepare_inputs_for_generation(one, next_sequence_length=1, **after_one)
    after_both = model._update_model_kwargs_for_generation(outputs, dict(after_one), is_encoder_decoder=False)
    steps = [first] + [
        model.prepare_inputs_for_generation(both, next_sequence_length=rows, **after_both) for rows in (1, 2)
    ]
    for step, rows in zip(steps, (1, 1, 2), strict=True):
        if isinstance(types := step.get(TYPES_OF_TEXT), torch.Tensor):
            step[TYPES_OF_TEXT] = types[..., -rows:]
    return steps


def _compare(
    model: PreTrainedModel, steps: list[dict[str, Any]], model_kwargs: dict[str, Any], batch: int
) -> StepInputs:
    first, second, both = steps
    if first.get("inputs_embeds") is not None:
        raise _refusal(model, "a step's `inputs_embeds` are made from more than its token")
    _check_mask(model, first.get("attention_mask"), model_kwargs.get("attention_mask"))
    inputs = StepInputs(_step_positions(model, first, second), num_sequences=batch)
    for name in sorted((first.keys() | second.keys() | both.keys()) - SET_BY_VERIFY):
        values = [step.get(name) for step in steps]
        if all(value is None for value in values):
            continue
        if not all(map(_is_plain, values)):
            raise _refusal(model, f"`{name}` is a `{type(values[0]).__name__}`, which a step may change")
        dim = _row_dim(*values)
        if dim is not None:
            inputs.rows[name] = values[0], dim
        elif _is_same(values[0], values[1]) and _is_same(values[0], values[2]):
            inputs.constants[name] = values[0]
        else:
            raise _refusal(model, f"`{name}` differs from step to step")
        if batch > 1 and not _is_per_sequence(values[0], batch):
            raise _refusal(model, f"`{name}` has no entry per sequence of the batch")
    return inputs


def _step_positions(model: PreTrainedModel, first: dict[str, Any], second: dict[str, Any]) -> torch.Tensor | None:
    one, two = (step.get("position_ids") for step in (first, second))
    if one is not None and two is not None:  # a step that starts a new cache has those of the whole text
        one, two = one[..., -1:], two[..., -1:]
    if one is None:
        if passes_positions(model):
            raise _refusal(model, "the target computes the `position_ids` of a step itself")
    elif two is None or not torch.equal(one + 1, two):
        raise _refusal(model, "the `position_ids` of steps do not grow by one")
    return one


def _check_mask(model: PreTrainedModel, of_step: Any, of_prompt: torch.Tensor | None) -> None:
    """A verify hides what the prompt's mask hides, and nothing else."""
    if of_prompt is None or of_prompt.ndim != 2:
        return
    if of_step is None:
        is_alike = bool((of_prompt != 0).all())
    elif isinstance(of_step, torch.Tensor) and of_step.ndim == 2:  # virtual tokens may lie in front of the prompt's
        width = of_prompt.shape[1] + 1
        is_alike = bool((of_step[:, :-width] != 0).all()) and torch.equal(
            of_step[:, -width:].cpu() != 0, torch.nn.functional.pad(of_prompt.cpu() != 0, (0, 1), value=True)
        )
    else:
        is_alike = True
    if not is_alike:
        raise _refusal(model, "the `attention_mask` of a step is not the prompt's, extended by ones")


def _row_dim(first: Any, second: Any, both: Any) -> int | None:
    """The dimension with one row per token, where all tokens have the same row; `None` if there is none."""
    if not all(isinstance(value, torch.Tensor) for value in (first, second, both)):
        return None
    if not _is_same(first, second) or first.ndim != both.ndim:
        return None
    for dim in range(first.ndim):
        if first.shape[dim] == 1 and _is_same(first.repeat_interleave(2, dim), both):
            return dim
    return None


def _is_plain(value: Any) -> bool:
    """Whether a forward leaves the value as it is: numbers, text, tensors, and containers of these."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN_TYPES) and not isinstance(value, Cache)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return type(one) is type(other) and one == other


def _is_per_sequence(value: Any, batch: int) -> bool:
    """Whether the sequences' part of the value is known: the first dimension, as for `num_return_sequences`."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 or value.shape[0] in (1, batch)
    return not isinstance(value, dict | list | tuple)


def _refusal(model: PreTrainedModel, reason: str) -> JetFlowError:
    return JetFlowError(
        f"draft heads cannot verify several tokens of `{model.config.model_type}` in one forward as plain decoding "
        f"reads them: {reason}; generate without `assistant_model`"
    )
