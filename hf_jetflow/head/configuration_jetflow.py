"""`JetFlowConfig`: the one description of a draft head, and all validation of it.

Knows nothing about tensors or about the decoding loop. The fields are those of the public JetSpec / DFlash head body
plus the facts about the target that a wrong pairing would violate.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


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
)
BRANCH_CORRECTIONS = ("parent", "path")
NGRAM_WEIGHTS = (1.0, 1.5, 1.5, 1.0)  # where a checkpoint does not say


def spaced_layer_ids(num_target_layers: int, num_taps: int) -> list[int]:
    """Target layers to tap: `num_taps` evenly spaced from 1 to L - 3, rounded; L // 2 for a single tap."""
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
            that the head carries a learned mask embedding of its own.
        hidden_state_indices (`list[int]`): Tapped entries of the target's `hidden_states` (0 is the embedding output;
            the output of layer `l` is entry `l + 1`).
        target_hidden_size (`int`, *optional*): Width of the target's hidden states; `hidden_size` when `None`.
        num_target_layers (`int`, *optional*): Number of layers of the target; `None` where a checkpoint of another
            layout does not say.
        draft_vocab_size (`int`, *optional*): Number of target tokens the head scores (see `JetFlowHead.d2t`); all of
            them when `None`.
        anchor_predicts (`bool`): Whether every row, the anchor's included, predicts the token after its own position:
            a block then has one row less (DeepSpec). Otherwise a row predicts the token at its own position.
        own_embedding (`bool`): Whether the head has an embedding of its own instead of borrowing the target's.
        own_lm_head (`bool`): Whether the head has an LM head of its own instead of borrowing the target's.
        embedding_scale (`float`, *optional*): Factor on the rows of the target's embedding matrix, in place of
            whatever its embedding module does with them; `None` takes the module as it is.
        logit_scale (`float`): Factor on the logits.
        logit_softcap (`float`, *optional*): The scaled logits `x` become `cap * tanh(x / cap)`.
        branch_correction (`str`, *optional*): What corrects a node's scores: `"parent"`, its parent's token, or
            `"path"`, all its ancestors' tokens. `None` leaves one distribution per depth, shared by all branches.
        branch_intermediate_size (`int`, *optional*): Width of the correction's gated layer; `2 * hidden_size` when
            `None`.
        branch_candidates (`int`): Tokens per depth that the correction re-scores, the depth's own best.
        ngram_weights (`list[float]`, *optional*): How much a candidate's logit gains where it followed a branch's last
            tokens earlier in the text, by the number of tokens that match, from 1 (see `~ngrams.ContextNgrams`).
            Nothing is searched when it is empty.
        target_model_type (`str`, *optional*): `model_type` of the target the head was trained for.
        target_name (`str`, *optional*): Name of the target the head was trained for.

    Raises:
        ValueError: If fields contradict each other; the message names the field and the remedy.
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
    branch_correction: str | None = None
    branch_intermediate_size: int | None = None
    branch_candidates: int = 128
    ngram_weights: list[float | int] | None = None
    target_model_type: str | None = None
    target_name: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
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
                raise ValueError("`hidden_state_indices` and `num_target_layers` are not set; give the indices")
            layer_ids = spaced_layer_ids(self.num_target_layers, self.num_hidden_layers)
            self.hidden_state_indices = [layer_id + 1 for layer_id in layer_ids]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        self._check()
        self._check_ngram_weights()
        self._check_own_modules()

    @property
    def num_rows(self) -> int:
        """Rows of a block in the head's forward."""
        return self.block_size - 1 if self.anchor_predicts else self.block_size

    @property
    def is_plain(self) -> bool:
        """Whether the head borrows both of the target's embeddings, and its anchor's row predicts nothing."""
        has_own = self.own_embedding or self.own_lm_head or self.anchor_predicts
        return not has_own and self.logit_scale == 1 and self.logit_softcap is None

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
        """Called by `strict`, on the names of the parent's checks."""
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

    def _check_ngram_weights(self) -> None:
        assert self.ngram_weights is not None
        if not all(0 <= weight < float("inf") for weight in self.ngram_weights):
            raise ValueError(f"`ngram_weights` {self.ngram_weights} must be numbers of at least 0, or an empty list")

    def _check_own_modules(self) -> None:
        """Reject what heads with embeddings or logits of their own cannot have."""
        if self.own_embedding and self.mask_token_id is None:
            raise ValueError("`own_embedding` needs a `mask_token_id`: its embedding fills the rows after the anchor")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"`logit_softcap` is {self.logit_softcap}, but a positive number is needed, or None")
        if self.branch_correction is not None and not self.is_plain:
            raise ValueError(
                f"`branch_correction` {self.branch_correction!r} needs a head that borrows the target's embedding and "
                "LM head, takes its logits as they are and whose anchor's row predicts nothing; set it to None"
            )

    @classmethod
    def for_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "JetFlowConfig":
        """
        A configuration whose sizes, rotary embedding, vocabulary and tapped layers fit a target.

        Args:
            target_config (`PreTrainedConfig`): Configuration of the target model.
            overrides: Fields of `JetFlowConfig` to set otherwise, e.g. `num_hidden_layers=3, block_size=16`.

        Returns:
            `JetFlowConfig`: The configuration of a fresh head.

        Raises:
            ValueError: If the target is an encoder-decoder model or not one stack of layers over one vocabulary, or
                an override is not a field of the configuration.
        """
        if target_config.is_encoder_decoder:
            raise ValueError(
                f"`{target_config.model_type}` is an encoder-decoder model; draft heads need a decoder-only target"
            )
        unknown = sorted(set(overrides) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"{unknown} are not fields of `JetFlowConfig`; see its docstring for the names")
        text = target_config.get_text_config(decoder=True)
        missing = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers") if not hasattr(text, name)]
        if missing:
            raise ValueError(
                f"the configuration of `{target_config.model_type}` has no `{missing[0]}`, but draft heads need a "
                "target that is one stack of layers over one vocabulary"
            )
        layer = text.per_layer_config[0]  # the layers of some targets have heads of different sizes
        heads = getattr(layer, "num_attention_heads", None)
        if not heads:
            raise ValueError(
                f"`{target_config.model_type}` has no attention heads; draft heads need a target with attention"
            )
        fields: dict[str, Any] = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": _dense_width(layer),
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(layer, "num_key_value_heads", None) or heads,
            "head_dim": getattr(layer, "head_dim", None) or text.hidden_size // heads,
            "max_position_embeddings": getattr(text, "max_position_embeddings", 32768),
            "rms_norm_eps": float(getattr(text, "rms_norm_eps", 1e-6)),
            "rope_parameters": _head_rope(text),
            "num_target_layers": text.num_hidden_layers,
            "target_model_type": target_config.model_type,
            "target_name": target_config.name_or_path or None,
        }
        return cls(**{**fields, **overrides})


def _dense_width(layer: PreTrainedConfig) -> int:
    """A target layer's dense MLP width, or SwiGLU's default where its `intermediate_size` is per expert or missing."""
    width = getattr(layer, "intermediate_size", None)
    if isinstance(width, list):
        width = max(width)
    return width or 8 * layer.hidden_size // 3


def _head_rope(text: PreTrainedConfig) -> dict[str, Any]:
    """The target's rotary parameters for a head that always rotates whole attention heads."""
    rope = getattr(text, "rope_parameters", None) or {}
    per_kind = [value for value in rope.values() if isinstance(value, dict)]  # where layer kinds rotate differently
    if per_kind:
        rope = rope.get("full_attention") or per_kind[0]
    rope = {key: value for key, value in rope.items() if key not in ("partial_rotary_factor", "mrope_section")}
    return {"rope_type": "default", "rope_theta": 10000.0, **rope}
