"""Miniature checkpoints of every public layout, from the same weights, with the real keys and tensor names.

The configs are written out by hand, as the projects write them, and not by the package's own exports.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_jetflow import JetFlowConfig, JetFlowHead


VOCAB, HIDDEN, LAYERS, TARGET_LAYERS, BLOCK, MASK = 257, 64, 2, 5, 8, 3
LAYER_IDS = [1, 3]  # in z-lab's count: outputs of layers 1 and 3, entries 2 and 4 of `hidden_states`
LENGTH = 512  # longest sequence
Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def body_tensors(seed: int = 11) -> Tensors:
    """The eleven tensors per layer and three that all layouts share."""
    shapes = {"fc.weight": (HIDDEN, 2 * HIDDEN), "hidden_norm.weight": (HIDDEN,), "norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")
        }
        shapes |= {f"layers.{layer}.self_attn.{name}_norm.weight": (16,) for name in "qk"}
        shapes |= {
            f"layers.{layer}.self_attn.{name}_proj.weight": shape
            for name, shape in {"q": (64, HIDDEN), "k": (32, HIDDEN), "v": (32, HIDDEN), "o": (HIDDEN, 64)}.items()
        }
        shapes |= {f"layers.{layer}.mlp.{name}_proj.weight": (96, HIDDEN) for name in ("gate", "up")}
        shapes[f"layers.{layer}.mlp.down_proj.weight"] = (HIDDEN, 96)
    return random_tensors(shapes, seed)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
        for name, shape in sorted(shapes.items())
    }


def qwen3_config() -> Config:
    """The keys a Qwen3 draft head's config.json shares with a Qwen3 model's."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_types": ["full_attention"] * LAYERS,
        "max_position_embeddings": LENGTH,
        "max_window_layers": LAYERS,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    }


def dflash_old(is_causal: bool) -> Config:
    """z-lab's first heads: `block_size` at the top; bidirectional unless a later `is_causal` says otherwise."""
    return {
        **qwen3_config(),
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": BLOCK,
        "num_target_layers": TARGET_LAYERS,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": LAYER_IDS},
        **({"is_causal": True} if is_causal else {}),
    }


def dflash_new(is_causal: bool) -> Config:
    """z-lab from Qwen3.5 on: `block_size` in the section, windows, `rope_parameters`; `is_causal` decides."""
    config = dflash_old(is_causal)
    config["dflash_config"]["block_size"] = config.pop("block_size")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    del config["rope_scaling"]
    return {
        **config,
        "is_causal": is_causal,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 2 * LENGTH,
        "use_sliding_window": True,
    }


def jetspec(is_causal: bool) -> Config:
    config = dflash_old(False)
    config["dflash_config"]["causal_head"] = is_causal
    return config


def automodel(is_causal: bool) -> Config:
    """Automodel: `block_size` at both places; its shared recipe stamps `is_causal: false` on causal heads too."""
    config = dflash_old(False)
    config["dflash_config"] |= {"block_size": BLOCK, "causal": is_causal}
    return {**config, "architectures": ["Qwen3DFlashDraftModel"], "is_causal": False}


def tensorrt(is_causal: bool) -> Config:
    config = jetspec(is_causal)
    section = config.pop("dflash_config") | {"block_size": config.pop("block_size")}
    return {**config, "jetspec_config": section}


def speculators(is_causal: bool) -> Config:
    """
    speculators: layer ids one higher, a reduced draft vocabulary possible, an empty key in `auto_map`.

    Its full layers are bidirectional; its sliding layers are causal, here with a window over the longest sequence.
    """
    layers = qwen3_config()
    if is_causal:
        window = {"sliding_window": LENGTH, "use_sliding_window": True, "layer_types": ["sliding_attention"] * LAYERS}
        layers |= window
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": BLOCK - 1,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["DFlashSpeculator"],
        "auto_map": {"": "config.DFlashSpeculatorConfig"},
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": layers,
        "draft_vocab_size": VOCAB,
        "block_size": BLOCK,
        "aux_hidden_state_layer_ids": [index + 1 for index in LAYER_IDS],
        "mask_token_id": MASK,
        "target_hidden_size": None,
        "sliding_window_non_causal": False,
        "sample_from_anchor": False,
        "dtype": "float32",
        "transformers_version": "5.17.0",
    }


def speculators_early(is_causal: bool) -> Config:
    """An early file: DFlash's architecture name, no flags."""
    config = speculators(is_causal) | {"architectures": ["DFlashDraftModel"]}
    for key in ("sliding_window_non_causal", "sample_from_anchor"):
        del config[key]
    return config


def deepspec() -> Config:
    """DeepSpec's dflash block 7: all at the top, bidirectional; the anchor's row predicts too."""
    return {
        **qwen3_config(),
        "architectures": ["Qwen3DSparkModel"],
        "num_target_layers": TARGET_LAYERS,
        "block_size": BLOCK - 1,
        "mask_token_id": MASK,
        "target_layer_ids": LAYER_IDS,
        "num_anchors": 512,
        "enable_confidence_head": False,
        "markov_rank": 0,
    }


def jetflow(is_causal: bool) -> Config:
    """Our own layout, from our own configuration."""
    config = JetFlowConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 5000},
        is_causal=is_causal,
        block_size=BLOCK,
        mask_token_id=MASK,
        hidden_state_indices=[index + 1 for index in LAYER_IDS],
        num_target_layers=TARGET_LAYERS,
    )
    return {**config.to_dict(), "architectures": ["JetFlowHead"]}


# By the name in `hf_jetflow.head.formats.LAYOUTS` and what distinguishes two files of one layout.
CONFIGS: dict[str, Callable[[bool], Config]] = {
    "JetFlow": jetflow,
    "speculators dflash": speculators,
    "speculators dflash, early": speculators_early,
    "TensorRT-Edge-LLM JetSpec": tensorrt,
    "JetSpec": jetspec,
    "NeMo Automodel": automodel,
    "DFlash": dflash_old,
    "DFlash, new": dflash_new,
}


def own_tensors(seed: int = 12) -> Tensors:
    """An embedding and an LM head of the head's own."""
    return random_tensors({"embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}, seed)


def write(folder: Path, config: Config, tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, config: Config, tensors: Tensors, **kwargs: Any) -> JetFlowHead:
    """A checkpoint, written and read."""
    return JetFlowHead.from_pretrained(write(folder, config, tensors), **kwargs).eval()
