"""`PrefilledTarget`: a target whose cache holds the prompts. `verify` runs it over the draft trees of a round.

Masks are in `masks.py`, what rounds do with the cache in `strategies.py`, other inputs of a forward in
`step_inputs.py`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache
from transformers.utils import ModelOutput

from .._compat import CACHE_NAME
from ..laid_out import LaidOutWeights
from ..transfer import to_device
from ..trees.tree import DraftTree
from .attention import grouped_attention, mask_dtype
from .laid_out import laid_out_target
from .layer_kinds import scaling_step
from .masks import by_kind, padding_mask, static_inputs, tree_masks
from .mixer_layers import tree_mixers
from .position_limits import position_limits
from .slots import BatchSlots
from .step_inputs import StepInputs
from .strategies import cache_strategy


if TYPE_CHECKING:
    from .target import Target


MAX_GRAPHS = 256  # of one captured function: a graph for each node budget and size of the head's cache


@dataclass
class TargetStates:
    """Results of a target forward."""

    logits: torch.Tensor  # (batch, rows, vocab)
    # After a verify one tensor per tap, (batch, rows, target_hidden): they are joined once the path is selected. After
    # the prefill one tensor, with all taps joined.
    taps: tuple[torch.Tensor, ...]
    position_ids: torch.Tensor  # (batch, rows), positions of the features
    hidden_states: tuple[torch.Tensor, ...] = ()  # all layers, where the caller asked for them
    attentions: tuple[torch.Tensor, ...] = ()  # likewise

    @property
    def features(self) -> torch.Tensor:
        """(batch, rows, taps x target_hidden)."""
        return torch.cat(self.taps, dim=-1)


@dataclass
class PrefilledTarget:
    """A target behind the prompts of one generation. `Target.prefill` makes it."""

    target: "Target"
    cache: DynamicCache | StaticCache  # holds the prompts
    slots: BatchSlots
    offsets: torch.Tensor  # (batch,) position of a token minus its index in the cache, on the host
    kind_offsets: torch.Tensor | None = None  # (kinds, batch) where there are several kinds of positions
    padding: torch.Tensor | None = None  # (batch, cached at prefill) bool, where a prompt was padded
    step_inputs: StepInputs = field(default_factory=StepInputs)  # what plain decoding passes to every step
    forward_kwargs: dict[str, Any] = field(default_factory=dict)
    wants_states: bool = False  # the caller asked for hidden states
    is_compiled: bool = False  # `generate` would compile the target's forward
    compile_config: CompileConfig | None = None
    weights: LaidOutWeights = field(default_factory=LaidOutWeights)  # that forwards read instead of the model's own

    def __post_init__(self) -> None:
        model = self.target.model
        mixers = tree_mixers(model, self.cache) if self.target.takes_trees else []
        self.strategy = cache_strategy(self.cache, self.slots, mixers, self._forward)
        self._static_inputs: Callable = static_inputs
        if self.is_compiled:
            self.strategy.capture(self.captured)
            self._static_inputs = self.captured(static_inputs, dynamic=True)
        self.mask_dtype = mask_dtype(model)
        # Early releases of transformers hand on a mask of ones, which hides nothing.
        self._is_padded = self.padding is not None and bool(self.padding.any())
        self._scaling_step, self._position_limits = scaling_step(model), position_limits(model)
        self._copied: tuple[torch.Tensor, torch.Tensor] | None = None  # lengths, and their `lengths_and_positions`

    @property
    def positions(self) -> torch.Tensor:
        """Absolute positions of the anchors of the active sequences, (active,)."""
        return self.slots.lengths + self.offsets[self.slots.active]

    def lengths_and_positions(self, device: torch.device) -> torch.Tensor:
        """Cached tokens and anchor positions of the active sequences, (2, active), copied once per round."""
        lengths, known = self.slots.lengths, self._copied
        if known is None or known[0] is not lengths or known[1].device != device:
            known = self._copied = (lengths, to_device(torch.stack([lengths, self.positions]), device))
        return known[1]

    @property
    def padding_of_active(self) -> torch.Tensor | None:
        """Padding of the prompts of the active sequences, (active, cached at prefill), on the target's device; `None`
        where no prompt was padded."""
        if self.padding is None or not self._is_padded:
            return None
        return self.padding[to_device(self.slots.active, self.padding.device)].to(self.target.device)

    def forward_of(self, model: PreTrainedModel) -> Callable:
        """The model's call, compiled by transformers' own means where `generate` would."""
        return model.get_compiled_call(self.compile_config) if self.is_compiled else model

    def captured(self, function: Callable, dynamic: bool = False) -> Callable:
        """A function without data-dependent shapes, compiled as the target's forward is; `dynamic`: once for all
        sizes."""
        settings = (self.compile_config or CompileConfig()).to_dict() | {"dynamic": dynamic}
        compiled = torch.compile(function, **settings)
        raised_limit = torch._dynamo.config.patch(cache_size_limit=MAX_GRAPHS)  # its name in all releases of torch

        def call(*args: Any) -> Any:
            with raised_limit:
                return compiled(*args)

        return call

    @property
    def max_depth(self) -> int | None:
        """Depth that the next round can draft; `None` if any."""
        positions = self.positions
        # Some tables and caches are indexed by cache index.
        anchors = {*positions.tolist(), *self.slots.lengths.tolist()}
        if self.kind_offsets is not None:
            anchors.update((self.kind_offsets[:, self.slots.active] + positions).flatten().tolist())
        limits = [self._position_limits.max_depth(anchor) for anchor in anchors]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def max_nodes(self) -> int | None:
        """Nodes that a round can verify; `None` if any number."""
        limits = [] if self.strategy.max_nodes is None else [self.strategy.max_nodes]
        if self._scaling_step is not None:  # inside one scaling step, cache index and depth give the same scale
            limits.append(self._scaling_step - (int(self.slots.lengths) + 1) % self._scaling_step)
        return min(limits, default=None)

    def needs_fresh_cache(self, num_tokens: int) -> bool:
        """Whether plain decoding's next step, with `num_tokens` of text, starts a new cache; never in a batch."""
        fresh_at = self._position_limits.fresh_at
        return fresh_at is not None and num_tokens > fresh_at and self.slots.lengths.tolist() == [fresh_at]

    def lay_out(self, is_wanted: bool | None, version: int) -> None:
        """Let verifies read copies of the weights that are laid out for the CPU's kernels; see `laid_out_target`."""
        if not self.is_compiled:  # the compiler lays weights out itself
            self.weights = laid_out_target(self.target.model, is_wanted, version)

    def verify(self, tree: DraftTree) -> TargetStates:
        """One target forward over all nodes; their keys and values lie in the cache until `commit`."""
        self.strategy.prepare()
        outputs, nodes = self._forward(tree), tree.num_nodes
        return TargetStates(
            logits=outputs.logits[:, :nodes],
            taps=tuple(states[:, :nodes] for states in self.target.taps(outputs.hidden_states)),
            position_ids=self._node_positions(tree),
            hidden_states=outputs.hidden_states if self.wants_states else (),
            attentions=(outputs.attentions or ()) if "output_attentions" in self.forward_kwargs else (),
        )

    def _node_positions(self, tree: DraftTree) -> torch.Tensor:
        """Absolute positions of the nodes, (active, nodes)."""
        device = self.target.device
        return self.lengths_and_positions(device)[1, :, None] + tree.depths.to(device)

    def _forward(self, tree: DraftTree) -> ModelOutput:
        """The model's forward over all nodes, and padding with a static cache."""
        model, device = self.target.model, self.target.device
        input_ids, position_ids, mask = self._inputs(tree)
        if self.kind_offsets is not None:
            position_ids = to_device(self.kind_offsets[:, self.slots.active, None], device) + position_ids
        is_grouped = position_ids.shape[-1] > 1
        attention = grouped_attention(model) if is_grouped else nullcontext()
        with attention, self.strategy.reading(tree), self.weights.in_use():
            return self.forward_of(model)(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=None if self.step_inputs.position_ids is None else position_ids,
                use_cache=True,
                return_dict=True,
                **{CACHE_NAME: self.cache},
                **self.forward_kwargs,
                **self.step_inputs.keywords(self.slots.active, input_ids.shape[1]),
            )

    def _inputs(self, tree: DraftTree) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Ids and positions (active, rows), and what the model takes as masks."""
        device, capacity = self.target.device, self.strategy.capacity
        if capacity is None:
            mask = (tree_masks if self.target.takes_trees else padding_mask)(self, tree)
            return tree.tokens.to(device), self._node_positions(tree), mask
        nodes = tree.tokens[0].to(device), tree.parents[0].to(device), tree.depths[0].to(device)
        lengths_and_positions, windows = self.lengths_and_positions(device), self.target.windows
        sizes = self.strategy.num_rows(tree.num_nodes), capacity, tree.max_depth
        inputs = self._static_inputs(
            nodes, lengths_and_positions, self.padding_of_active, sizes, tuple(windows.values()), self.mask_dtype
        )
        # Copied: a CUDA graph overwrites its outputs when another one runs.
        ids_and_positions, *masks = (each.clone() for each in inputs) if self.is_compiled else inputs
        return *ids_and_positions.unbind(), by_kind(dict(zip(windows, masks, strict=True)))
