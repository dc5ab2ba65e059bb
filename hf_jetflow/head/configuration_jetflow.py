"""`JetFlowConfig`: the configuration of a draft head and its validation.

It knows nothing about tensors or about the decoding loop. Its fields are those of the public JetSpec and DFlash heads,
and the facts about the target by which a wrong pair of head and target is detected.
"""

import difflib
from collections.abc import Collection
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .target_fields import fields_for_target


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
    "target_hidden_size",
    "num_target_layers",
    "branch_intermediate_size",
    "branch_candidates",
    "branch_rank",
    "branch_state_size",
    "branch_top_k",
    "branch_vocab_size",
    "conv_kernel_size",
    "conv_group_size",
)
TRAINED_CORRECTIONS = ("parent", "path")
# Kinds of other layouts, and the fields that each needs.
READ_CORRECTIONS = {
    "selector": ("branch_rank", "branch_top_k"),
    "markov": ("branch_rank",),
    "gated": ("branch_rank",),
    "rnn": ("branch_rank",),
    "treeflash": (),
    "gru": ("branch_rank", "branch_state_size"),
    "refiner": ("branch_rank",),
}
BRANCH_CORRECTIONS = (*TRAINED_CORRECTIONS, *READ_CORRECTIONS)
EMBEDDING_CORRECTIONS = ("parent", "path", "treeflash", "gru")  # they read embeddings of the target
SHIFTING_CORRECTIONS = ("parent", "path", "treeflash")  # they shift the input of the LM head
CONTEXT_FUSIONS = ("fc", "layers", "fc+layers")
NGRAM_WEIGHTS = (1.0, 1.5, 1.5, 1.0, 0.0, 1.5, 0.0, 1.5)  # default of `ngram_weights`


def check_names(others: Collection[str]) -> None:
    """
    Refuse names that look like a misspelled field. transformers takes any, and other tools store facts of their own.

    Raises:
        ValueError: If there is one. The message names the field that is meant.
    """
    own = JetFlowConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    for name in others:
        if close := difflib.get_close_matches(name, own, n=1, cutoff=0.85):
            raise ValueError(f"`{name}` is no field of a head's configuration, did you mean `{close[0]}`?")


def spaced_layer_ids(num_target_layers: int, num_taps: int) -> list[int]:
    """Ids of `num_taps` target layers to tap: evenly spaced from 1 to L - 3, rounded; L // 2 for a single tap."""
    if num_taps == 1:
        return [num_target_layers // 2]
    last = max(num_target_layers - 3, 1)
    return [round(1 + i * (last - 1) / (num_taps - 1)) for i in range(num_taps)]


@strict
class JetFlowConfig(PreTrainedConfig):
    r"""
    Configuration of a [`JetFlowHead`].

    Args:
        vocab_size (`int`): Vocabulary size of the target.
        hidden_size (`int`): Width of the head; equal to the target's, whose embedding modules the head borrows.
        intermediate_size (`int`): Width of the head's SwiGLU layers.
        num_hidden_layers (`int`): Number of head layers.
        num_attention_heads (`int`): Query heads per layer.
        num_key_value_heads (`int`, *optional*): Key/value heads per layer; as many as query heads when `None`.
        head_dim (`int`, *optional*): Width of one attention head; `hidden_size // num_attention_heads` when `None`.
        hidden_act (`str`): Activation of the SwiGLU layers.
        max_position_embeddings (`int`): Longest sequence the rotary embedding was configured for.
        rms_norm_eps (`float`): Epsilon of every RMSNorm.
        attention_bias (`bool`): Whether the attention projections carry biases.
        rope_parameters (`dict`, *optional*): Rotary parameters in transformers' form (`rope_type`, `rope_theta`, ...).
        layer_types (`list[str]`, *optional*): `"full_attention"` or `"sliding_attention"` per head layer.
        sliding_window (`int`, *optional*): Window of the sliding layers, in positions.
        is_causal (`bool` or `list[bool]`): Whether a block row sees only earlier rows of its block, per layer.
            `False` everywhere is the DFlash baseline.
        block_size (`int`): Tokens of a block, the anchor included: `block_size - 1` depths are drafted in one forward.
        mask_token_id (`int`, *optional*): Token whose target embedding fills the rows after the anchor. `None` means
            that the head has a learned mask embedding.
        hidden_state_indices (`list[int]`): Tapped entries of the target's `hidden_states` (0 is the embedding output;
            the output of layer `l` is entry `l + 1`).
        target_hidden_size (`int`, *optional*): Width of the target's hidden states; `hidden_size` when `None`.
        num_target_layers (`int`, *optional*): Number of layers of the target; `None` if a third-party checkpoint does
            not say.
        draft_vocab_size (`int`, *optional*): Size of the draft vocabulary, the target tokens that the head scores (see
            `JetFlowHead.d2t`); all tokens when `None`.
        anchor_predicts (`bool`): Whether every row, the anchor's included, predicts the token after its own position:
            a block then has one row fewer (DeepSpec). Otherwise a row predicts the token at its own position.
        own_embedding (`bool`): Whether the head has an embedding of its own instead of borrowing the target's.
        own_lm_head (`bool`): Whether the head has an LM head of its own instead of borrowing the target's.
        embedding_scale (`float`, *optional*): Factor on the rows of the target's embedding matrix, which are then read
            without its embedding module; `None` calls the module.
        logit_scale (`float`): Factor on the logits.
        logit_softcap (`float`, *optional*): The scaled logits `x` become `cap * tanh(x / cap)`.
        context_fusion (`str`): How taps become context features: `"fc"`, one projection for all layers; `"layers"`, a
            mixture per layer (DFlare); `"fc+layers"`, their sum (DFly).
        own_context_kv (`bool`): Whether attention projects the context apart from the block (DFlare).
        conv_kernel_size (`int`, *optional*): Rows that the convolutions around each sublayer read (DFlash 2); `None`
            for layers without them.
        conv_group_size (`int`, *optional*): Channels that share the dynamic part of a convolution's kernel.
        branch_correction (`str`, *optional*): What a node's scores are conditioned on: `"parent"`, its parent's token,
            or `"path"`, all its ancestors' tokens. Heads of other layouts have `"selector"` (DFlash 2), `"markov"`,
            `"gated"` or `"rnn"` (DSpark), `"treeflash"`, `"gru"` (Domino) or `"refiner"` (XPress). `None`: all
            branches share one distribution per depth.
        first_corrected_depth (`int`): Depth of the first nodes whose children the correction re-scores, 0 for the
            anchor. The corrections trained here start at 1, as the block has read the anchor.
        branch_rank (`int`, *optional*): Width of the vectors whose products are the logit changes.
        branch_state_size (`int`, *optional*): Width of the state of `"gru"`.
        branch_top_k (`int`, *optional*): Candidates per depth that a selector re-scores.
        confidence_inputs (`int`, *optional*): Width of the input of the confidence head (DSpark); `None` without one.
            Drafting does not use it, and `convert` writes it back.
        branch_vocab_size (`int`, *optional*): A selector re-scores only tokens below this id; all when `None`.
        branch_intermediate_size (`int`, *optional*): Width of the correction's gated layer; `2 * hidden_size` when
            `None`.
        branch_candidates (`int`): Number of candidates per depth that the correction re-scores.
        ngram_weights (`list[float]`, *optional*): Bonus on the logit of a candidate that followed a branch's last
            tokens earlier in the text, by the number of matching tokens, from 1 (see `~ngrams.ContextNgrams`). An
            empty list turns off all that reads the text: n-grams, recycled choices, tokens outside the draft
            vocabulary.
        recycled_weight (`float`): Weight of what the target chose at rejected nodes of the round before, as a multiple
            of `ngram_weights` (see `~recycled.RecycledChoices`); 0 turns it off.
        target_model_type (`str`, *optional*): `model_type` of the target the head was trained for.
        target_name (`str`, *optional*): Name of the target the head was trained for.

    Raises:
        ValueError: If fields contradict each other. The message names the field and the remedy.
    """

    model_type = "jetflow"

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 3
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    rope_parameters: dict | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    is_causal: bool | list[bool] = True
    block_size: int = 16
    mask_token_id: int | None = None
    hidden_state_indices: list[int] | None = None
    target_hidden_size: int | None = None
    num_target_layers: int | None = 32
    draft_vocab_size: int | None = None
    anchor_predicts: bool = False
    own_embedding: bool = False
    own_lm_head: bool = False
    embedding_scale: float | int | None = None
    logit_scale: float | int = 1.0
    logit_softcap: float | int | None = None
    context_fusion: str = "fc"
    own_context_kv: bool = False
    conv_kernel_size: int | None = None
    conv_group_size: int | None = None
    branch_correction: str | None = None
    first_corrected_depth: int = 1
    branch_rank: int | None = None
    branch_state_size: int | None = None
    branch_top_k: int | None = None
    branch_vocab_size: int | None = None
    confidence_inputs: int | None = None
    branch_intermediate_size: int | None = None
    branch_candidates: int = 128
    ngram_weights: list[float | int] | None = None
    recycled_weight: float | int = 2.0
    target_model_type: str | None = None
    target_name: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_names(kwargs)
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.ngram_weights is None:
            self.ngram_weights = list(NGRAM_WEIGHTS)
        if self.branch_intermediate_size is None:
            self.branch_intermediate_size = 2 * self.hidden_size
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if isinstance(self.is_causal, bool):
            self.is_causal = [self.is_causal] * self.num_hidden_layers
        if self.hidden_state_indices is None:
            if self.num_target_layers is None:
                raise ValueError("neither `hidden_state_indices` nor `num_target_layers` is set; set one of them")
            layer_ids = spaced_layer_ids(self.num_target_layers, self.num_hidden_layers)
            self.hidden_state_indices = [layer_id + 1 for layer_id in layer_ids]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        self._check()
        self._check_ngram_weights()
        self._check_own_modules()
        self._check_other_layouts()

    @property
    def num_rows(self) -> int:
        """Rows of a block in the head's forward."""
        return self.block_size - 1 if self.anchor_predicts else self.block_size

    @property
    def is_plain(self) -> bool:
        """Whether the head is of the kind that is trained here: it borrows both of the target's embeddings, its
        anchor's row predicts nothing, and it has no part of another layout."""
        has_own = self.own_embedding or self.own_lm_head or self.anchor_predicts
        has_body = self.conv_kernel_size is not None or self.own_context_kv or self.context_fusion != "fc"
        is_read = self.branch_correction in READ_CORRECTIONS or self.first_corrected_depth != 1
        is_scaled = self.logit_scale != 1 or self.logit_softcap is not None
        return not (has_own or has_body or is_read or is_scaled)

    @property
    def blocks_can_be_cut(self) -> bool:
        """Whether the leading rows of a block are the same without the rows behind them."""
        return all(self.causal_layers) and self.branch_correction != "refiner"  # which reads the mean row

    @property
    def causal_layers(self) -> list[bool]:
        """In-block causality of each layer."""
        assert isinstance(self.is_causal, list)
        return self.is_causal

    @property
    def layer_windows(self) -> list[int | None]:
        """Sliding window of each layer in positions, `None` for full attention."""
        assert self.layer_types is not None
        return [self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types]

    def validate_rope(self) -> None:
        """Check the rotary parameters; `strict` calls this, as it overrides a check of the parent class."""
        assert self.rope_parameters is not None
        rope_type, theta = (self.rope_parameters.get(key) for key in ("rope_type", "rope_theta"))
        if rope_type not in ("default", *ROPE_INIT_FUNCTIONS) or not isinstance(theta, int | float):
            raise ValueError(
                f"`rope_parameters` has `rope_type` {rope_type!r} and `rope_theta` {theta!r}, but one of "
                "transformers' types and a number are needed; all layers of a head share them"
            )
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from error

    def _check_sizes(self) -> None:
        sizes = {name: getattr(self, name) for name in SIZES}
        bad = [f"`{name}` is {size}" for name, size in sizes.items() if size is not None and size < 1]
        if bad:
            raise ValueError(f"{', '.join(bad)}, but at least 1 is needed")

    def _check(self) -> None:
        """Reject fields that contradict each other (the types themselves are checked by `strict`)."""
        assert self.num_key_value_heads is not None
        assert self.layer_types is not None
        assert self.hidden_state_indices is not None
        if self.block_size < 2:
            raise ValueError(
                f"`block_size` is {self.block_size}, but a block needs the anchor and at least one more row"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` {self.hidden_act!r} is not an activation of transformers, such as 'silu'")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})"
            )
        if len(self.causal_layers) != self.num_hidden_layers:
            raise ValueError(
                f"`is_causal` lists {len(self.causal_layers)} layers, but `num_hidden_layers` is "
                f"{self.num_hidden_layers}; give one flag per layer or a single one"
            )
        if not set(self.layer_types) <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"`layer_types` {self.layer_types} may hold 'full_attention' and 'sliding_attention' only"
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise ValueError("`layer_types` has sliding layers, but `sliding_window` is not set")
        last = self.num_target_layers
        bad = [i for i in self.hidden_state_indices if i < 0 or (last is not None and i > last)]
        if bad or not self.hidden_state_indices:
            raise ValueError(
                f"`hidden_state_indices` {self.hidden_state_indices} must be non-empty and lie in 0 .. "
                f"{'the number of layers' if last is None else last} (0 is the embedding output, the output of layer "
                "l is l + 1); an offset of one is the usual cause"
            )
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"`mask_token_id` {self.mask_token_id} is outside the vocabulary of {self.vocab_size}")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` {self.draft_vocab_size} must lie in 1 .. `vocab_size` ({self.vocab_size})"
            )
        if self.branch_correction not in (None, *BRANCH_CORRECTIONS):
            raise ValueError(
                f"`branch_correction` {self.branch_correction!r} is not known; choose from {BRANCH_CORRECTIONS}, or "
                "None for a head without one"
            )

    def _check_other_layouts(self) -> None:
        """Reject parts of other layouts that lack a size or do not fit together."""
        needed = READ_CORRECTIONS.get(self.branch_correction or "", ())
        missing = [f"`{name}`" for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"`branch_correction` {self.branch_correction!r} needs {' and '.join(missing)}; set them")
        if self.first_corrected_depth < 0:
            raise ValueError(f"`first_corrected_depth` is {self.first_corrected_depth}, but must be at least 0")
        if self.context_fusion not in CONTEXT_FUSIONS:
            raise ValueError(f"`context_fusion` {self.context_fusion!r} is not known; choose from {CONTEXT_FUSIONS}")
        groups = (self.conv_kernel_size, self.conv_group_size)
        if (groups[0] is None) != (groups[1] is None) or (groups[1] and self.hidden_size % groups[1]):
            raise ValueError(
                f"`conv_kernel_size` and `conv_group_size` are {groups}; set both, and let the second divide "
                f"`hidden_size` ({self.hidden_size}), or set neither"
            )

    def _check_ngram_weights(self) -> None:
        assert self.ngram_weights is not None
        if not all(0 <= weight < float("inf") for weight in self.ngram_weights):
            raise ValueError(f"`ngram_weights` {self.ngram_weights} must be numbers of at least 0, or an empty list")
        if not 0 <= self.recycled_weight < float("inf"):
            raise ValueError(f"`recycled_weight` is {self.recycled_weight}, but must be a number of at least 0")

    def _check_own_modules(self) -> None:
        """Reject options that heads with their own embeddings or logits cannot have."""
        if self.own_embedding and self.mask_token_id is None:
            raise ValueError("`own_embedding` needs a `mask_token_id`: its embedding fills the rows after the anchor")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"`logit_softcap` is {self.logit_softcap}, but a positive number is needed, or None")
        is_scaled = self.logit_scale != 1 or self.logit_softcap is not None
        is_wrong = self.own_embedding and self.branch_correction in EMBEDDING_CORRECTIONS
        if is_wrong or (is_scaled and self.branch_correction in SHIFTING_CORRECTIONS):
            raise ValueError(
                f"`branch_correction` {self.branch_correction!r} needs a head that borrows the target's embedding and "
                "takes its logits as they are; set it to None"
            )

    @classmethod
    def for_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "JetFlowConfig":
        """
        Make a configuration that fits a target: sizes, rotary embedding, vocabulary and tapped layers.

        Args:
            target_config (`PreTrainedConfig`): Configuration of the target model.
            overrides: Fields of `JetFlowConfig` to set, e.g. `num_hidden_layers=3, block_size=16`.

        Returns:
            `JetFlowConfig`: The configuration of a fresh head.

        Raises:
            ValueError: If the target is not one stack of decoder layers with attention over a vocabulary, or an
                override is not a field of the configuration.
        """
        unknown = sorted(set(overrides) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"{unknown} are not fields of `JetFlowConfig`; see its docstring for the names")
        return cls(**{**fields_for_target(target_config), **overrides})
