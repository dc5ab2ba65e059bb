"""Fields of a fresh head's configuration that follow from its target."""

from typing import Any

from transformers import PreTrainedConfig


def fields_for_target(target_config: PreTrainedConfig) -> dict[str, Any]:
    """Sizes, rotary embedding, vocabulary and number of layers; see `JetFlowConfig.for_target`."""
    if target_config.is_encoder_decoder:
        raise ValueError(
            f"`{target_config.model_type}` is an encoder-decoder model; draft heads need a decoder-only target"
        )
    text = target_config.get_text_config(decoder=True)
    sizes = {name: getattr(text, name, None) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    missing = [f"`{name}`" for name, size in sizes.items() if not isinstance(size, int)]
    if missing:
        raise ValueError(
            f"the configuration of `{target_config.model_type}` has no {', '.join(missing)}; draft heads need a "
            "target that is one stack of decoder layers over a vocabulary"
        )
    layer = text.per_layer_config[0]  # the layers of some targets have heads of different sizes
    heads = getattr(layer, "num_attention_heads", None)
    if not heads:
        raise ValueError(
            f"`{target_config.model_type}` has no attention heads; draft heads need a target with attention"
        )
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": _dense_width(layer),
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(layer, "num_key_value_heads", None) or heads,
        "head_dim": _rotatable(getattr(layer, "head_dim", None) or text.hidden_size // heads),
        "max_position_embeddings": max(getattr(text, "max_position_embeddings", None) or 0, 0) or 32768,
        "rms_norm_eps": _norm_eps(text),
        "rope_parameters": _head_rope(text),
        "num_target_layers": text.num_hidden_layers,
        "target_model_type": target_config.model_type,
        "target_name": target_config.name_or_path or None,
    }


def _norm_eps(text: PreTrainedConfig) -> float:
    """The epsilon of a target's norms, whatever its configuration calls it."""
    names = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")
    return float(next((eps for name in names if (eps := getattr(text, name, None))), 1e-6))


def _rotatable(head_dim: int) -> int:
    """The largest even width of an attention head up to `head_dim`: rotary embeddings turn pairs."""
    return max(head_dim - head_dim % 2, 2)


def _dense_width(layer: PreTrainedConfig) -> int:
    """MLP width of a target layer: the largest of several; 8/3 of the hidden size, as usual for SwiGLU, if missing."""
    width = getattr(layer, "intermediate_size", None)
    if isinstance(width, list):
        width = max(width)
    return width or 8 * layer.hidden_size // 3


def _head_rope(text: PreTrainedConfig) -> dict[str, Any]:
    """The target's rotary parameters without partial rotation: the head rotates whole attention heads."""
    rope = getattr(text, "rope_parameters", None) or {}
    per_kind = [
        value for value in rope.values() if isinstance(value, dict)
    ]  # layer kinds with different rotary parameters
    if per_kind:
        rope = rope.get("full_attention") or per_kind[0]
    rope = {key: value for key, value in rope.items() if key not in ("partial_rotary_factor", "mrope_section")}
    return {"rope_type": "default", "rope_theta": 10000.0, **rope}
