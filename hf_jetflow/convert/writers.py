"""Writing public layouts: a head's configuration and tensors in, another project's `config.json` and tensors out.

Pure functions, the reverse of `head/layouts.py`. What a layout cannot hold is refused, or dropped and reported.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..errors import JetFlowError
from ..head.checkpoint_files import Tensors
from ..head.configuration_jetflow import JetFlowConfig
from ..head.layouts import BODY_KEYS
from ..head.refused_layouts import Config
from ..head.scored_layouts import MARKOV_KINDS, SELECTOR_KEYS


SPECULATORS_VERSION = "0.9.0"  # of the format that is written


@dataclass(frozen=True)
class TargetFacts:
    """Facts about the target that a layout names."""

    name: str | None = None
    architectures: list[str] = field(default_factory=list)
    num_layers: int | None = None
    scales_embeddings: bool = False  # whether its embedding module scales the rows
    output_rows: torch.Tensor | None = None  # (draft_vocab, hidden), of its output embedding


@dataclass
class Export:
    """A head in another layout."""

    config: Config
    tensors: Tensors
    dropped: list[str]  # parts of the head that the layout cannot hold, in words


def write_jetspec(config: JetFlowConfig, tensors: Tensors, target: TargetFacts) -> Export:
    """
    Write JetSpec's layout.

    Raises:
        JetFlowError: If the layout cannot hold a part of the head; the message names it.
    """
    if len(set(config.causal_layers)) > 1:
        raise _unsupported("JetSpec", f"layers of both kinds (`is_causal` {config.is_causal})")
    if config.logit_scale != 1 or config.logit_softcap is not None:
        raise _unsupported("JetSpec", "a logit scale or soft cap")
    if config.embedding_scale is not None and (config.embedding_scale != 1 or target.scales_embeddings):
        raise _unsupported("JetSpec", f"an `embedding_scale` of {config.embedding_scale}")
    export = _dflash_body(config, tensors, target, "JetSpec")
    export.config["block_size"] = config.block_size
    export.config["dflash_config"]["causal_head"] = config.causal_layers[0]
    return export


def write_dflash(config: JetFlowConfig, tensors: Tensors, target: TargetFacts) -> Export:
    """
    Write DFlash's layout, with `block_size` in both fields that readers use. A head with a selector becomes a DFlash 2
    head, one with a Markov head a DSpark head as SpecForge writes it.

    Raises:
        JetFlowError: If the layout cannot hold a part of the head; the message names it.
    """
    parts = _scorer_parts(config)
    export = _dflash_body(config, tensors, target, "DFlash", parts)
    settings = export.config["dflash_config"]
    export.config["block_size"] = settings["block_size"] = config.num_rows
    if parts is not None:
        export.config["architectures"] = [parts.architecture]
        settings |= parts.keys
    if parts is not None and parts.kind == "dspark":
        settings |= {"projector_type": "dspark", "shift_label": config.anchor_predicts}
    flags = config.causal_layers
    if parts is not None or flags != [window is not None for window in config.layer_windows]:
        if len(set(flags)) > 1:
            raise _unsupported("DFlash", f"`is_causal` {flags} with layers {config.layer_types}")
        export.config["is_causal"] = flags[0]
    scale = _raw_embedding_scale(config, target, "DFlash")
    settings |= {"input_embedding_scale": scale} if scale != 1 else {}
    settings |= {"output_multiplier": config.logit_scale} if config.logit_scale != 1 else {}
    settings |= {"final_logit_softcapping": config.logit_softcap} if config.logit_softcap is not None else {}
    return export


def _dflash_body(
    config: JetFlowConfig, tensors: Tensors, target: TargetFacts, layout: str, parts: "ScorerParts | None" = None
) -> Export:
    can_predict = parts is not None and parts.kind == "dspark"
    if config.own_embedding or config.own_lm_head or (config.anchor_predicts and not can_predict):
        raise _unsupported(layout, "the head's own embedding or LM head, or an anchor row that predicts")
    num_target_layers = config.num_target_layers or target.num_layers
    if num_target_layers is None:
        raise JetFlowError(
            f"{layout} stores the target's number of layers, which the head's config lacks; give --target"
        )
    assert config.hidden_state_indices is not None
    portable, dropped = _portable_tensors(config, tensors, layout, parts)
    if "d2t" in portable:
        dropped.append(
            f"the draft vocabulary of {len(portable.pop('d2t'))} tokens: {layout} heads score all {config.vocab_size}"
        )
    settings = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": [index - 1 for index in config.hidden_state_indices],
    }
    described = {
        "architectures": ["DFlashDraftModel"],
        **_body(config, config.layer_types or [], config.sliding_window),
        "num_target_layers": num_target_layers,
        "dflash_config": settings,
        "dtype": _dtype_name(portable),
    }
    return Export(described, portable, dropped)


def write_speculators(config: JetFlowConfig, tensors: Tensors, target: TargetFacts) -> Export:
    """
    Write speculators' dflash layout; its dflash2 for a head with a selector, its dspark for one with a Markov head.
    Its full-attention layers are never causal, so a causal layer becomes a sliding one with the longest sequence as
    window. A draft vocabulary comes with the target's rows as LM head.

    Raises:
        JetFlowError: If the layout cannot hold a part of the head, or the target is not named.
    """
    name = target.name or config.target_name
    if name is None:
        raise JetFlowError("speculators stores the target's name, which the head's config lacks; give --target")
    if config.logit_scale != 1 or config.logit_softcap is not None:
        raise _unsupported("speculators", "a logit scale or soft cap")
    if not config.own_embedding and _raw_embedding_scale(config, target, "speculators") != 1:
        raise _unsupported("speculators", f"an `embedding_scale` of {config.embedding_scale}")
    layer_types, window, is_causal = _speculators_windows(config)
    parts = _scorer_parts(config)
    kind, architecture = ("dflash", "DFlashSpeculator") if parts is None else (parts.kind, parts.architecture)
    portable, dropped = _portable_tensors(config, tensors, "speculators", parts)
    num_drafted = config.draft_vocab_size or config.vocab_size
    if "d2t" in portable:
        portable |= _vocabulary_maps(portable["d2t"], config.vocab_size)
        if not config.own_lm_head:
            if target.output_rows is None:
                raise JetFlowError(
                    "speculators stores the LM head of a draft vocabulary; give --target to copy its rows from"
                )
            portable["lm_head.weight"] = target.output_rows.to(portable["fc.weight"].dtype)
    proposal = {"proposal_type": "greedy", "speculative_tokens": config.block_size - 1}
    described = {
        "architectures": [architecture],
        "speculators_model_type": kind,
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": name, "architectures": target.architectures},
        },
        "transformer_layer_config": _body(config, layer_types, window),
        "draft_vocab_size": num_drafted,
        "block_size": config.num_rows,
        "aux_hidden_state_layer_ids": config.hidden_state_indices,
        "mask_token_id": config.mask_token_id,
        "sliding_window_non_causal": not is_causal,
        "sample_from_anchor": config.anchor_predicts,
        **(parts.keys if parts is not None else {}),
        "dtype": _dtype_name(portable),
    }
    return Export(described, portable, dropped)


def _speculators_windows(config: JetFlowConfig) -> tuple[list[str], int | None, bool]:
    """Kinds of the layers, the window of the sliding ones, and whether these are causal."""
    kinds = list(zip(config.causal_layers, config.layer_windows, strict=True))
    longest = config.max_position_embeddings
    sliding = {(flag, window or longest) for flag, window in kinds if flag or window is not None}
    if len(sliding) > 1:
        raise _unsupported("speculators", f"`is_causal` {config.is_causal} with layers {config.layer_types}")
    layer_types = ["sliding_attention" if flag or window else "full_attention" for flag, window in kinds]
    is_causal, window = sliding.pop() if sliding else (True, None)
    return layer_types, window, is_causal


def _vocabulary_maps(token_ids: torch.Tensor, vocab_size: int) -> Tensors:
    """speculators' two views of a draft vocabulary: offsets (draft_vocab,) and membership (vocab,)."""
    is_drafted = torch.zeros(vocab_size, dtype=torch.bool)
    is_drafted[token_ids] = True
    return {"d2t": token_ids - torch.arange(len(token_ids)), "t2d": is_drafted}


@dataclass(frozen=True)
class ScorerParts:
    """What a layout stores of a branch scorer."""

    kind: str  # the name that speculators has for the layout
    architecture: str
    keys: Config
    prefixes: dict[str, str]  # from our prefixes of tensor names to theirs


def _scorer_parts(config: JetFlowConfig) -> ScorerParts | None:
    """How DFlash's and speculators' dialects store the head's branch scorer; `None` if they cannot."""
    kind = config.branch_correction
    if kind == "selector" and config.conv_kernel_size is not None:
        keys = {key: getattr(config, field) for key, field in SELECTOR_KEYS.items()}
        if config.branch_vocab_size is not None:
            keys["selector_vocab_size"] = config.branch_vocab_size
        return ScorerParts("dflash2", "DFlash2DraftModel", keys, {"branch_correction.": "candidate_selector."})
    if kind not in MARKOV_KINDS.values():
        return None
    keys = {
        "markov_rank": config.branch_rank,
        "markov_head_type": "vanilla" if kind == "markov" else kind,
        "enable_confidence_head": config.confidence_inputs is not None,
        "confidence_head_with_markov": (config.confidence_inputs or 0) > config.hidden_size,
    }
    prefixes = {"branch_correction.": "markov_head.", "confidence_head.": "confidence_head.proj."}
    return ScorerParts("dspark", "DSparkDraftModel", keys, prefixes)


def _portable_tensors(
    config: JetFlowConfig, tensors: Tensors, layout: str, parts: ScorerParts | None = None
) -> tuple[Tensors, list[str]]:
    """The tensors that other layouts know, and the parts that are dropped."""
    if config.mask_token_id is None:
        raise _unsupported(layout, "a learned mask embedding; train with --mask-token")
    if config.target_hidden_size != config.hidden_size:
        raise _unsupported(layout, f"a target of another width ({config.target_hidden_size})")
    if config.context_fusion != "fc" or (config.conv_kernel_size is not None and parts is None):
        raise _unsupported(layout, "the head's convolutions or its mixtures of taps")
    prefixes = {} if parts is None else parts.prefixes
    portable, dropped = {}, []
    for name, tensor in tensors.items():
        ours = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if ours is not None:
            portable[prefixes[ours] + name.removeprefix(ours)] = tensor
        elif not name.startswith("branch_correction."):
            portable[name] = tensor
    if config.branch_correction is not None and parts is None:
        dropped.append(
            f"the branch correction ({config.branch_correction}): all branches of a depth share one distribution there"
        )
    return portable, dropped


def _body(config: JetFlowConfig, layer_types: list[str], window: int | None) -> Config:
    """The layers as a Qwen3 configuration, with rotary parameters in the older format, which all readers accept."""
    assert config.rope_parameters is not None
    rope = {key: value for key, value in config.rope_parameters.items() if key != "rope_theta"}
    return {
        "model_type": "qwen3",
        **{key: getattr(config, key) for key in BODY_KEYS},
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "layer_types": layer_types,
        "sliding_window": window,
        "use_sliding_window": "sliding_attention" in layer_types,
        "max_window_layers": config.num_hidden_layers,
        "tie_word_embeddings": False,
    }


def _raw_embedding_scale(config: JetFlowConfig, target: TargetFacts, layout: str) -> float:
    """The head's factor on the rows of the target's embedding matrix."""
    if config.embedding_scale is None and target.scales_embeddings:
        raise _unsupported(layout, "the scale that this target's embedding module applies")
    return 1.0 if config.embedding_scale is None else config.embedding_scale


def _dtype_name(tensors: Tensors) -> str:
    return str(tensors["fc.weight"].dtype).removeprefix("torch.")


def _unsupported(layout: str, what: str) -> JetFlowError:
    return JetFlowError(f"the layout {layout} cannot hold {what}; choose another one with --to")


EXPORTS: dict[str, Callable[[JetFlowConfig, Tensors, TargetFacts], Export]] = {
    "jetspec": write_jetspec,
    "dflash": write_dflash,
    "speculators": write_speculators,
}
