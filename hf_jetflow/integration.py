"""How `model.generate(assistant_model=head)` reaches our loop.

`generate` looks its decoding loop up on the class, so two methods of `GenerationMixin` are wrapped once: the early
validation, to say what is wrong with a pairing, and the assisted loop, to dispatch heads to ours. The function by
which pipelines load their assistant is wrapped to load heads. Every other assistant goes through untouched.
`custom_generate=head.custom_generate` needs no wrap at all.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.pipelines import base as pipelines
from transformers.utils import logging

from ._compat import CACHE_NAME
from .decoding.batching import plain_batch_reason
from .decoding.loop import decode
from .errors import JetFlowError
from .head.configuration_jetflow import JetFlowConfig
from .head.modeling_jetflow import JetFlowHead
from .stats import GenerationStats
from .target.attention import mask_dtype
from .target.caches import unsupported_cache
from .target.dropout import dropout_reason
from .target.pickling import allow_pickling
from .target.position_limits import border_reason


logger = logging.get_logger(__name__)
_WRAPPERS: dict[
    tuple[Any, str], tuple[Callable, Callable]
] = {}  # originals and our wrappers, by class or module and name
_is_enabled = False


def enable() -> None:
    """
    Let `generate` take a [`JetFlowHead`] as `assistant_model`. Done on import; calling it again changes nothing.

    Warns where the installed transformers lacks what is wrapped.
    """
    global _is_enabled
    _is_enabled = True
    for owner, name, wrap, loss in (
        (GenerationMixin, "_assisted_decoding", _dispatching, "`generate` takes no draft head as `assistant_model`"),
        (GenerationMixin, "_validate_generation_mode", _validating, "`assistant_model` takes one prompt at a time"),
        (pipelines, "load_assistant_model", _loading, "pipelines take no draft head as `assistant_model`"),
    ):
        if (owner, name) in _WRAPPERS:  # `disable` left it in place, under a third-party patch
            continue
        original = getattr(owner, name, None)
        if original is None:
            logger.warning(
                f"transformers {transformers.__version__} has no `{name}`, so {loss}; use "
                "`custom_generate=head.custom_generate`, or install transformers 5.17 to 5.24."
            )
            continue
        _WRAPPERS[owner, name] = original, wrap(original)
        setattr(owner, name, _WRAPPERS[owner, name][1])


def disable() -> None:
    """Restore transformers' own methods. Third-party patches on top stay, and reach these."""
    global _is_enabled
    _is_enabled = False
    for (owner, name), (original, wrapper) in list(_WRAPPERS.items()):
        if getattr(owner, name) is wrapper:
            setattr(owner, name, original)
            del _WRAPPERS[owner, name]


def _is_ours(assistant: Any) -> bool:
    return _is_enabled and isinstance(assistant, JetFlowHead)


def _dispatching(original: Callable) -> Callable:
    @functools.wraps(original)  # generate reads the signature
    def _assisted_decoding(self: PreTrainedModel, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(kwargs.get("assistant_model")):
            return original(self, input_ids, *args, **kwargs)
        head = kwargs.pop("assistant_model")
        for unused in ("inputs_tensor", "assistant_tokenizer", "tokenizer"):
            kwargs.pop(unused, None)
        return _checked_decode(self, head, input_ids, *args, **kwargs)

    return _assisted_decoding


def _validating(original: Callable) -> Callable:
    @functools.wraps(original)
    def _validate_generation_mode(
        self: PreTrainedModel, generation_mode: Any, generation_config: Any, kwargs: Any
    ) -> Any:
        assistant = kwargs.get("assistant_model")
        if _is_ours(assistant):
            check_pairing(self, assistant)
            check_mode(generation_config)  # before `generate` makes caches; by `custom_generate`, `check_call` does it
            # Validate it as a plain call: in assisted generation, transformers refuses stateful targets and batches.
            kwargs = {name: value for name, value in kwargs.items() if name != "assistant_model"}
            generation_mode = generation_config.get_generation_mode()
        elif _is_enabled:
            check_assistant(assistant)
        return original(self, generation_mode, generation_config, kwargs)

    return _validate_generation_mode


def _loading(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_assistant_model(model: PreTrainedModel, assistant_model: Any, assistant_tokenizer: Any) -> Any:
        """A head, loaded or by its name, comes without a tokenizer: it drafts the target's own token ids."""
        head = assistant_model
        if not _is_enabled:
            return original(model, assistant_model, assistant_tokenizer)
        if isinstance(head, str) and isinstance(AutoConfig.from_pretrained(head), JetFlowConfig):
            head = JetFlowHead.from_pretrained(head).to(device=model.device, dtype=model.dtype)
        if isinstance(head, JetFlowHead):
            return head, None
        return original(model, assistant_model, assistant_tokenizer)

    return load_assistant_model


def _custom_generate(self: JetFlowHead) -> Callable:
    """
    The head as a `custom_generate` callable: `target.generate(**inputs, custom_generate=head.custom_generate)`.

    On this route `generate` keeps its `streamer` to itself: pass yours as `token_streamer=`.
    """

    def generate_with_head(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        token_streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        check_pairing(model, self)
        if token_streamer is not None:
            token_streamer.put(input_ids.cpu())
        return _checked_decode(model, self, input_ids, streamer=token_streamer, **kwargs)

    return generate_with_head


JetFlowHead.custom_generate = property(_custom_generate)


def _checked_decode(
    model: PreTrainedModel, head: JetFlowHead, input_ids: torch.Tensor, **kwargs: Any
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    generation_config = kwargs["generation_config"]
    check_call(model, generation_config, kwargs.pop("synced_gpus", False))
    check_processes(model, head)
    cache, num_given, max_length = kwargs.get(CACHE_NAME), _num_given(input_ids, kwargs), generation_config.max_length
    limit = None if max_length is None else max_length + num_given
    reason = dropout_reason(model) or border_reason(
        model, cache, len(input_ids), input_ids.shape[1] + num_given, limit
    )
    if reason is None and len(input_ids) > 1:
        deciders = kwargs["logits_processor"], kwargs["stopping_criteria"]
        reason = plain_batch_reason(model, *deciders, generation_config, cache)
    if reason is not None:
        logger.warning_once(f"this call is decoded plainly, without the draft head: {reason}.")
        head.last_stats, head.last_trees = GenerationStats(policy={"plain": reason}), None
        return model._sample(input_ids, **kwargs)
    try:
        return decode(model, head, input_ids, **kwargs)
    finally:
        allow_pickling(model)  # the hooks with which transformers captured the taps stay with the model


def check_assistant(assistant: Any) -> None:
    """
    Refuse what is no model, such as the name of a head, and a wrapper around one, such as peft's or `torch.compile`'s.

    Raises:
        JetFlowError: Naming what to pass instead.
    """
    if assistant is not None and (isinstance(assistant, type) or not hasattr(assistant, "config")):
        if isinstance(assistant, str | os.PathLike):
            got = source = repr(os.fspath(assistant))
        else:
            kind = assistant if isinstance(assistant, type) else type(assistant)
            got, source = f"`{kind.__name__}`", "SOURCE"
        raise JetFlowError(
            f"`assistant_model` is {got}, but must be a loaded draft head or model; load a head by "
            f"`JetFlowHead.from_pretrained({source}, dtype=target.dtype, device_map=target.device)`"
        )
    if not isinstance(assistant, torch.nn.Module) or not {"base_model", "module", "_orig_mod"} & set(
        assistant._modules
    ):
        return
    if not isinstance(assistant, PreTrainedModel) and any(isinstance(m, JetFlowHead) for m in assistant.modules()):
        raise JetFlowError(
            f"`assistant_model` is a `{type(assistant).__name__}` around a draft head, but must be the head itself; "
            "pass `wrapper.merge_and_unload()` for peft, `wrapper.module` for parallel training, "
            "`wrapper._orig_mod` for `torch.compile`"
        )


def _num_given(input_ids: torch.Tensor, kwargs: dict[str, Any]) -> int:
    """Tokens of the prompt that are no part of `input_ids`: given as embeddings, or cached."""
    given = [kwargs.get(name) for name in ("attention_mask", "inputs_embeds")]
    return max([0, *(part.shape[1] - input_ids.shape[1] for part in given if isinstance(part, torch.Tensor))])


def check_pairing(model: PreTrainedModel, head: JetFlowHead) -> None:
    """
    Refuse a head that does not fit a target.

    Raises:
        JetFlowError: Naming what differs and what to load instead.
    """
    if model.config.is_encoder_decoder:
        raise JetFlowError(
            f"`{model.config.model_type}` is an encoder-decoder model; draft heads need a decoder-only target, "
            "generate without `assistant_model`"
        )
    config, text = head.config, model.config.get_text_config(decoder=True)
    made_for = (
        f"; this head was made for {config.target_name or config.target_model_type or 'another target'}, load that one"
    )
    borrows, embedding_width = not (config.own_embedding and config.own_lm_head), _embedding_width(model)
    if borrows and config.hidden_size == text.hidden_size and text.hidden_size != embedding_width:
        raise JetFlowError(
            f"the target's embeddings are {embedding_width} wide and its hidden states {text.hidden_size}, so this "
            "head cannot borrow them; load a head with embeddings of its own, or generate without `assistant_model`"
        )
    for name, of_head, of_target in (
        ("hidden size", config.target_hidden_size, text.hidden_size),
        ("embedding width", config.hidden_size if borrows else None, embedding_width),
        ("vocabulary size", config.vocab_size, text.vocab_size),
        ("number of layers", config.num_target_layers, text.num_hidden_layers),
    ):
        if of_head is not None and of_head != of_target:
            remedy = made_for
            if name == "vocabulary size":
                fix = (
                    f"set `head.config.vocab_size = {of_target}`"
                    if _can_follow(head, of_target)
                    else f"call `target.resize_token_embeddings({of_head})`"
                )
                remedy += f" instead; or, if the embeddings of that target were resized, {fix}"
            raise JetFlowError(
                f"the head expects a target with {name} {of_head}, but this target has {of_target}{remedy}"
            )
    assert config.hidden_state_indices is not None
    if max(config.hidden_state_indices) > text.num_hidden_layers:
        raise JetFlowError(
            f"the head taps `hidden_states` {config.hidden_state_indices}, but this target ends at "
            f"{text.num_hidden_layers}{made_for}"
        )


def _can_follow(head: JetFlowHead, vocab_size: int) -> bool:
    """Whether a head can draft for a vocabulary of another size: it has no rows of its own for all tokens, and
    borrows none that is gone."""
    config, token_ids = head.config, head.draft_token_ids
    if config.own_embedding or (config.own_lm_head and token_ids is None):
        return False
    borrowed = [config.mask_token_id or 0, 0 if token_ids is None else int(token_ids.max())]
    return max(borrowed) < vocab_size


def _embedding_width(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[-1]


# Settings that ask `generate` for another way of decoding, which heads would ignore.
OTHER_MODES = (
    "dola_layers",
    "penalty_alpha",
    "constraints",
    "force_words_ids",
    "use_mtp",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "speculation_type",
)


def check_mode(generation_config: GenerationConfig) -> None:
    """
    Refuse decoding modes other than greedy search and sampling, settings that would be ignored, and caches that cannot
    be rolled back, before `generate` makes one, which may need a further package.

    Raises:
        JetFlowError: Naming the setting and what to do.
    """
    mode, remedies = generation_config.get_generation_mode(), []
    if generation_config.num_beams is not None and generation_config.num_beams > 1:
        remedies = ["set `num_beams=1`"]
    for name in OTHER_MODES:
        # Without `top_k`, or when sampling, `penalty_alpha` means nothing to plain decoding either.
        if getattr(generation_config, name, None) is not None and (name != "penalty_alpha" or "contrastive" in mode):
            remedies.append(f"leave `{name}` unset")
    if not remedies and mode not in ("greedy_search", "sample"):
        remedies = [f"got {mode.value}"]
    if remedies:
        raise JetFlowError(
            f"draft heads work with greedy search and sampling only; {', '.join(remedies)}, or generate without "
            "`assistant_model`"
        )
    cache = generation_config.cache_implementation or ""
    if cache == "quantized" or cache.startswith("offloaded"):
        raise JetFlowError(unsupported_cache(f"`cache_implementation` {cache!r}"))


def check_call(model: PreTrainedModel, generation_config: GenerationConfig, synced_gpus: bool) -> None:
    """
    Refuse calls that the loop does not decode exactly yet.

    Raises:
        JetFlowError: Naming the setting and the workaround.
    """
    without = "generate without `assistant_model`"
    check_mode(generation_config)
    if not generation_config.use_cache:
        raise JetFlowError(f"draft heads need the target's cache; leave `use_cache` at True, or {without}")
    if synced_gpus:
        raise JetFlowError(f"draft heads do not decode in step with other processes (`synced_gpus`); {without}")
    mask_dtype(model)  # refuses attention that takes no tree masks


def check_processes(model: PreTrainedModel, head: JetFlowHead) -> None:
    """
    Refuse what processes that share a target could decide differently.

    Raises:
        JetFlowError: Naming the setting and the workaround.
    """
    if (model.tp_size or 1) > 1 and getattr(head.generation_config, "node_budget", None) == "auto":
        raise JetFlowError(
            "`node_budget` is 'auto', which goes by each process's own clock, but the processes of a tensor parallel "
            "target must verify the same tree; set `head.generation_config.node_budget` to a number, such as 16"
        )


AutoConfig.register("jetflow", JetFlowConfig)
AutoModel.register(JetFlowConfig, JetFlowHead)
