"""Checkpoint layouts that are refused, and how a `config.json` is matched with a layout. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


Config = dict[str, Any]


@dataclass(frozen=True)
class Refusal:
    """A layout that is refused, recognized by its config or by its tensor names."""

    name: str
    matches: Callable[[Config], bool]
    tensors: tuple[str, ...]  # substrings of tensor names that are unique to this layout
    reason: str


def architecture(config: Config) -> str:
    return (config.get("architectures") or [""])[0] or ""


def is_speculators(*kinds: str) -> Callable[[Config], bool]:
    return lambda config: config.get("speculators_model_type") in kinds


def setting(config: Config, key: str) -> Any:
    """Value of a key in `dflash_config` or at the top of the config."""
    return (config.get("dflash_config") or {}).get(key) or config.get(key)


def is_architecture(*names: str) -> Callable[[Config], bool]:
    return lambda config: architecture(config) in names


REFUSED = (
    Refusal(
        "quantized (compressed-tensors and others)",
        lambda config: bool(config.get("quantization_config") or config.get("compression_config")),
        ("weight_packed", "weight_scale"),
        "its weights are packed; load the unquantized head",
    ),
    Refusal(
        "LiLiCorr",
        lambda config: (
            "LiLiCorr" in architecture(config)
            or any(key.startswith("lilicorr_") for key in (config.get("dflash_config") or {}))
        ),
        ("lilicorr.",),
        "its candidate lattice is not built here; use a DFlash 2 or DSpark head of that target",
    ),
    Refusal(
        "DeepSpec for Gemma 4",
        is_architecture("Gemma4DSparkModel"),
        (),
        "its layers are Gemma's, not the common body; use the target's speculators or DFlash head",
    ),
    Refusal(
        "DeepSeek V4 DSpark",
        lambda config: is_speculators("dsv4_dspark")(config) or "dspark_block_size" in config,
        ("mtp.",),
        "its draft is a part of the target; use the target's speculators dflash head",
    ),
    Refusal(
        "MLA or MoE draft",
        lambda config: "k3_dspark" in (config.get("model_type"), setting(config, "projector_type")),
        ("q_a_proj", "kv_a_proj", "experts."),
        "its layers have latent attention or experts; use the target's speculators head",
    ),
    Refusal(
        "Laguna DFlash",
        lambda config: "Laguna" in architecture(config),
        ("qkv_proj", "g_proj", "aux_hidden_norms"),
        "its layers have gates and further norms; use the target's speculators dflash head",
    ),
    Refusal(
        "MiMo DFlash",
        lambda config: (
            "MiMo" in architecture(config)
            or bool(setting(config, "attention_sink_bias") or setting(config, "add_swa_attention_sink_bias"))
        ),
        ("sink_bias", "mask_embed"),
        "its attention sinks and mask embedding are not built here; use another head of that target",
    ),
    Refusal(
        "EAGLE",
        lambda config: (
            "eagle" in architecture(config).lower()
            or is_speculators("eagle", "eagle3", "peagle")(config)
            or "eagle_config" in config
        ),
        ("midlayer.",),
        "it drafts one token after another; use a head that drafts a block",
    ),
    Refusal(
        "Medusa",
        lambda config: "medusa" in architecture(config).lower() or "medusa_num_heads" in config,
        ("medusa_head",),
        "it has one head per depth and no attention to the context; use a head that drafts a block",
    ),
)
