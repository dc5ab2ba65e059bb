"""Miniature checkpoints of the layouts whose heads score branches, with the real keys and tensor names."""

from collections.abc import Callable
from typing import Any

import make_layouts as make
import torch
from make_layouts import BLOCK, HIDDEN, LAYER_IDS, LAYERS, MASK, TARGET_LAYERS, VOCAB, Config, Tensors, random_tensors


RANK, STATE, GROUP, TOP_K, DRAFTED, INNER = 8, 24, 16, 6, 100, 96
SECTION: Config = {"mask_token_id": MASK, "target_layer_ids": LAYER_IDS}
Checkpoint = tuple[Config, Tensors]


def dflash2() -> Checkpoint:
    """z-lab: everything in the section; bare codebooks."""
    section = {"block_size": BLOCK, "conv_kernel_size": 2, "conv_group_size": GROUP}
    section |= {"selector_rank": RANK, "selector_top_k": TOP_K, **SECTION}
    config = make.qwen3_config() | {"architectures": ["DFlash2DraftModel"], "is_causal": False}
    return config | {"num_target_layers": TARGET_LAYERS, "dflash_config": section}, _dflash2_tensors()


def dflash2_scaled() -> Checkpoint:
    """The same with a multiplier and a soft cap, as published for Muse Glimmer; codebooks as modules save them."""
    config, tensors = dflash2()
    config["dflash_config"] |= {"output_multiplier": 0.3, "final_logit_softcapping": 5.0, "input_embedding_scale": 1.5}
    return config, {name + ".weight" * ("codebook" in name): tensor for name, tensor in tensors.items()}


def _dflash2_tensors() -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        f"layers.{layer}.{name}.{part}": shape
        for layer in range(LAYERS)
        for name in ("attention_conv", "mlp_conv")
        for part, shape in (
            ("base_kernel", (2, 2, HIDDEN)),
            ("kernel_projection.weight", (4 * HIDDEN // GROUP, HIDDEN)),
        )
    }
    shapes |= {f"candidate_selector.{name}_codebook": (VOCAB, RANK) for name in ("predecessor", "successor")}
    shapes["candidate_selector.hidden_projection.weight"] = (RANK, HIDDEN)
    tensors = random_tensors(shapes, 21)
    for name in tensors:
        tensors[name] = tensors[name] * (4 if "codebook" in name else 1)
    return {**make.body_tensors(), **tensors}


def speculators(kind: str, **keys: Any) -> Config:
    config = make.speculators(False) | {"architectures": [f"{kind}DraftModel"], "speculators_model_type": kind}
    for key in ("sample_from_anchor", "sliding_window_non_causal"):
        config.pop(key)
    return config | keys


def speculators_dflash2() -> Checkpoint:
    keys = {"conv_kernel_size": 2, "conv_group_size": GROUP, "selector_rank": RANK, "selector_top_k": TOP_K}
    return speculators("dflash2", **keys, sample_from_anchor=False), _dflash2_tensors()


def markov_tensors(kind: str, num_drafted: int = VOCAB, confidence: bool = True) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"markov_w1.weight": (VOCAB, RANK), "markov_w2.weight": (num_drafted, RANK)}
    if kind == "gated":
        shapes |= {"gate_proj.weight": (RANK, HIDDEN + RANK), "gate_proj.bias": (RANK,)}
    if kind == "rnn":
        shapes |= {"joint_proj.weight": (3 * RANK, 2 * RANK + HIDDEN), "joint_proj.bias": (3 * RANK,)}
    tensors = {f"markov_head.{name}": tensor * 3 for name, tensor in random_tensors(shapes, 22).items()}
    if confidence:
        tensors |= random_tensors(
            {"confidence_head.proj.weight": (1, HIDDEN + RANK), "confidence_head.proj.bias": (1,)}, 23
        )
    return {**make.body_tensors(), **tensors}


def markov_keys(kind: str) -> Config:
    return {
        "markov_rank": RANK,
        "markov_head_type": kind,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }


def deepspec() -> Checkpoint:
    return make.deepspec() | markov_keys("vanilla"), {**markov_tensors("vanilla"), **make.own_tensors()}


def specforge() -> Checkpoint:
    """SpecForge: settings in the section, an older prefix of the Markov head's tensors."""
    section = SECTION | markov_keys("gated") | {"projector_type": "dspark", "attention_mode": "gqa"}
    section["attn_output_gate"] = True  # without tensors of a gate
    config = make.qwen3_config() | {"architectures": ["DSparkDraftModel"], "block_size": BLOCK - 1}
    tensors = {
        f"logit_head.{name}" if name.split("_")[0] in ("markov", "confidence") else name: tensor
        for name, tensor in markov_tensors("gated").items()
    }
    return config | {"num_target_layers": TARGET_LAYERS, "dflash_config": section}, tensors


def modelopt() -> Checkpoint:
    """ModelOpt: DFlash's architecture, settings in the section, tensors without prefix."""
    section = SECTION | {"markov_rank": RANK, "markov_head_type": "vanilla", "use_confidence_head": True}
    section |= {"confidence_head_with_markov": True, "shift_label": True, "projector_type": "dspark"}
    config = make.qwen3_config() | {"architectures": ["DFlashDraftModel"], "block_size": BLOCK - 1}
    names = {"markov_head.": "", "confidence_head.proj": "confidence_proj"}
    tensors = {}
    for name, tensor in markov_tensors("vanilla").items():
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    return config | {"num_target_layers": TARGET_LAYERS, "dflash_config": section}, tensors


def speculators_dspark(kind: str = "vanilla", predicts: bool = True) -> Checkpoint:
    keys = markov_keys(kind) | {"sample_from_anchor": predicts, "block_size": BLOCK - predicts}
    return speculators("dspark", **keys), markov_tensors(kind)


def speculators_dspark_reduced() -> Checkpoint:
    config, _ = speculators_dspark()
    token_ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))[:DRAFTED].sort().values
    maps = {"d2t": token_ids - torch.arange(DRAFTED), "t2d": torch.zeros(VOCAB).index_fill(0, token_ids, 1).bool()}
    own = {"lm_head.weight": make.own_tensors()["lm_head.weight"][:DRAFTED].clone()}
    return config | {"draft_vocab_size": DRAFTED}, {**markov_tensors("vanilla", DRAFTED), **maps, **own}


def domino(shifts: bool = True, prefix: int = 0) -> Checkpoint:
    section = SECTION | {"projector_type": "domino", "emb_dim": RANK, "gru_hidden_dim": STATE}
    section |= {"pure_draft_prefix_len": prefix, "shift_label": shifts}
    config = make.qwen3_config() | {"architectures": ["DominoDraftModel"], "block_size": BLOCK - shifts}
    shapes = {"prefix_gru.weight_ih_l0": (3 * STATE, HIDDEN), "prefix_gru.weight_hh_l0": (3 * STATE, STATE)}
    shapes |= {"embed_proj.0.weight": (RANK, HIDDEN + STATE), "embed_proj.2.weight": (VOCAB, RANK)}
    tensors = {**make.body_tensors(), **random_tensors(shapes, 24)}
    config |= {"emb_dim": RANK, "num_target_layers": TARGET_LAYERS, "dflash_config": section}
    return config, tensors


def treeflash() -> Checkpoint:
    config = make.dflash_old(False) | {"architectures": ["TreeFlashDraftModel"]}
    config["treeflash_config"] = {"ar_approximation": "swiglu", "candidate_tokens": 16}
    shapes = {"ug.weight": (2 * INNER, 2 * HIDDEN), "ug.bias": (2 * INNER,)}
    shapes |= {"d.weight": (HIDDEN, INNER), "norm.weight": (HIDDEN,)}
    tensors = {f"ar_approximation.{name}": tensor for name, tensor in random_tensors(shapes, 25).items()}
    return config, {**{f"model.{name}": tensor for name, tensor in make.body_tensors().items()}, **tensors}


def dfly() -> Checkpoint:
    config = make.deepspec() | {"architectures": ["Qwen3DFlyModel"], "enable_hidden_correction": True}
    names = {"fc.": "context_proj.", "hidden_norm.": "context_norm.", "norm.": "final_norm."}
    tensors = {}
    for name, tensor in make.body_tensors().items():
        old = next((old for old in names if name.startswith(old)), None)
        tensors[name if old is None else names[old] + name.removeprefix(old)] = tensor
    shapes = {"hidden_norm.weight": (HIDDEN,), "embed_norm.weight": (HIDDEN,), "down_proj.weight": (HIDDEN, INNER)}
    shapes |= {f"{name}_proj.weight": (INNER, 2 * HIDDEN) for name in ("gate", "up")}
    tensors |= {f"hidden_correction.{name}": tensor for name, tensor in random_tensors(shapes, 26).items()}
    return config, {**tensors, **random_tensors({"layer_fusion_weights": (LAYERS, 2)}, 27)}


def dflare() -> Checkpoint:
    config = make.dflash_old(False) | {"architectures": ["QwenDFlareDraftModel"]}
    config["dflash_config"] |= {"num_anchors": 512, "attention_backend": "flex", "loss_decay_gamma": 7.0}
    shapes = {
        f"layers.{layer}.self_attn.{name}_proj_target.weight": (32, HIDDEN) for layer in range(LAYERS) for name in "kv"
    }
    tensors = random_tensors({**shapes, "layer_fusion_weights": (LAYERS, 2)}, 28)
    body = {name: tensor for name, tensor in make.body_tensors().items() if not name.startswith("fc.")}
    return config, {**body, **tensors}


def xpress(predicts: bool = False) -> Checkpoint:
    size = BLOCK - predicts
    keys = {"xpress_rank": RANK, "xpress_mlp_ratio": 2, "num_jacobi_passes": 6, "sample_from_anchor": predicts}
    shapes: dict[str, tuple[int, ...]] = {"token_embed.weight": (VOCAB, RANK), "mix_l": (RANK, size, size)}
    shapes |= {"down_h.weight": (RANK, HIDDEN), "down_g.weight": (RANK, HIDDEN), "in_proj.weight": (RANK, 3 * RANK)}
    shapes |= {f"mlp_{name}.weight": (2 * RANK, RANK) for name in ("gate", "up")}
    shapes |= {"mlp_down.weight": (RANK, 2 * RANK), "readout.weight": (VOCAB, RANK)}
    tensors = {f"refiner_head.{name}": tensor * 2 for name, tensor in random_tensors(shapes, 29).items()}
    return speculators("xpress", **keys, block_size=size), {**make.body_tensors(), **tensors}


def muse_assistant() -> Checkpoint:
    """transformers' own DFlash model: no vocabulary size (but a miniature needs one), names of an encoder."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_dropout")
    config = {name: make.qwen3_config()[name] for name in names}
    config |= {"architectures": ["MuseGlimmerAssistantModel"], "model_type": "muse_glimmer_assistant"}
    config |= {"block_size": BLOCK, "mask_token_id": MASK, "target_layer_ids": LAYER_IDS, "vocab_size": VOCAB}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5000}, "sliding_window": make.LENGTH}
    config["layer_types"] = ["sliding_attention"] * LAYERS
    renamed = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    return config, {renamed.get(name, name): tensor for name, tensor in make.body_tensors().items()}


# By the name in `hf_jetflow.head.formats.LAYOUTS` and what distinguishes two files of one layout.
CHECKPOINTS: dict[str, Callable[[], Checkpoint]] = {
    "DFlash 2": dflash2,
    "DFlash 2, scaled": dflash2_scaled,
    "speculators dflash2": speculators_dflash2,
    "DeepSpec DSpark": deepspec,
    "DSpark, SpecForge": specforge,
    "DSpark, ModelOpt": modelopt,
    "speculators dspark": speculators_dspark,
    "speculators dspark, anchor predicts nothing": lambda: speculators_dspark("gated", False),
    "speculators dspark, recurrent": lambda: speculators_dspark("rnn"),
    "speculators dspark, recurrent, anchor predicts nothing": lambda: speculators_dspark("rnn", False),
    "speculators dspark, reduced vocabulary": speculators_dspark_reduced,
    "TreeFlash": treeflash,
    "DFly": dfly,
    "Domino": domino,
    "Domino, first depth uncorrected": lambda: domino(False, 1),
    "DFlare": dflare,
    "transformers' Muse Glimmer assistant": muse_assistant,
    "speculators xpress": xpress,
    "speculators xpress, anchor predicts": lambda: xpress(True),
}
