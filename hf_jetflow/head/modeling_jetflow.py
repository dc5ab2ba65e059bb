"""`JetFlowHead`: the causal parallel draft head (arXiv 2606.18394, section 3).

One forward reads a block `[anchor, MASK, ..., MASK]` against the target's context features and yields a hidden row per
drafted depth. It knows nothing about trees, targets or the decoding loop. Saved as remote code, this file is copied
together with the files of this folder that it imports, so all imports between them have the form `from .x import y`.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from .branch_correction import BranchCorrection, ZeroLinear
from .cache import HeadCache
from .checkpoint_files import (
    SETTINGS,
    WEIGHT_PATTERNS,
    check_loaded_tensors,
    locate,
    read_config,
    read_tensors,
    readable_load_errors,
)
from .configuration_jetflow import JetFlowConfig
from .decoder_layers import JetFlowDecoderLayer
from .formats import read_head, recognize
from .masks import additive_mask, visibility
from .path_scorers import RecurrentCorrection, Refiner, TreeFlashCorrection
from .rotary import DraftRotaryEmbedding
from .scorers import Markov, RecurrentMarkov, Selector, StepScorer, TableScorer


FLOAT16_TAP_LIMIT = 64.0  # largest value in float16 taps before the fusion; its sums must stay below 65504
# By `config.branch_correction`. "treeflash" is missing: it alone shares a module with the head, see `make_scorer`.
SCORERS: dict[str, Callable[[JetFlowConfig], StepScorer | TableScorer]] = {
    "parent": BranchCorrection,
    "path": BranchCorrection,
    "selector": Selector,
    "markov": Markov,
    "gated": Markov,
    "rnn": RecurrentMarkov,
    "gru": RecurrentCorrection,
    "refiner": Refiner,
}


def make_scorer(config: JetFlowConfig, norm: nn.Module) -> Any:
    """The branch scorer of a head with this final norm, a [`StepScorer`] or a [`TableScorer`]; `None` without one."""
    kind = config.branch_correction
    if kind is None:
        return None
    return TreeFlashCorrection(config, norm) if kind == "treeflash" else SCORERS[kind](config)


class _ThreadResults(threading.local):
    """What a thread's latest `generate` call left behind; gone with the thread. Copies of a head start without."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _ThreadResults, ()


class JetFlowHead(PreTrainedModel):
    r"""
    The draft head. It borrows the target's embedding and output embedding, unless its checkpoint holds its own.

    Pass it to `generate` as `assistant_model=head`. `head.generation_config` holds `node_budget` (rows the target
    verifies per round, root included), `max_depth` (1 .. `config.block_size - 1`) and the other settings of
    docs/usage.md; after a call `head.last_stats` holds its [`GenerationStats`]. With `head.record_trees = True` before
    it, `head.last_trees` holds its draft trees, a list of [`~tree_log.TreeRound`]. `head.custom_generate`, which
    `integration.py` adds, is another way to pass it.

    Args:
        config ([`JetFlowConfig`]): The head's configuration. The weights are random until loaded or trained.

    Example:

    ```python
    head = JetFlowHead.from_pretrained("examples/heads/smollm2-135m-instruct")
    target.generate(**inputs, assistant_model=head)
    ```
    """

    config_class = JetFlowConfig
    config: JetFlowConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["JetFlowDecoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: JetFlowConfig):
        super().__init__(config)
        assert config.hidden_state_indices is not None
        assert config.target_hidden_size is not None
        num_taps = len(config.hidden_state_indices)
        has_fc, mixes = config.context_fusion != "layers", config.context_fusion != "fc"
        self.fc = nn.Linear(num_taps * config.target_hidden_size, config.hidden_size, bias=False) if has_fc else None
        self.layer_fusion_weights = nn.Parameter(torch.zeros(config.num_hidden_layers, num_taps)) if mixes else None
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(JetFlowDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DraftRotaryEmbedding(config)
        self.mask_embedding = nn.Parameter(torch.zeros(config.hidden_size)) if config.mask_token_id is None else None
        self.branch_correction = make_scorer(config, self.norm)
        inputs = config.confidence_inputs
        self.confidence_head = nn.Linear(inputs, 1) if inputs is not None else None
        num_scored = config.draft_vocab_size or config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if config.own_embedding else None
        self.lm_head = nn.Linear(config.hidden_size, num_scored, bias=False) if config.own_lm_head else None
        if config.draft_vocab_size is not None:
            # Target ids of the draft vocabulary, ascending, (draft_vocab_size,); int64 and saved with the weights.
            self.register_buffer("d2t", torch.arange(config.draft_vocab_size))
        self.generation_config = GenerationConfig(node_budget=64, max_depth=config.block_size - 1, width=None)
        self._newest_stats: Any = None
        self._newest_trees: Any = None
        self._thread_results = _ThreadResults()
        self._weights_version = 0  # see `weights_changed`
        self.record_trees = False
        self.round_observers: list[Callable[[Any], None]] = []  # each is called with every finished `tree_log.Round`
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, JetFlowHead) and module.mask_embedding is not None:
            nn.init.normal_(module.mask_embedding, std=self.config.initializer_range)
        if isinstance(module, ZeroLinear):
            nn.init.zeros_(module.weight)

    @property
    def last_stats(self) -> Any:
        """[`GenerationStats`] of this thread's latest `generate` call; of any thread's where this one made none."""
        return getattr(self._thread_results, "stats", self._newest_stats)

    @last_stats.setter
    def last_stats(self, stats: Any) -> None:
        self._newest_stats = self._thread_results.stats = stats

    @property
    def last_trees(self) -> Any:
        """List of [`~tree_log.TreeRound`] of the same call; `None` unless `record_trees` was on."""
        return getattr(self._thread_results, "trees", self._newest_trees)

    @last_trees.setter
    def last_trees(self, rounds: Any) -> None:
        self._newest_trees = self._thread_results.trees = rounds

    def weights_changed(self) -> None:
        """
        Drop all copies of weights, the head's and the target's, that drafting has made.

        Every generate call compares checksums of all weights, so training, loading and writing in place need no call
        of this. Call it after a change that leaves the checksums equal.
        """
        self._weights_version += 1

    @property
    def draft_token_ids(self) -> torch.Tensor | None:
        """Target ids that the head scores, (draft_vocab_size,); `None` when it scores the whole vocabulary."""
        return self.d2t if self.config.draft_vocab_size is not None else None

    def get_input_embeddings(self) -> nn.Module | None:
        """The head's own embedding; `None` if it borrows the target's. FSDP calls this."""
        return self.embed_tokens

    def shape_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and soft-cap logits (..., draft_vocab) of the output embedding as in the head's training."""
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.Tensor,
        context_position_ids: torch.Tensor,
        anchor_position_ids: torch.Tensor | None = None,
        past_key_values: HeadCache | None = None,
        parent_embeds: torch.Tensor | None = None,
        is_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        r"""
        Hidden rows for one block, or for many independent blocks of one sequence at once (training).

        A row sees the context strictly before its anchor and the rows of its own block; in causal layers only those
        up to itself. Row `i` of a block predicts the token at its own position; row 0, the anchor, predicts nothing.
        With `config.anchor_predicts` every row predicts the token after its own position.

        Args:
            inputs_embeds (`torch.Tensor`, (batch, rows, hidden)): Embeddings of the block rows.
            features (`torch.Tensor`, (batch, seq, taps x target_hidden)): Tapped target states not yet in the cache.
            position_ids (`torch.Tensor`, (batch, rows)): Absolute positions of the block rows.
            context_position_ids (`torch.Tensor`, (batch, seq)): Absolute positions of `features`.
            anchor_position_ids (`torch.Tensor`, (batch, rows), *optional*): Position of each row's anchor; by default
                all rows belong to one block that starts with row 0.
            past_key_values (*optional*): Cache of the context rows' keys and values.
            parent_embeds (`torch.Tensor`, (batch, rows, hidden), *optional*): Embeddings of the true tokens before
                each row (training). Rows must then be whole blocks of `config.block_size`.
            is_mask (`torch.Tensor`, (batch, rows), *optional*): Rows that take the head's own mask embedding in place
                of `inputs_embeds` (training, where what wraps the head must see each of its tensors used).

        Returns:
            `torch.Tensor`: (batch, rows, hidden), after the final norm, ready for the target's output embedding. Some
            branch scorers read more of a row, which follows it: (batch, rows, features). With `parent_embeds` a pair
            of them and the branch correction's shifts, of the same shape.
        """
        if anchor_position_ids is None:
            anchor_position_ids = position_ids[:, :1].expand_as(position_ids)
        if is_mask is not None:
            assert self.mask_embedding is not None
            inputs_embeds = torch.where(is_mask[..., None], self.mask_embedding.to(inputs_embeds.dtype), inputs_embeds)
        contexts = self._contexts(features)
        cos_sin = self.rotary_emb(inputs_embeds, torch.cat([context_position_ids, position_ids], dim=1))
        if past_key_values is not None:
            context_position_ids = past_key_values.extend_positions(context_position_ids)
        masks: dict[tuple[bool, int | None], torch.Tensor] = {}
        block, offsets = inputs_embeds, position_ids - anchor_position_ids
        kinds = zip(self.config.causal_layers, self.config.layer_windows, strict=True)
        for layer, context, kind in zip(self.layers, contexts, kinds, strict=True):
            if kind not in masks:
                mask = visibility(position_ids, context_position_ids, anchor_position_ids, *kind)
                is_eager = self.config._attn_implementation == "eager"  # SDPA takes booleans
                masks[kind] = additive_mask(mask, block.dtype) if is_eager else mask
            block = layer(block, context, cos_sin, masks[kind], past_key_values, offsets)
        rows = self.norm(block)
        if self.branch_correction is not None:
            rows = self.branch_correction.row_features(rows, block, self.config.num_rows)
        return rows if parent_embeds is None else (rows, self._shifts(rows, parent_embeds))

    def _contexts(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Context features (batch, seq, hidden) of each layer. Some layouts add a mixture of taps per layer."""
        if self.layer_fusion_weights is None:
            return [self._fuse(features)] * len(self.layers)
        weights = torch.softmax(self.layer_fusion_weights.float(), dim=-1)
        mixtures = torch.einsum("lt,bsth->lbsh", weights, features.unflatten(-1, (weights.shape[1], -1)).float())
        if self.fc is not None:
            mixtures = mixtures + self.fc(features)
        return [self.hidden_norm(mixture).to(features.dtype) for mixture in mixtures]

    def _fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Fused context features (batch, seq, hidden) of concatenated taps."""
        assert self.fc is not None
        if features.dtype != torch.float16:
            return self.hidden_norm(self.fc(features))
        # A few channels of a target's residual stream are so large that sums of their products exceed float16's range.
        # Divide each row by a power of two before the product, and multiply by it in float32, where the norm works.
        largest = features.float().abs().amax(dim=-1, keepdim=True).clamp_min(FLOAT16_TAP_LIMIT)
        scale = torch.exp2(torch.ceil(torch.log2(largest / FLOAT16_TAP_LIMIT)))
        fused = self.fc((features / scale).to(features.dtype))
        return self.hidden_norm(fused.float() * scale).to(features.dtype)

    def _shifts(self, rows: torch.Tensor, parent_embeds: torch.Tensor) -> torch.Tensor:
        """Shifts of whole blocks along the true path. The first drafted row is not shifted: the block has read its
        parent, the anchor."""
        assert self.branch_correction is not None
        batch, num_rows, hidden = rows.shape
        blocks = (batch, num_rows // self.config.block_size, self.config.block_size, hidden)
        projected = self.branch_correction.project_rows(rows).view(*blocks[:3], -1)
        parents = parent_embeds.view(blocks)
        shifts, memory = [torch.zeros_like(parents[:, :, 0])] * 2, None
        for slot in range(2, self.config.block_size):
            tokens = self.branch_correction.project_tokens(parents[:, :, slot])
            recalled = self.branch_correction.recall(memory) if memory else None
            shift, memory = self.branch_correction.read(slot - 1, projected[:, :, slot], tokens, recalled)
            shifts.append(shift)
        return torch.stack(shifts, dim=2).flatten(1, 2)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any
    ) -> "JetFlowHead":
        r"""
        Load a head of any known layout from a local folder or a Hub id. Only config files and safetensors are read.

        Takes the arguments of [`~transformers.PreTrainedModel.from_pretrained`] (`dtype`, `device_map`, `revision`,
        `subfolder`, `token`, ...), and fields of [`JetFlowConfig`], which override the file, such as
        `is_causal=True`. A subfolder may also be written `id::subfolder`. How a third-party layout was read is logged.

        Raises:
            ValueError: If the layout or a key of its config is not supported, or tensors are missing, unexpected or of
                the wrong shape. No tensor is ever initialized at random.
            OSError: If a file is missing or damaged.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        name = str(pretrained_model_name_or_path)
        with readable_load_errors(name.partition("::")[0]):
            source = locate(name, kwargs)
            settings = read_config(source)
            layout = recognize(settings)
            folder = source.folder(*WEIGHT_PATTERNS)
            config, tensors = read_head(source, layout, settings, read_tensors(folder), kwargs)
            # Tensors of the wrong shape pass here and are refused by name below.
            kwargs |= dict(state_dict=tensors, output_loading_info=True, ignore_mismatched_sizes=True)
            head, info = super().from_pretrained(None, *model_args, config=config, **kwargs)
            head.name_or_path = head.config.name_or_path = source.name
            check_loaded_tensors(source.name, layout.name, info)
            if (folder / SETTINGS).is_file():
                head._take_settings(GenerationConfig.from_pretrained(folder))
        return (head, info) if wants_info else head  # type: ignore[return-value]  # a pair only when asked for

    def _take_settings(self, settings: GenerationConfig) -> None:
        """Adopt saved settings; fill in those that the file lacks."""
        for name in ("node_budget", "max_depth", "width"):
            if getattr(settings, name, None) is None:
                setattr(settings, name, getattr(self.generation_config, name))
        self.generation_config = settings

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save `config.json`, `generation_config.json` (node budget, depth) and `model.safetensors`."""
        hub_kwargs = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "create_pr") if key in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        self.generation_config.save_pretrained(save_directory)
        if push_to_hub:  # here, because the parent would upload before the generation config is saved
            hub_kwargs.setdefault("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(token=kwargs.get("token"), **hub_kwargs)
