"""One reader per checkpoint layout: `config.json` and tensors in, fields of `JetFlowConfig` and our tensors out.

All functions are pure. An unsupported key is an error, never a warning: a head that was read wrongly loads without a
sign and drafts badly.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from .checkpoint_files import Tensors
from .configuration_jetflow import spaced_layer_ids
from .refused_layouts import Config


BODIES = ("qwen3", "llama")  # a file may omit their defaults; all layouts share Qwen3's layer
BODY_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
)
ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling")
WINDOW_KEYS = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
LAYER_KEYS = {*BODY_KEYS, *ROPE_KEYS, *WINDOW_KEYS}
# Keys that do not affect drafting.
DESCRIPTIVE_KEYS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "loss_decay_gamma",
    "max_anchors",
    "model_type",
    "name_or_path",
    "num_anchors",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# Values at which an unsupported key has no effect. All other keys have no effect if they are empty, 0 or false.
NEUTRAL_VALUES = {
    "attention_value_scale": 1,
    "is_neox_style": True,
    "partial_rotary_factor": 1,
    "projector_type": "dflash",
}
# These have no effect on text, which has one position per token.
NEUTRAL_ROPE_KEYS = {"mrope_section", "mrope_interleaved"}


@dataclass
class Reading:
    """A checkpoint, translated into our configuration fields and tensor names."""

    fields: Config  # of `JetFlowConfig`
    tensors: Tensors  # by our names
    causality: str = ""  # the flag or rule that `is_causal` was read from
    contradictions: list[str] = field(default_factory=list)  # flags that disagree and were overruled


def read_jetflow(config: Config, tensors: Tensors) -> Reading:
    """Read our own layout."""
    return Reading(config, tensors)


def read_dflash(
    config: Config,
    tensors: Tensors,
    section: str = "dflash_config",
    scale: float | None = 1.0,
    more: Collection[str] = (),
    anchor_predicts: bool = False,
    default_causal: bool | None = None,
) -> Reading:
    """
    Read the layout that DFlash, JetSpec, Automodel and TensorRT-Edge-LLM share: settings in a section of their own.

    Args:
        section (`str`): Name of that section.
        scale (`float`, *optional*): `embedding_scale` if the file has none.
        more (`Collection[str]`): Further keys, which the caller reads.
        anchor_predicts (`bool`): Whether every row predicts.
        default_causal (`bool`, *optional*): Causality of all layers if no flag says it; `None` for the rule of
            `read_causality`.
    """
    settings = config.get(section) or {}
    shared = ("input_embedding_scale", "output_multiplier", "logit_scale", "final_logit_softcapping")
    block = ("block_size", "mask_token_id", "target_layer_ids")
    refuse_unknown_keys(config, {section, *LAYER_KEYS, *shared, *block, *more, "is_causal", "num_target_layers"})
    refuse_unknown_keys(
        settings, {*shared, *block, *more, "causal_head", "causal", "target_hidden_size"}, f"{section}."
    )
    values = {key: one_value(config, section, key) for key in (*shared, *block)}
    fields = read_body(config)
    if settings.get("target_hidden_size", fields["hidden_size"]) != fields["hidden_size"]:
        raise ValueError(
            f"`{section}.target_hidden_size` is {settings['target_hidden_size']} and `hidden_size` "
            f"{fields['hidden_size']}: a head with a `hidden_dim_adapter` is not as wide as its target and cannot "
            "borrow its embedding; train a head for this target"
        )
    num_target_layers, layer_ids = config.get("num_target_layers"), values["target_layer_ids"]
    if layer_ids is None and num_target_layers is not None:
        layer_ids = spaced_layer_ids(num_target_layers, fields["num_hidden_layers"])
    flags, causality, contradictions = read_causality(config, section, fields["layer_types"], default_causal)
    fields |= {
        "block_size": _block_size(values, anchor_predicts),
        "anchor_predicts": anchor_predicts,
        "mask_token_id": values["mask_token_id"],
        "hidden_state_indices": _behind_embeddings(layer_ids),
        "num_target_layers": num_target_layers,
        "is_causal": flags,
        "embedding_scale": values["input_embedding_scale"] or scale,
        "logit_scale": (values["output_multiplier"] or 1.0) * (values["logit_scale"] or 1.0),
        "logit_softcap": values["final_logit_softcapping"] or None,
    }
    return Reading(fields, tensors, causality, contradictions)


def read_jetspec(config: Config, tensors: Tensors) -> Reading:
    """Read JetSpec and Automodel: DFlash's keys; the target's embedding module is called."""
    return read_dflash(config, tensors, scale=None)


def read_tensorrt(config: Config, tensors: Tensors) -> Reading:
    """Read TensorRT-Edge-LLM: JetSpec's keys in a section `jetspec_config`."""
    return read_dflash(config, tensors, section="jetspec_config", scale=None)


def read_deepspec(config: Config, tensors: Tensors, more: Collection[str] = ()) -> Reading:
    """Read DeepSpec's dflash: every row predicts, the file holds embedding and LM head, id -1 is the embedding. The
    caller reads the keys in `more`."""
    block = ("block_size", "mask_token_id", "target_layer_ids")
    refuse_unknown_keys(config, {*LAYER_KEYS, *block, *more, "num_target_layers", "is_causal"})
    fields = read_body(config)
    flags, causality, contradictions = read_causality(config, None, fields["layer_types"])
    fields |= {
        "block_size": _block_size(config, anchor_predicts=True),
        "mask_token_id": config.get("mask_token_id"),
        "hidden_state_indices": _behind_embeddings(config.get("target_layer_ids")),
        "num_target_layers": config.get("num_target_layers"),
        "is_causal": flags,
        "anchor_predicts": True,
        "own_embedding": True,
        "own_lm_head": True,
    }
    return Reading(fields, tensors, causality, contradictions)


def read_speculators(
    config: Config,
    tensors: Tensors,
    more: Collection[str] = (),
    anchor_predicts: bool | None = None,
    default_causal: bool = True,
) -> Reading:
    """
    Read speculators' dflash: layer ids index `hidden_states`; the draft vocabulary is stored as offsets.

    Args:
        more (`Collection[str]`): Further keys, which the caller reads.
        anchor_predicts (`bool`, *optional*): Whether every row predicts; by default, what the file says.
        default_causal (`bool`): Causality of sliding layers if the file does not say it.
    """
    known = {
        *more,
        "speculators_model_type",
        "speculators_version",
        "speculators_config",
        "transformer_layer_config",
        "draft_vocab_size",
        "block_size",
        "aux_hidden_state_layer_ids",
        "mask_token_id",
        "target_hidden_size",
        "sliding_window_non_causal",
        "sample_from_anchor",
    }
    layer_config = copy.deepcopy(config.get("transformer_layer_config") or {})
    repeated = {key for key in LAYER_KEYS & config.keys() if config[key] == layer_config.get(key)}
    refuse_unknown_keys(config, known | repeated)
    rope = layer_config.get("rope_parameters") or {}
    layer_config["rope_parameters"] = rope.get("sliding_attention", rope) or None  # what speculators itself takes
    refuse_unknown_keys(layer_config, LAYER_KEYS, "transformer_layer_config.")
    fields = read_body(layer_config)
    flags, causality = _speculators_causality(config, fields["layer_types"], default_causal)
    if (fields["sliding_window"] or 0) >= fields["max_position_embeddings"]:
        fields |= {"sliding_window": None, "layer_types": ["full_attention"] * len(flags)}
    draft_vocab_size = config.get("draft_vocab_size", 32000)
    is_reduced = draft_vocab_size != fields["vocab_size"]
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    predicts = bool(config.get("sample_from_anchor", False)) if anchor_predicts is None else anchor_predicts
    fields |= {
        "block_size": _block_size(config, predicts),
        "mask_token_id": config.get("mask_token_id"),
        "hidden_state_indices": config.get("aux_hidden_state_layer_ids"),
        "num_target_layers": None,
        "target_name": verifier.get("name_or_path"),
        "draft_vocab_size": draft_vocab_size if is_reduced else None,
        "is_causal": flags,
        "anchor_predicts": predicts,
        "embedding_scale": 1.0,
        "own_embedding": "embed_tokens.weight" in tensors,
        "own_lm_head": "lm_head.weight" in tensors,
    }
    return Reading(fields, _speculators_tensors(tensors, is_reduced), causality)


def _block_size(config: Config, anchor_predicts: bool) -> int | None:
    """Our block size, the number of depths plus one. If the anchor's row predicts, files count rows, one fewer."""
    size = config.get("block_size")
    if size is not None and not isinstance(size, int):
        raise ValueError(f"`block_size` is {size!r}, but must be an integer")
    return size + 1 if size is not None and anchor_predicts else size


def _behind_embeddings(layer_ids: Any) -> list[int] | None:
    """Convert layer ids, from 0, to indices into `hidden_states`, whose entry 0 is the embedding output."""
    if layer_ids is None:
        return None
    if not isinstance(layer_ids, list) or not all(isinstance(layer_id, int) for layer_id in layer_ids):
        raise ValueError(f"`target_layer_ids` is {layer_ids!r}, but a list of integers is needed")
    return [layer_id + 1 for layer_id in layer_ids]


def _speculators_causality(config: Config, layer_types: list[str], default: bool) -> tuple[list[bool], str]:
    key = "sliding_window_non_causal"
    is_open = bool(config.get(key, not default))
    origin = f"`{key}: {str(is_open).lower()}`"
    if key not in config:
        origin = f"no `{key}`, which is {str(is_open).lower()} in speculators"
    return [kind == "sliding_attention" and not is_open for kind in layer_types], origin


def _speculators_tensors(tensors: Tensors, is_reduced: bool) -> Tensors:
    """Convert offsets to token ids, and drop tensors that only the training of the head used."""
    unused = ("t2d", "d2t", "verifier_lm_head.weight", "verifier_norm.weight")
    used = {name: tensor for name, tensor in tensors.items() if name not in unused}
    if "d2t" not in tensors:
        return used
    offsets = tensors["d2t"].long()
    token_ids = torch.arange(len(offsets)) + offsets
    if "t2d" in tensors:
        is_drafted = tensors["t2d"].bool()
        fits = len(token_ids) == int(is_drafted.sum()) and int(token_ids.max()) < len(is_drafted)
        if not fits or not bool(is_drafted[token_ids].all()):
            raise ValueError(
                "`d2t` and `t2d` name different draft vocabularies; the checkpoint is damaged: download it again"
            )
    if is_reduced:
        used["d2t"] = token_ids
    elif bool(offsets.any()):
        raise ValueError("`d2t` reorders a draft vocabulary that is as large as the target's, which is not supported")
    return used


def read_body(config: Config) -> Config:
    """Read sizes, rotary parameters and windows of the layers, with the defaults of the named body."""
    model_type = config.get("model_type", "qwen3")
    if model_type not in BODIES:
        raise ValueError(f"`model_type` of the layers is {model_type!r}, but one of {BODIES} is needed")
    given = {key: copy.deepcopy(config[key]) for key in (*BODY_KEYS, *ROPE_KEYS, *WINDOW_KEYS) if key in config}
    if any(isinstance(value, dict) for value in (given.get("rope_parameters") or {}).values()):
        raise ValueError(
            "`rope_parameters` differ by kind of layer, but all layers of a head share them: use another head"
        )
    body = CONFIG_MAPPING[model_type](**given)
    fields = {key: getattr(body, key, None) for key in BODY_KEYS}
    rope = {key: value for key, value in body.rope_parameters.items() if key not in NEUTRAL_ROPE_KEYS}
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            "`partial_rotary_factor` is not 1, and implementations of these heads disagree about it: use another head"
        )
    fields["rope_parameters"] = rope
    layer_types = getattr(body, "layer_types", None) or ["full_attention"] * body.num_hidden_layers
    has_windows = "sliding_attention" in layer_types
    fields["layer_types"] = layer_types
    fields["sliding_window"] = config.get("sliding_window", getattr(body, "sliding_window", None))
    if has_windows and fields["sliding_window"] and config.get("use_sliding_window") is False:
        raise ValueError(
            "`use_sliding_window` is false, but `layer_types` has sliding layers and `sliding_window` is "
            f"{fields['sliding_window']}; correct config.json"
        )
    if not has_windows:
        fields["sliding_window"] = None
    return fields


def read_causality(
    config: Config, section: str | None, layer_types: list[str], default: bool | None = None
) -> tuple[list[bool], str, list[str]]:
    """
    Return the in-block causality of each layer, its origin, and the flags that disagree.

    Nested flags override `is_causal`, which shared recipes write into heads of either kind. Without a flag, all layers
    are as the layout's `default`; if there is none, sliding layers are causal and full ones bidirectional.
    """
    settings = (config.get(section) or {}) if section else {}
    stated = [(f"{section}.{key}", settings.get(key)) for key in ("causal_head", "causal")]
    stated = [(key, value) for key, value in [*stated, ("is_causal", config.get("is_causal"))] if value is not None]
    wrong = [f"`{key}: {value}`" for key, value in stated if not isinstance(value, bool)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: a causality flag must be true or false; correct config.json")
    if not stated and default is not None:
        return [default] * len(layer_types), "no flag: all heads of this layout are alike", []
    if not stated:
        flags = [kind == "sliding_attention" for kind in layer_types]
        return flags, "no flag: sliding layers are causal, full ones are not", []
    (key, value), others = stated[0], stated[1:]
    contradictions = [f"`{name}: {str(other).lower()}`" for name, other in others if other != value]
    return [bool(value)] * len(layer_types), f"`{key}: {str(value).lower()}`", contradictions


def refuse_unknown_keys(config: Config, known: Collection[str], prefix: str = "") -> None:
    """Raise a `ValueError` that names the unsupported keys of a config that have an effect."""
    unknown = sorted(
        f"`{prefix}{key}: {value}`"
        for key, value in config.items()
        if key not in known and key not in DESCRIPTIVE_KEYS and not _is_neutral(key, value)
    )
    if unknown:
        raise ValueError(
            f"config.json has unsupported keys: {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}. "
            "Ignoring them could silently lower acceptance; update hf_jetflow, or remove keys that do not affect "
            "drafting from config.json"
        )


def _is_neutral(key: str, value: Any) -> bool:
    return value is None or (value == NEUTRAL_VALUES[key] if key in NEUTRAL_VALUES else value in ("", 0, [], {}))


def one_value(config: Config, section: str, key: str) -> Any:
    """A setting that old and new files place differently, in the section or at the top; both must agree."""
    inner, outer = (config.get(section) or {}).get(key), config.get(key)
    if inner is not None and outer is not None and inner != outer:
        raise ValueError(f"`{section}.{key}` is {inner}, but `{key}` is {outer}; correct config.json")
    return outer if inner is None else inner
