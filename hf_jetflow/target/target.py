"""`Target`: reads the prompt. Rounds are verified by [`PrefilledTarget`]; the head borrows [`TargetEmbeddings`]."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import Cache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.utils import ModelOutput

from .._compat import CACHE_NAME
from ..errors import JetFlowError
from ..head.configuration_jetflow import JetFlowConfig
from .caches import check_even_rows, check_padded_rows, check_target_cache
from .embeddings import TargetEmbeddings
from .layer_kinds import check_layers, layer_windows, takes_trees
from .positions import text_positions, without_padding
from .prefilled import PrefilledTarget, TargetStates
from .recurrent import check_states, has_states
from .slots import BatchSlots
from .step_inputs import check_step_inputs, read_step_inputs


class Target:
    """
    The frozen target, seen through the head's configuration.

    Args:
        model (`PreTrainedModel`): A decoder-only causal LM.
        head_config ([`JetFlowConfig`]): Says which states are tapped.
    """

    def __init__(self, model: PreTrainedModel, head_config: JetFlowConfig):
        self.model = model
        self.device = model.device  # of what is passed to it
        self.head_config = head_config
        self.embeddings = TargetEmbeddings(model, head_config.embedding_scale, head_config.mask_token_id)
        assert head_config.hidden_state_indices is not None
        self._tapped = head_config.hidden_state_indices
        # Given a list, early releases count from the first layer's output and keep no embedding output (see `taps`).
        wanted = {index + shift for index in self._tapped for shift in (-1, 0)}
        self._wanted_states: bool | list[int] = True if -1 in wanted else sorted(wanted)
        self._text_config = model.config.get_text_config(decoder=True)
        check_layers(model)
        self.windows = layer_windows(model)
        self.takes_trees = takes_trees(model)

    def prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        slots: BatchSlots,
        is_prompt: bool = True,
    ) -> tuple[PrefilledTarget, TargetStates]:
        """
        Run the prompt as plain decoding does (chunks, embeddings and an earlier cache included).

        Args:
            slots ([`BatchSlots`]): Of the batch; the prompts are counted as cached.
            is_prompt (`bool`): `False` reads the text so far into a new cache, as plain decoding does at a border (see
                `PositionLimits.fresh_at`).

        Returns:
            `PrefilledTarget`, and `TargetStates` of the prompt's rows without padding; logits of the last row only.
        """
        if self.device.type == "meta":  # accelerate brings the weights in for each module's forward
            self.device = input_ids.device
        cache = check_target_cache(model_kwargs.get(CACHE_NAME))
        if isinstance(cache, StaticCache):
            self._check_static(generation_config)
        wants_states = bool(generation_config.output_hidden_states)
        forward_kwargs: dict[str, Any] = {"output_hidden_states": wants_states or self._wanted_states}
        if generation_config.output_attentions:
            forward_kwargs["output_attentions"] = True
        check_step_inputs(self.model, input_ids, model_kwargs)
        with self._collected_features() as parts:
            outputs = (
                self.model._prefill(input_ids, generation_config, {**model_kwargs, **forward_kwargs})
                if is_prompt
                else self._step(input_ids, {**model_kwargs, **forward_kwargs})
            )
        # Adapters with virtual tokens bring a cache of their own, and few targets return none.
        cache = check_target_cache(getattr(outputs, CACHE_NAME, cache))
        check_states(cache)
        check_even_rows(cache)
        steps = read_step_inputs(self.model, input_ids, model_kwargs, outputs)
        features, num_cached = torch.cat([part for part, _ in parts], dim=1), int(cache.get_seq_length())
        batch, num_rows = features.shape[:2]
        # From the position of the next step; a target whose steps take none may still use them in its prefill.
        last = parts[-1][1] if steps.position_ids is None else steps.position_ids[..., -1] - 1
        last_positions, kind_offsets = text_positions(last, num_cached, batch)
        position_ids = (last_positions[:, None] + torch.arange(1 - num_rows, 1, device="cpu")).to(features.device)
        padding = None
        if model_kwargs.get("attention_mask") is not None:
            is_pad = model_kwargs["attention_mask"] == 0
            check_padded_rows(cache, is_pad)
            # An adapter's virtual tokens lie before the prompt's; a compressed cache holds fewer than were read.
            is_pad = pad(is_pad, (max(num_cached, num_rows) - is_pad.shape[1], 0))
            features, position_ids = without_padding(features, position_ids, is_pad[:, -num_rows:].to(features.device))
            padding = is_pad[:, -num_cached:]
        slots.fill(num_cached)
        prefilled = PrefilledTarget(
            self,
            cache,
            slots,
            offsets=last_positions + 1 - num_cached,
            kind_offsets=kind_offsets,
            padding=padding,
            step_inputs=steps,
            forward_kwargs=forward_kwargs,
            wants_states=wants_states,
            is_compiled=self._is_compiled(cache, generation_config, model_kwargs),
            compile_config=generation_config.compile_config,
        )
        states = TargetStates(
            logits=outputs.logits[:, -1:],
            taps=(features,),
            position_ids=position_ids,
            hidden_states=(outputs.hidden_states or ()) if wants_states else (),
            attentions=(outputs.attentions or ()) if generation_config.output_attentions else (),
        )
        return prefilled, states

    def _check_static(self, generation_config: GenerationConfig) -> None:
        if not self.takes_trees:
            raise JetFlowError(
                "this target verifies chains only, which are not supported with a static cache; leave "
                "`cache_implementation` unset, or generate without `assistant_model`"
            )
        if generation_config.output_attentions:
            raise JetFlowError(
                "`output_attentions` is not supported with draft trees in a static cache; leave "
                "`cache_implementation` unset, or generate without `assistant_model`"
            )

    def _is_compiled(self, cache: Cache, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> bool:
        """Whether verifies are compiled: where `generate` compiles, except with recurrent layers, whose forward is
        replaced by name."""
        if not isinstance(cache, StaticCache) or has_states(cache):
            return False
        return self.model._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _step(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> ModelOutput:
        """One step of plain decoding, as the model itself prepares it."""
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        return self.model(**inputs, return_dict=True)

    @contextmanager
    def _collected_features(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor | None]]]:
        """Collect (features, last positions) of every target forward inside; prefill may run several, by chunks."""
        parts: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        thread_id = threading.get_ident()

        def collect(_module: nn.Module, *call: Any) -> None:
            # Another thread may generate with the same target, and may find the hook before its `with_kwargs`.
            if threading.get_ident() != thread_id:
                return
            _args, kwargs, outputs = call
            position_ids = kwargs.get("position_ids")
            parts.append(
                (
                    torch.cat(self.taps(outputs.hidden_states), dim=-1),
                    None if position_ids is None else position_ids[..., -1],
                )
            )

        handle = self.model.register_forward_hook(collect, with_kwargs=True)
        try:
            yield parts
        finally:
            handle.remove()

    @torch.no_grad()
    def states(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (batch, seq, taps x hidden) and normed last hidden states of whole, right-padded sequences."""
        # The base model of few targets, such as llama4, goes by another name than its class says.
        body = self.model.base_model if self.model.base_model is not self.model else self.model.get_decoder()
        outputs = body(input_ids=input_ids, output_hidden_states=self._wanted_states, use_cache=False)
        return torch.cat(self.taps(outputs.hidden_states), dim=-1), outputs.last_hidden_state

    def taps(self, hidden_states: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """The tapped states, (batch, rows, target_hidden) each."""
        num_layers = self._text_config.num_hidden_layers
        shift = len(hidden_states) - 1 - num_layers  # -1 where index 0 is the first layer's
        if shift not in (-1, 0):
            raise JetFlowError(
                f"the target returns {len(hidden_states)} hidden states, but its configuration has "
                f"{num_layers} layers, so a draft head cannot tell which it listens to; generate without "
                "`assistant_model`"
            )
        states = [hidden_states[index + shift] for index in self._tapped]
        if states[0].ndim == 4:  # gemma3n runs several streams beside each other; this one becomes the output
            states = [state[self._text_config.altup_active_idx] for state in states]
        return states
