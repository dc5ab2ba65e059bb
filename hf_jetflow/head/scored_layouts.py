"""Readers of the layouts whose heads score a node after its parent or its whole branch.

Each is one of `layouts.py` with a scorer, and sometimes other layers. All functions are pure.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING

from .checkpoint_files import Tensors
from .layouts import LAYER_KEYS, Reading, one_value, read_deepspec, read_dflash, read_speculators
from .refused_layouts import Config


SECTION = "dflash_config"
SELECTOR_KEYS = {
    "conv_kernel_size": "conv_kernel_size",
    "conv_group_size": "conv_group_size",
    "selector_rank": "branch_rank",
    "selector_top_k": "branch_top_k",
}
MARKOV_KEYS = ("markov_rank", "markov_head_type")
CONFIDENCE_KEYS = ("enable_confidence_head", "use_confidence_head", "confidence_head_with_markov")
MARKOV_KINDS = {None: "markov", "vanilla": "markov", "gated": "gated", "rnn": "rnn"}
DOMINO_KEYS = ("emb_dim", "gru_hidden_dim", "pure_draft_prefix_len", "shift_label", "projector_type")


def read_dflash2(config: Config, tensors: Tensors) -> Reading:
    """Read DFlash 2: DFlash with convolutions and a candidate selector; bidirectional unless a flag says otherwise."""
    keys = (*SELECTOR_KEYS, "selector_vocab_size")
    reading = read_dflash(config, tensors, more=keys, default_causal=False)
    return _with_selector(reading, {key: one_value(config, SECTION, key) for key in keys})


def read_speculators_dflash2(config: Config, tensors: Tensors) -> Reading:
    """Read speculators' dflash2, whose keys have defaults."""
    defaults = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}
    reading = read_speculators(config, tensors, more=tuple(SELECTOR_KEYS), default_causal=False)
    if reading.fields["draft_vocab_size"] is not None:
        raise ValueError(
            f"`draft_vocab_size` is {reading.fields['draft_vocab_size']}, but a dflash2 head scores the whole "
            "vocabulary; correct config.json"
        )
    return _with_selector(reading, {**defaults, **{key: config[key] for key in SELECTOR_KEYS if key in config}})


def _with_selector(reading: Reading, values: Config) -> Reading:
    _require(values, SELECTOR_KEYS)
    reading.fields |= {field: values[key] for key, field in SELECTOR_KEYS.items()}
    limit = values.get("selector_vocab_size")
    reading.fields |= {
        "branch_correction": "selector",
        "first_corrected_depth": 0,
        "branch_vocab_size": None if limit == reading.fields["vocab_size"] else limit,
    }
    prefix = "candidate_selector."
    reading.tensors = {
        name.removesuffix(".weight") if name.startswith(prefix) and "codebook" in name else name: tensor
        for name, tensor in reading.tensors.items()
    }
    return _renamed(reading, {prefix: "branch_correction."})


def read_dspark(config: Config, tensors: Tensors) -> Reading:
    """
    Read the DSpark of SpecForge and ModelOpt: DFlash's keys; every row predicts, unless `shift_label` is false. A file
    with `attn_output_gate` loads if it has no tensors of a gate.
    """
    keys = (*MARKOV_KEYS, *CONFIDENCE_KEYS, "shift_label", "projector_type", "attention_mode", "attn_output_gate")
    values = {key: one_value(config, SECTION, key) for key in keys}
    predicts = values["shift_label"] is not False
    reading = read_dflash(config, tensors, more=keys, anchor_predicts=predicts, default_causal=False)
    reading.tensors = {name.removeprefix("logit_head."): tensor for name, tensor in reading.tensors.items()}
    return _with_markov(reading, values)


def read_deepspec_dspark(config: Config, tensors: Tensors) -> Reading:
    """Read DeepSpec's DSpark: its dflash with a Markov head."""
    reading = read_deepspec(config, tensors, more=(*MARKOV_KEYS, *CONFIDENCE_KEYS))
    reading.fields |= _own_modules(tensors)
    return _with_markov(reading, config)


def read_speculators_dspark(config: Config, tensors: Tensors) -> Reading:
    """Read speculators' dspark. Early files do not say whether the anchor's row predicts: their drafts are counted."""
    predicts = config.get("sample_from_anchor")
    if predicts is None:
        predicts = _num_drafts(config) == config.get("block_size")
    reading = read_speculators(config, tensors, more=(*MARKOV_KEYS, *CONFIDENCE_KEYS), anchor_predicts=predicts)
    return _with_markov(reading, {"markov_rank": 256, **config})


def _num_drafts(config: Config) -> int:
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    count, size = methods[0].get("speculative_tokens"), config.get("block_size")
    if not isinstance(size, int) or count not in (size, size - 1):
        raise ValueError(
            f"`speculative_tokens` is {count} and `block_size` {size}, which does not say whether the anchor's row "
            "predicts; set `sample_from_anchor` in config.json"
        )
    return int(count)


def _with_markov(reading: Reading, values: Config) -> Reading:
    kind = values.get("markov_head_type")
    if kind not in MARKOV_KINDS:
        raise ValueError(
            f"`markov_head_type` is {kind!r}, but one of {list(MARKOV_KINDS)[1:]} is needed; use another head"
        )
    names = {"markov_head.": "branch_correction.", "markov_w": "branch_correction.markov_w"}
    names |= {part: f"branch_correction.{part}" for part in ("gate_proj.", "joint_proj.")}
    names |= {"confidence_head.proj.": "confidence_head.", "confidence_proj.": "confidence_head."}
    reading = _renamed(reading, names)
    confidence = reading.tensors.get("confidence_head.weight")
    reading.fields["confidence_inputs"] = None if confidence is None else confidence.shape[-1]
    if values.get("markov_rank"):  # 0 for heads without one
        reading.fields |= {
            "branch_correction": MARKOV_KINDS[kind],
            "first_corrected_depth": 0,
            "branch_rank": values["markov_rank"],
        }
    return reading


def read_treeflash(config: Config, tensors: Tensors) -> Reading:
    """Read TreeFlash: DFlash below a prefix, and a correction by the parent's token."""
    settings = config.get("treeflash_config") or {}
    kind, unknown = settings.get("ar_approximation"), settings.keys() - {"ar_approximation", "candidate_tokens"}
    if unknown or kind not in (None, "swiglu"):
        raise ValueError(
            f"`treeflash_config` is {settings}, but only `ar_approximation` 'swiglu' or null is supported"
        )
    rest = {key: value for key, value in config.items() if key != "treeflash_config"}
    reading = read_dflash(rest, tensors, scale=None)
    reading.tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if kind is None:
        return reading
    reading.fields |= {
        "branch_correction": "treeflash",
        "first_corrected_depth": 0,
        "branch_intermediate_size": reading.fields["intermediate_size"],
    }
    return _renamed(reading, {"ar_approximation.": "branch_correction."})


def read_domino(config: Config, tensors: Tensors) -> Reading:
    """Read Domino: DFlash with a recurrent correction. Programs disagree on two defaults, so files must have both."""
    values = {key: one_value(config, SECTION, key) for key in DOMINO_KEYS}
    _require(values, DOMINO_KEYS[:4])
    reading = read_dflash(config, tensors, more=DOMINO_KEYS, anchor_predicts=values["shift_label"])
    reading.tensors = {name.removeprefix("logit_head."): tensor for name, tensor in tensors.items()}
    reading.fields |= {
        "branch_correction": "gru",
        "first_corrected_depth": values["pure_draft_prefix_len"],
        "branch_rank": values["emb_dim"],
        "branch_state_size": values["gru_hidden_dim"],
    }
    names = {"prefix_gru.weight_ih_l0": "input_proj.weight", "prefix_gru.weight_hh_l0": "state_proj.weight"}
    names |= {"embed_proj.0.": "joint_proj.", "embed_proj.2.": "readout."}
    return _renamed(reading, {theirs: f"branch_correction.{ours}" for theirs, ours in names.items()})


def read_dflare(config: Config, tensors: Tensors) -> Reading:
    """Read DFlare: DFlash with a mixture of taps per layer, and projections of the context's own."""
    reading = read_dflash(config, tensors, more=("attention_backend",))
    reading.fields |= {"context_fusion": "layers", "own_context_kv": True}
    return reading


def read_dfly(config: Config, tensors: Tensors) -> Reading:
    """Read DFly: DeepSpec's keys, a mixture of taps per layer, and a correction like ours from the first depth on."""
    correction = "hidden_correction."
    reading = read_deepspec(config, tensors, more=("enable_hidden_correction",))
    reading.fields |= {**_own_modules(tensors), "context_fusion": "fc+layers"}
    names = {"context_proj.": "fc.", "context_norm.": "hidden_norm.", "final_norm.": "norm."}
    names |= {f"{correction}hidden_norm.": "branch_correction.slot_norm."}
    names |= {f"{correction}embed_norm.": "branch_correction.token_norm."}
    reading = _renamed(reading, {**names, correction: "branch_correction."})
    ours = reading.tensors
    if "branch_correction.gate_proj.weight" not in ours:
        return reading
    parts = [ours.pop(f"branch_correction.{name}.weight").chunk(2, dim=1) for name in ("gate_proj", "up_proj")]
    for name, halves in zip(("slot_proj", "token_proj"), zip(*parts, strict=True), strict=True):
        ours[f"branch_correction.{name}.weight"] = torch.cat(halves)
    width = len(parts[0][0])
    reading.fields |= {"branch_correction": "parent", "first_corrected_depth": 0, "branch_intermediate_size": width}
    return reading


def read_xpress(config: Config, tensors: Tensors) -> Reading:
    """Read speculators' xpress: its dflash with a refiner. The number of passes is a setting of engines."""
    reading = read_speculators(config, tensors, more=("xpress_rank", "xpress_mlp_ratio", "num_jacobi_passes"))
    rank = config.get("xpress_rank", 256)
    reading.fields |= {
        "branch_correction": "refiner",
        "first_corrected_depth": 0,
        "branch_rank": rank,
        "branch_intermediate_size": rank * config.get("xpress_mlp_ratio", 2),
    }
    return _renamed(reading, {"refiner_head.": "branch_correction."})


def read_muse_assistant(config: Config, tensors: Tensors) -> Reading:
    """
    Read transformers' `muse_glimmer_assistant`: DFlash, bidirectional, on raw embeddings. The file has neither the
    vocabulary's size nor the scale and soft cap of the logits: these are the target's.
    """
    defaults = CONFIG_MAPPING["muse_glimmer_assistant"](**config).to_dict()
    target = CONFIG_MAPPING["muse_glimmer_text"]()
    filled = {key: defaults[key] for key in LAYER_KEYS & defaults.keys()}
    filled |= {key: defaults[key] for key in ("block_size", "mask_token_id", "target_layer_ids")}
    filled |= {
        "vocab_size": target.vocab_size,
        "output_multiplier": (defaults["hidden_size"] / 256) ** -0.5,
        "final_logit_softcapping": target.final_logit_softcapping,
    }
    reading = read_dflash({**filled, **config, "model_type": "qwen3"}, tensors, default_causal=False)
    return _renamed(reading, {"encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."})


def _own_modules(tensors: Tensors) -> Config:
    return {"own_embedding": "embed_tokens.weight" in tensors, "own_lm_head": "lm_head.weight" in tensors}


def _require(values: Config, keys: Any) -> None:
    missing = [f"`{key}`" for key in keys if values.get(key) is None]
    if missing:
        raise ValueError(
            f"config.json has no {', '.join(missing)}, and programs disagree about the default; add what the head was "
            "trained with"
        )


def _renamed(reading: Reading, prefixes: dict[str, str]) -> Reading:
    """The reading with the first matching prefix of each tensor replaced."""
    renamed = {}
    for name, tensor in reading.tensors.items():
        theirs = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        renamed[name if theirs is None else prefixes[theirs] + name.removeprefix(theirs)] = tensor
    reading.tensors = renamed
    return reading
