"""The door: how `model.generate(assistant_model=head)` reaches our loop.

`generate` looks its decoding loop up on the class, so two methods of `GenerationMixin` are wrapped once: the early
validation, to say what is wrong with a pairing, and the assisted loop, to dispatch heads to ours. The function by
which pipelines load their assistant is wrapped to load heads. Every other assistant goes through untouched.
`custom_generate=head.custom_generate` needs no wrap at all.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.pipelines import base as pipelines
from transformers.utils import logging

from ._compat import CACHE_NAME
from .decoding.batching import reason_to_step_together
from .decoding.loop import decode
from .head.configuration_jetflow import JetFlowConfig
from .head.modeling_jetflow import JetFlowHead
from .stats import GenerationStats
from .target.attention import mask_dtype


logger = logging.get_logger(__name__)
_ORIGINALS: dict[tuple[Any, str], Callable] = {}  # what is wrapped, while the dispatch is installed


def enable() -> None:
    """Let `generate` take a [`JetFlowHead`] as `assistant_model`. Done on import; calling it again changes nothing."""
    if _ORIGINALS:
        return
    for place, name, wrap in (
        (GenerationMixin, "_assisted_decoding", _dispatching),
        (GenerationMixin, "_validate_generation_mode", _validating),
        (pipelines, "load_assistant_model", _loading),
    ):
        original = _ORIGINALS[place, name] = getattr(place, name)
        setattr(place, name, wrap(original))


def disable() -> None:
    """Take the dispatch out again: everything is then as transformers made it."""
    while _ORIGINALS:
        (place, name), original = _ORIGINALS.popitem()
        setattr(place, name, original)


def _dispatching(original: Callable) -> Callable:
    @functools.wraps(original)  # generate reads the signature
    def _assisted_decoding(self: PreTrainedModel, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(kwargs.get("assistant_model"), JetFlowHead):
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
        if isinstance(kwargs.get("assistant_model"), JetFlowHead):
            check_pairing(self, kwargs["assistant_model"])
            check_mode(generation_config)
            # As the plain call whose text it gives: stateful targets and several sequences are refused in assisted
            # generation only.
            kwargs = {name: value for name, value in kwargs.items() if name != "assistant_model"}
            generation_mode = generation_config.get_generation_mode()
        return original(self, generation_mode, generation_config, kwargs)

    return _validate_generation_mode


def _loading(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_assistant_model(model: PreTrainedModel, assistant_model: Any, assistant_tokenizer: Any) -> Any:
        """A head, loaded or by its name, comes without a tokenizer: it drafts the target's own token ids."""
        head = assistant_model
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
    if len(input_ids) > 1:
        parts = (kwargs["logits_processor"], kwargs["stopping_criteria"], generation_config)
        reason = reason_to_step_together(model, *parts, kwargs.get(CACHE_NAME))
        if reason is not None:
            logger.warning_once(f"this batch is decoded plainly, without the draft head: {reason}.")
            head.last_stats = GenerationStats(policy={"plain": reason})
            return model._sample(input_ids, **kwargs)
    return decode(model, head, input_ids, **kwargs)


def check_pairing(model: PreTrainedModel, head: JetFlowHead) -> None:
    """
    Refuse a head that does not fit a target.

    Raises:
        ValueError: Naming what differs and what to load instead.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"`{model.config.model_type}` is an encoder-decoder model; draft heads need a decoder-only target, "
            "generate without `assistant_model`"
        )
    config, text = head.config, model.config.get_text_config(decoder=True)
    made_for = (
        f"; this head was made for {config.target_name or config.target_model_type or 'another target'}, load that one"
    )
    borrows, embedding_width = not (config.own_embedding and config.own_lm_head), _embedding_width(model)
    if borrows and embedding_width != text.hidden_size == config.hidden_size:
        raise ValueError(
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
            raise ValueError(
                f"the head expects a target with {name} {of_head}, but this target has {of_target}{made_for}"
            )
    assert config.hidden_state_indices is not None
    if max(config.hidden_state_indices) > text.num_hidden_layers:
        raise ValueError(
            f"the head listens to `hidden_states` {config.hidden_state_indices}, but this target ends at "
            f"{text.num_hidden_layers}{made_for}"
        )


def _embedding_width(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[-1]


def check_mode(generation_config: GenerationConfig) -> None:
    """
    Refuse decoding modes other than greedy search and sampling; `generate` would run beams without the head.

    Raises:
        ValueError: Naming the way round.
    """
    if generation_config.num_beams > 1:
        raise ValueError(
            "draft heads work with greedy search and sampling only; set `num_beams=1`, or generate without "
            "`assistant_model`"
        )


def check_call(model: PreTrainedModel, generation_config: GenerationConfig, synced_gpus: bool) -> None:
    """
    Refuse calls that the loop does not decode exactly yet.

    Raises:
        ValueError: Naming the setting and the way round.
    """
    without = "generate without `assistant_model`"
    check_mode(generation_config)
    if not generation_config.use_cache:
        raise ValueError(f"draft heads need the target's cache; leave `use_cache` at True, or {without}")
    if synced_gpus:
        raise ValueError(f"draft heads do not decode in step with other processes (`synced_gpus`); {without}")
    mask_dtype(model)


def check_processes(model: PreTrainedModel, head: JetFlowHead) -> None:
    """
    Refuse what processes that share a target could decide differently.

    Raises:
        ValueError: Naming the setting and the way round.
    """
    if (model.tp_size or 1) > 1 and getattr(head.generation_config, "node_budget", None) == "auto":
        raise ValueError(
            "`node_budget` is 'auto', which goes by each process's own clock, but the processes of a tensor parallel "
            "target must verify the same tree; set `head.generation_config.node_budget` to a number, such as 16"
        )


AutoConfig.register("jetflow", JetFlowConfig)
AutoModel.register(JetFlowConfig, JetFlowHead)
