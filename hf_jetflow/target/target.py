"""`Target`: runs the frozen target.

Masks are in `masks.py`, positions in `positions.py`, the other inputs of a step in `step_inputs.py`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import CompileConfig, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.utils import ModelOutput

from .._compat import CACHE_NAME
from ..head.configuration_jetflow import JetFlowConfig
from ..transfer import to_device
from ..trees.tree import DraftTree
from .adapters import AdapterNames
from .attention import grouped_attention, mask_dtype
from .batch_caches import BatchRows
from .caches import check_even_rows, check_padded_rows, check_target_cache
from .layer_kinds import layer_windows, scaling_step, takes_trees
from .masks import padding_mask, tree_masks
from .mixer_adapters import tree_mixers
from .position_limits import PositionLimits, position_limits
from .positions import text_positions, without_padding
from .recurrent import check_states
from .step_inputs import StepInputs, check_step_inputs, read_step_inputs
from .strategies import CacheStrategy, cache_strategy


@dataclass
class TargetStates:
    """What a target forward leaves behind."""

    logits: torch.Tensor  # (batch, rows, vocab)
    taps: tuple[torch.Tensor, ...]  # (batch, rows, target_hidden) per tap after a verify, all in one after the prefill
    position_ids: torch.Tensor  # (batch, rows), positions of the features
    hidden_states: tuple[torch.Tensor, ...] = ()  # all layers, where the caller asked for them
    attentions: tuple[torch.Tensor, ...] = ()  # likewise

    @property
    def features(self) -> torch.Tensor:
        """(batch, rows, taps x target_hidden)."""
        return torch.cat(self.taps, dim=-1)


@dataclass
class Context:
    """The target's side of a generation."""

    strategy: CacheStrategy  # owns the cache
    offsets: torch.Tensor  # (batch,) position of a token minus its index in the cache, on the host
    padding: torch.Tensor | None = None  # (batch, cached at prefill) bool, where a prompt was padded
    wants_states: bool = False  # the caller asked for hidden states
    forward_kwargs: dict[str, Any] = field(default_factory=dict)
    is_compiled: bool = False  # `generate` would compile the target's forward
    compile_config: CompileConfig | None = None
    kind_offsets: torch.Tensor | None = None  # (kinds, batch) where there are several kinds of positions
    step_inputs: StepInputs = field(default_factory=StepInputs)  # what plain decoding passes to every step
    mask_dtype: torch.dtype = torch.bool  # see `attention.mask_dtype`
    scaling_step: int | None = None  # see `layer_kinds.scaling_step`
    position_limits: PositionLimits = field(default_factory=PositionLimits)
    _positions: tuple[torch.Tensor, torch.Tensor] | None = None  # lengths, and the positions that go with them
    _on_device: tuple[torch.Tensor, torch.Tensor] | None = None  # lengths, and what `on_device` returns for them

    @property
    def cache(self) -> DynamicCache | StaticCache:
        return self.strategy.cache

    @property
    def rows(self) -> BatchRows:
        return self.strategy.rows

    @property
    def positions(self) -> torch.Tensor:
        """Absolute positions of the anchors of the active sequences, (batch,)."""
        lengths, known = self.rows.lengths, self._positions
        if known is None or known[0] is not lengths:  # every step of a round asks
            known = self._positions = (lengths, lengths + self.offsets[self.rows.decoded])
        return known[1]

    def on_device(self, device: torch.device) -> torch.Tensor:
        """Cached tokens and anchor positions of the active sequences, (2, batch), copied once per round."""
        lengths, known = self.rows.lengths, self._on_device
        if known is None or known[0] is not lengths or known[1].device != device:
            known = self._on_device = (lengths, to_device(torch.stack([lengths, self.positions]), device))
        return known[1]

    def forward_of(self, model: PreTrainedModel) -> Callable:
        """The model's call, compiled by transformers' own means where `generate` would."""
        return model.get_compiled_call(self.compile_config) if self.is_compiled else model

    @property
    def max_depth(self) -> int | None:
        """Depth that the next round can draft; `None` if any."""
        positions = self.positions
        anchors = {
            *positions.tolist(),
            *self.rows.lengths.tolist(),
        }  # some tables and caches are indexed by cache index
        if self.kind_offsets is not None:
            anchors.update((self.kind_offsets[:, self.rows.decoded] + positions).flatten().tolist())
        limits = [self.position_limits.max_depth(anchor) for anchor in anchors]
        return min((limit for limit in limits if limit is not None), default=None)

    def needs_fresh_cache(self, num_tokens: int) -> bool:
        """Whether plain decoding's next step, with `num_tokens` of text, starts a new cache; never in a batch."""
        fresh_at = self.position_limits.fresh_at
        return fresh_at is not None and num_tokens > fresh_at and self.rows.lengths.tolist() == [fresh_at]

    @property
    def max_nodes(self) -> int | None:
        """Nodes that a round can verify; `None` if any number."""
        limits = [] if self.strategy.max_nodes is None else [self.strategy.max_nodes]
        if self.scaling_step is not None:  # inside one scaling step, cache index and depth give the same scale
            limits.append(self.scaling_step - (int(self.rows.lengths) + 1) % self.scaling_step)
        return min(limits, default=None)


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
        assert head_config.hidden_state_indices is not None
        self._tapped = head_config.hidden_state_indices
        # Given a list, early releases count from the first layer's output and keep no embedding output (see `_taps`).
        wanted = {index + shift for index in self._tapped for shift in (-1, 0)}
        self._wanted_states: bool | list[int] = -1 in wanted or sorted(wanted)
        self._text_config = model.config.get_text_config(decoder=True)
        self._windows = layer_windows(model)
        self._takes_trees = takes_trees(model)

    def prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_prompt: bool = True,
    ) -> tuple[Context, TargetStates]:
        """
        Run the prompt as plain decoding does (chunks, embeddings and an earlier cache included).

        Args:
            is_prompt (`bool`): `False` reads the text so far into a new cache, as plain decoding does at a border (see
                `PositionLimits.fresh_at`).

        Returns:
            `Context` and the `TargetStates` of the prompt's rows, padding left out; logits of the last row only.
        """
        if self.device.type == "meta":  # accelerate brings the weights in for each module's forward
            self.device = input_ids.device
        cache = check_target_cache(model_kwargs.get(CACHE_NAME))
        if isinstance(cache, StaticCache) and not self._takes_trees:
            raise ValueError(
                "this target verifies chains only, which are not supported with a static cache; leave "
                "`cache_implementation` unset, or generate without `assistant_model`"
            )
        wants_states = bool(generation_config.output_hidden_states)
        forward_kwargs: dict[str, Any] = {"output_hidden_states": wants_states or self._wanted_states}
        if generation_config.output_attentions:
            if isinstance(cache, StaticCache):
                raise ValueError(
                    "`output_attentions` is not supported with draft trees in a static cache; leave "
                    "`cache_implementation` unset, or generate without `assistant_model`"
                )
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
        features = torch.cat([part for part, _ in parts], dim=1)
        batch, num_rows = features.shape[:2]
        num_cached = int(cache.get_seq_length())
        last = parts[-1][1] if steps.position_ids is None else steps.position_ids[..., -1] - 1
        last_positions, kind_offsets = text_positions(last, num_cached, batch)
        position_ids = (last_positions[:, None] + torch.arange(1 - num_rows, 1, device="cpu")).to(features.device)
        is_padding = None
        if model_kwargs.get("attention_mask") is not None:
            is_padding = model_kwargs["attention_mask"] == 0
            check_padded_rows(cache, is_padding)
            # An adapter's virtual tokens lie before the prompt's; a compressed cache holds fewer than were read.
            is_padding = pad(is_padding, (max(num_cached, num_rows) - is_padding.shape[1], 0))
            is_pad = is_padding[:, -num_rows:].to(features.device)
            features, position_ids = without_padding(features, position_ids, is_pad)
            is_padding = is_padding[:, -num_cached:]
        names = AdapterNames(self.model) if batch > 1 else None
        rows = BatchRows(batch, num_cached, names)
        mixers = tree_mixers(self.model, cache) if self._takes_trees else []
        strategy = cache_strategy(cache, rows, mixers, lambda chain: self._read(context, chain))
        context = Context(strategy, last_positions + 1 - num_cached, is_padding, wants_states, forward_kwargs)
        context.scaling_step, context.kind_offsets = scaling_step(self.model), kind_offsets
        context.step_inputs, context.mask_dtype = steps, mask_dtype(self.model)
        context.position_limits = position_limits(self.model)
        if isinstance(cache, StaticCache) and not mixers:  # their forward is replaced by name
            context.is_compiled = self.model._valid_auto_compile_criteria(model_kwargs, generation_config)
            context.compile_config = generation_config.compile_config
        states = TargetStates(
            logits=outputs.logits[:, -1:],
            taps=(features,),
            position_ids=position_ids,
            hidden_states=(outputs.hidden_states or ()) if wants_states else (),
            attentions=(outputs.attentions or ()) if generation_config.output_attentions else (),
        )
        return context, states

    def _step(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> ModelOutput:
        """One step of plain decoding, as the model itself prepares it."""
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        return self.model(**inputs, return_dict=True)

    @contextmanager
    def _collected_features(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor | None]]]:
        """Collects (features, last positions) of every target forward inside; prefill may run several, by chunks."""
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
                    torch.cat(self._taps(outputs.hidden_states), dim=-1),
                    None if position_ids is None else position_ids[..., -1],
                )
            )

        handle = self.model.register_forward_hook(collect, with_kwargs=True)
        try:
            yield parts
        finally:
            handle.remove()

    def verify(self, context: Context, tree: DraftTree) -> TargetStates:
        """One target forward over all nodes; their keys and values lie in the cache until `commit`."""
        context.strategy.prepare()
        outputs = self._read(context, tree)
        nodes = tree.num_nodes
        return TargetStates(
            logits=outputs.logits[:, :nodes],
            taps=tuple(states[:, :nodes] for states in self._taps(outputs.hidden_states)),
            position_ids=self._node_positions(context, tree),
            hidden_states=outputs.hidden_states if context.wants_states else (),
            attentions=(outputs.attentions or ()) if "output_attentions" in context.forward_kwargs else (),
        )

    def _node_positions(self, context: Context, tree: DraftTree) -> torch.Tensor:
        """Absolute positions of the nodes, (places, nodes)."""
        return context.on_device(self.device)[1, :, None] + tree.depths.to(self.device)

    def _read(self, context: Context, tree: DraftTree) -> ModelOutput:
        """The model's forward over all nodes, and padding with a static cache."""
        num_pad = context.strategy.num_rows(tree.num_nodes) - tree.num_nodes
        position_ids = self._node_positions(context, tree)
        position_ids = torch.cat([position_ids, position_ids[:, :1].expand(-1, num_pad)], dim=1)
        if context.kind_offsets is not None:
            offsets = context.kind_offsets[:, context.rows.decoded, None]
            position_ids = to_device(offsets, self.device) + position_ids
        if self._takes_trees:
            masks = tree_masks(context, tree, self._windows, context.mask_dtype, self.device)
        else:
            masks = padding_mask(context, tree.num_nodes, self.device)
        is_grouped = position_ids.shape[-1] > 1
        with grouped_attention(self.model) if is_grouped else nullcontext(), context.strategy.reading(tree):
            return context.forward_of(self.model)(
                input_ids=pad(tree.tokens.to(self.device), (0, num_pad)),
                attention_mask=masks,
                position_ids=None if context.step_inputs.position_ids is None else position_ids,
                use_cache=True,
                return_dict=True,
                **{CACHE_NAME: context.cache},
                **context.forward_kwargs,
                **context.step_inputs.keywords(context.rows.decoded, tree.num_nodes + num_pad),
            )

    @torch.no_grad()
    def states(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (batch, seq, taps x hidden) and normed last hidden states of whole, right-padded sequences."""
        # The base model of few targets, such as llama4, goes by another name than its class says.
        body = self.model.base_model if self.model.base_model is not self.model else self.model.get_decoder()
        outputs = body(input_ids=input_ids, output_hidden_states=self._wanted_states, use_cache=False)
        return torch.cat(self._taps(outputs.hidden_states), dim=-1), outputs.last_hidden_state

    def _taps(self, hidden_states: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """The tapped states, (batch, rows, target_hidden) each."""
        num_layers = self._text_config.num_hidden_layers
        shift = len(hidden_states) - 1 - num_layers  # -1 where index 0 is the first layer's
        if shift not in (-1, 0):
            raise ValueError(
                f"the target returns {len(hidden_states)} hidden states, but its configuration has "
                f"{num_layers} layers, so a draft head cannot tell which it listens to; generate without "
                "`assistant_model`"
            )
        states = [hidden_states[index + shift] for index in self._tapped]
        if states[0].ndim == 4:  # gemma3n runs several streams beside each other; this one becomes the output
            states = [state[self._text_config.altup_active_idx] for state in states]
        return states

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The target's embeddings of tokens, (..., hidden), scaled as the head was trained with."""
        module, scale = self.model.get_input_embeddings(), self.head_config.embedding_scale
        return module(input_ids) if scale is None else nn.functional.embedding(input_ids, module.weight) * scale

    def embed_block(
        self, input_ids: torch.Tensor, is_anchor: torch.Tensor, mask_embedding: torch.Tensor | None
    ) -> torch.Tensor:
        """Input rows of the head, (batch, rows, hidden): `input_ids` where `is_anchor`, MASK elsewhere."""
        if mask_embedding is None:
            assert self.head_config.mask_token_id is not None
            return self.embed(torch.where(is_anchor, input_ids, self.head_config.mask_token_id))
        embeds = self.embed(input_ids)
        return torch.where(is_anchor[..., None], embeds, mask_embedding.to(embeds))

    def output_rows(self, token_ids: torch.Tensor | None) -> torch.Tensor | None:
        """
        Rows (draft_vocab, hidden) of the target's output embedding; `None` where it is not a plain linear layer, or
        its weight is quantized, sharded or not in memory.
        """
        module = self.model.get_output_embeddings()
        if type(module) is not nn.Linear or module.bias is not None:
            return None
        if type(module.weight) is not nn.Parameter or module.weight.is_meta:
            return None
        return module.weight if token_ids is None else module.weight[token_ids.to(module.weight.device)]

    def plain_output_rows(self, token_ids: torch.Tensor | None) -> torch.Tensor:
        """`output_rows`, for uses that cannot do without them."""
        rows = self.output_rows(token_ids)
        if rows is None:
            kind = type(self.model.get_output_embeddings()).__name__
            raise ValueError(
                f"the target's output embedding is a `{kind}`, but the loss needs a plain linear layer without bias; "
                "load the target unquantized"
            )
        return rows

    def output_logits(self, rows: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """Logits (..., draft_vocab) by the target's own output module, whatever it is (quantized, biased, ...)."""
        logits = self.model.get_output_embeddings()(rows)
        return logits if token_ids is None else logits[..., token_ids.to(logits.device)]
