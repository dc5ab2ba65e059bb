"""What the layers of a target see, by kind, and whether they take draft trees or chains only.

A tree needs a mask and a position of its own for every node. A target that takes neither (alibi biases and local masks
by index in the cache), or whose recurrent layers are not known (see `mixer_plans.py`), verifies one path at a time.
"""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import JetFlowError
from .mixer_plans import unknown_reason
from .step_inputs import passes_positions


logger = logging.get_logger(__name__)
RECURRENT_KINDS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
SCANS_FROM_NOTHING = {"jamba", "zamba"}  # transformers' scan of mamba-1 layers takes no state to begin with
MAKES_OWN_MASKS = {"paligemma"}  # models around a text model that do not hand its masks on, one per kind of layer
KINDS_WITHOUT_ROWS = {"moe", "mlp"}  # layers that store nothing of what they read


@dataclass(frozen=True)
class Window:
    """The positions that a row of a sliding or chunked layer sees."""

    size: int
    is_chunked: bool = False  # it sees its own chunk of the sequence, not the `size` positions up to its own

    def sees(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Whether rows see earlier keys, both given by position; the shapes are broadcast."""
        if self.is_chunked:
            return rows // self.size == keys // self.size
        return rows - keys < self.size


def check_layers(model: PreTrainedModel) -> None:
    """
    Refuse a target whose layers cannot verify a draft.

    Raises:
        JetFlowError: Naming the target and what its layers do.
    """
    text = model.config.get_text_config(decoder=True)
    if text.model_type in SCANS_FROM_NOTHING:
        raise JetFlowError(
            f"the mamba layers of `{text.model_type}` read several rows at once from an empty state only, so they "
            "cannot verify a draft; generate without `assistant_model`"
        )
    # Encoders that can be decoders have the field. Those that verify trees are given the mask of each row.
    if not getattr(text, "is_decoder", True) and not passes_positions(model):
        raise JetFlowError(
            f"the attention of this `{text.model_type}` is bidirectional (`is_decoder=False` in its config), so "
            "a forward of several rows shows each of them the later ones; set `is_decoder=True`, or generate without "
            "`assistant_model`"
        )
    if getattr(text, "cross_attention_layers", None):
        raise JetFlowError(
            f"`{text.model_type}` has layers that attend to images beside the text, whose cache draft heads do not "
            "know; generate without `assistant_model`"
        )
    if {kind for kind, _ in _kinds(text)} <= {"linear_attention", "conv"} | KINDS_WITHOUT_ROWS:
        raise JetFlowError(
            f"`{text.model_type}` has recurrent layers only; draft heads need a target with attention, generate "
            "without `assistant_model`"
        )


def layer_windows(model: PreTrainedModel) -> dict[str, Window | None]:
    """
    Attention kinds of the target's layers and their windows, `None` for full attention.

    Raises:
        JetFlowError: If a kind of layer is not known, or takes no masks from outside.
    """
    text = model.config.get_text_config(decoder=True)
    windows: dict[str, Window | None] = {}
    for kind, layer in _kinds(text):
        if kind in ("full_attention", "hybrid"):
            windows["full_attention"] = None
        elif kind in ("sliding_attention", "hybrid_sliding"):
            windows[kind] = Window(layer.sliding_window)
        elif kind == "chunked_attention":
            windows[kind] = Window(layer.attention_chunk_size, is_chunked=True)
        elif kind not in RECURRENT_KINDS | KINDS_WITHOUT_ROWS:
            raise JetFlowError(
                f"the target has {kind!r} layers, which draft heads do not know; generate without `assistant_model`"
            )
    if len(windows) > 1 and model.config.model_type in MAKES_OWN_MASKS:
        raise JetFlowError(
            f"`{model.config.model_type}` makes the masks of its {' and '.join(sorted(windows))} layers itself, so it "
            "takes no tree masks by kind of layer; generate without `assistant_model`"
        )
    return dict(sorted(windows.items()))


def takes_trees(model: PreTrainedModel) -> bool:
    """Whether the target can verify several branches in one forward; otherwise chains only."""
    text = model.config.get_text_config(decoder=True)
    # Probed because few configurations have them: `alibi` of falcon and, in `attn_config`, of mpt; gpt_neo's layers.
    has_alibi = any(getattr(config, "alibi", False) for config in (text, getattr(text, "attn_config", None)))
    has_local_layers = "local" in getattr(text, "attention_layers", ())
    if has_alibi or has_local_layers or not passes_positions(model):
        return False
    recurrent = _recurrent_layers(model)
    reason = unknown_reason(model, recurrent) if recurrent else None
    if reason is not None:
        logger.warning_once(f"`{text.model_type}` verifies chains instead of draft trees: {reason}.")
    return reason is None


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether the target has recurrent layers."""
    return bool(_recurrent_layers(model))


def _recurrent_layers(model: PreTrainedModel) -> list[int]:
    text = model.config.get_text_config(decoder=True)
    return [index for index, (kind, _) in enumerate(_kinds(text)) if kind in RECURRENT_KINDS]


def scaling_step(model: PreTrainedModel) -> int | None:
    """Number of cache indices in a row that share a query scale, where a target scales queries by index (llama4)."""
    text = model.config.get_text_config(decoder=True)
    return text.floor_scale if getattr(text, "attn_temperature_tuning", False) else None


def _kinds(text: PretrainedConfig) -> list[tuple[str, PretrainedConfig]]:
    """Kind and configuration of each layer of a text model."""
    layers = list(text.per_layer_config)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:  # probed, as in transformers' caches: not every configuration has the fields
        kinds = [
            "sliding_attention"
            if getattr(layer, "sliding_window", None)
            else "chunked_attention"
            if getattr(layer, "attention_chunk_size", None)
            else "full_attention"
            for layer in layers
        ]
    return list(zip(kinds, layers, strict=False))
