"""The table of checkpoint layouts that load: how each is recognized and which function reads it.

Layouts are recognized from `config.json` before transformers chooses a class from it, so a third-party layout is
refused by its name (`refused_layouts.py`). To add a layout, add one entry to `LAYOUTS`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from .checkpoint_files import Source, Tensors
from .configuration_jetflow import JetFlowConfig, check_names
from .layouts import (
    Reading,
    read_deepspec,
    read_dflash,
    read_jetflow,
    read_jetspec,
    read_speculators,
    read_tensorrt,
)
from .refused_layouts import REFUSED, Config, Refusal, architecture, is_architecture, is_speculators, setting
from .scored_layouts import (
    read_deepspec_dspark,
    read_dflare,
    read_dflash2,
    read_dfly,
    read_domino,
    read_dspark,
    read_muse_assistant,
    read_speculators_dflash2,
    read_speculators_dspark,
    read_treeflash,
    read_xpress,
)


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Layout:
    """A layout that loads."""

    name: str
    matches: Callable[[Config], bool]
    read: Callable[[Config, Tensors], Reading]
    checked: str  # what its reader was tested with, for docs/heads.md


def _has(key: str, nested: str | None = None) -> Callable[[Config], bool]:
    """Match configs that have a key, or that key within a section."""
    return lambda config: key in config and (nested is None or nested in (config[key] or {}))


def _is_dflash2(config: Config) -> bool:
    return "DFlash2" in architecture(config) or bool(setting(config, "selector_rank"))


def _is_domino(config: Config) -> bool:
    return "Domino" in architecture(config) or setting(config, "projector_type") in ("domino", "causal_v5")


def _is_dspark(config: Config) -> bool:
    is_named = "DSpark" in architecture(config) or setting(config, "projector_type") == "dspark"
    return bool(setting(config, "markov_rank")) or (is_named and architecture(config) != "Qwen3DSparkModel")


def _is_deepspec_dspark(config: Config) -> bool:
    return architecture(config) == "Qwen3DSparkModel" and _is_dspark(config)


MINIATURE = "a miniature of its keys and tensor names"
REFERENCE = f"{MINIATURE}; chains of a reference in the tests"

# The first entry that matches reads the file.
LAYOUTS = (
    Layout("JetFlow", lambda config: config.get("model_type") == "jetflow", read_jetflow, "the heads trained here"),
    Layout(
        "speculators dflash",
        is_speculators("dflash"),
        read_speculators,
        f"{MINIATURE}; logits of the speculators package, both ways",
    ),
    Layout(
        "speculators dflash2",
        is_speculators("dflash2"),
        read_speculators_dflash2,
        f"{MINIATURE}; logits and selector of the speculators package",
    ),
    Layout(
        "speculators dspark",
        is_speculators("dspark"),
        read_speculators_dspark,
        f"{MINIATURE}; logits and Markov heads of the speculators package",
    ),
    Layout(
        "speculators xpress",
        is_speculators("xpress"),
        read_xpress,
        f"{MINIATURE}; logits and refiner of the speculators package",
    ),
    Layout(
        "transformers' Muse Glimmer assistant",
        lambda config: config.get("model_type") == "muse_glimmer_assistant",
        read_muse_assistant,
        f"{MINIATURE}; rows of transformers' own model",
    ),
    Layout("TensorRT-Edge-LLM JetSpec", _has("jetspec_config"), read_tensorrt, MINIATURE),
    Layout(
        "DFlash 2",
        _is_dflash2,
        read_dflash2,
        f"{MINIATURE}; logits and chains of the dflash package",
    ),
    Layout("Domino", _is_domino, read_domino, REFERENCE),
    Layout("DeepSpec DSpark", _is_deepspec_dspark, read_deepspec_dspark, REFERENCE),
    Layout("DFly", is_architecture("Qwen3DFlyModel"), read_dfly, REFERENCE),
    Layout("DSpark", _is_dspark, read_dspark, REFERENCE),
    Layout("DFlare", is_architecture("QwenDFlareDraftModel"), read_dflare, REFERENCE),
    Layout(
        "TreeFlash",
        lambda config: "treeflash_config" in config or architecture(config) == "TreeFlashDraftModel",
        read_treeflash,
        REFERENCE,
    ),
    Layout("JetSpec", _has("dflash_config", "causal_head"), read_jetspec, MINIATURE),
    Layout("NeMo Automodel", is_architecture("Qwen3DFlashDraftModel"), read_jetspec, MINIATURE),
    Layout("DeepSpec dflash", is_architecture("Qwen3DSparkModel"), read_deepspec, MINIATURE),
    Layout(
        "DFlash",
        lambda config: "dflash_config" in config or architecture(config) == "DFlashDraftModel",
        read_dflash,
        f"{MINIATURE}; logits and chains of the dflash package, both ways",
    ),
)

ADAPTER = "adapter/head.safetensors"  # marks the root of a JetSpec++ repository


def recognize(config: Config) -> Layout:
    """
    Find the layout of a `config.json`.

    Raises:
        ValueError: If the layout is not supported. The message names it and says what to do.
    """
    for section in ("dflash_config", "jetspec_config", "speculators_config", "transformer_layer_config"):
        if not isinstance(config.get(section) or {}, dict):
            raise ValueError(
                f"config.json: `{section}` is {config[section]!r}, but must be a JSON object; correct config.json"
            )
    for refusal in REFUSED:
        if refusal.matches(config):
            raise ValueError(_refused(refusal))
    for layout in LAYOUTS:
        if layout.matches(config):
            return layout
    kind = config.get("speculators_model_type")
    found = (
        f"a speculators `{kind}`"
        if kind
        else f"`{architecture(config) or 'no architecture'}` (`model_type: {config.get('model_type')}`)"
    )
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(
        f"config.json describes {found}, which is no draft head of a known layout ({known}); give the folder or Hub "
        "id of a draft head"
    )


def refuse_unsupported_tensors(names: Iterable[str]) -> None:
    """
    Refuse a checkpoint whose config is readable but whose tensors belong to an unsupported layout.

    Raises:
        ValueError: If there is such a tensor. The message names the layout and the tensor.
    """
    for name in sorted(names):
        for refusal in REFUSED:
            if any(part in name for part in refusal.tensors):
                raise ValueError(f"{_refused(refusal)} (it holds `{name}`)")
        if "hidden_dim_adapter" in name:
            raise ValueError(f"it holds `{name}`: a head for a target of another width, train one for this target")


def _refused(refusal: Refusal) -> str:
    return f"unsupported checkpoint layout {refusal.name}: {refusal.reason}"


def read_checkpoint(layout: Layout, config: Config, tensors: Tensors, given: Config) -> Reading:
    """
    Translate a checkpoint into our configuration fields and tensor names.

    Args:
        layout ([`Layout`]): The result of `recognize`.
        config (`dict`), tensors (`dict`): The checkpoint.
        given (`dict`): Fields of `JetFlowConfig` that the caller sets; they override the file.

    Raises:
        ValueError: If the file has unsupported keys or lacks required ones. The message names them.
    """
    is_own = layout.read is read_jetflow
    if not is_own:
        refuse_unsupported_tensors(tensors)
    reading = layout.read(config, tensors)
    reading.fields = {**reading.fields, **given}
    if is_own:
        return reading
    if "is_causal" in given:
        reading.causality, reading.contradictions = "given by the caller", []
    for name in ("block_size", "mask_token_id", "hidden_state_indices"):
        if reading.fields[name] is None:
            raise ValueError(
                f"config.json does not say what the head's `{name}` is; if you know it, give `{name}=` to "
                "`from_pretrained`"
            )
    _check_windows(reading.fields)
    return reading


def read_head(
    source: Source, layout: Layout, settings: Config, tensors: Tensors, kwargs: dict[str, Any]
) -> tuple[JetFlowConfig, Tensors]:
    """
    Return the configuration and tensors of a checkpoint. Logs how a third-party layout was read.

    Args:
        source ([`Source`]): Location of the checkpoint.
        layout ([`Layout`]): The result of `recognize`.
        settings (`dict`), tensors (`dict`): Its config and its tensors.
        kwargs (`dict`): Arguments of `from_pretrained`; a `config` and fields of `JetFlowConfig` are removed.
    """
    own_fields = JetFlowConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    given = {field: kwargs.pop(field) for field in list(kwargs) if field in own_fields}
    check_names(kwargs)
    config = kwargs.pop("config", None)
    reading = read_checkpoint(layout, settings, tensors, given)
    if not isinstance(config, JetFlowConfig):
        config = JetFlowConfig.from_dict(reading.fields)
    if layout.read is not read_jetflow:
        logger.warning_once(f"`{source.name}` was read as {summary(layout, reading)}.")
        if source.has(ADAPTER):
            logger.warning_once(
                f"`{source.name}` is a JetSpec++ head. Its adapter is not supported and was left out; the head drafts "
                "without it."
            )
    return config, reading.tensors


def _check_windows(fields: Config) -> None:
    """Refuse windows that implementations interpret differently."""
    flags, window = fields["is_causal"], fields["sliding_window"]
    flags = [flags] * len(fields["layer_types"]) if isinstance(flags, bool) else flags
    is_open = any(
        kind == "sliding_attention" and not flag for kind, flag in zip(fields["layer_types"], flags, strict=False)
    )
    if is_open and window and window < fields["block_size"]:
        raise ValueError(
            f"`sliding_window` {window} is shorter than a block of {fields['block_size']} in a layer that is not "
            "causal, and implementations disagree on what such rows see; use a head without such a layer"
        )


def summary(layout: Layout, reading: Reading) -> str:
    """One line for the log on how a checkpoint was read."""
    flags = reading.fields["is_causal"]
    flags = [flags] if isinstance(flags, bool) else flags
    kinds = ", ".join("causal" if flag else "bidirectional" for flag in flags)
    layers = kinds.split(", ")[0] if len(set(flags)) == 1 else f"layers {kinds}"
    text = f"a {layout.name} head, {layers} inside the block ({reading.causality})"
    if reading.contradictions:
        text += f"; {' and '.join(reading.contradictions)} says otherwise and was overruled"
    return f"{text}. Give `is_causal=` to `from_pretrained` if this is wrong"


def layout_table() -> str:
    """The table of layouts in docs/heads.md, in Markdown."""
    lines = ["| Layout | Heads of it |", "|---|---|"]
    lines += [f"| {layout.name} | load; checked with {layout.checked} |" for layout in LAYOUTS]
    lines += [f"| {refusal.name} | refused: {refusal.reason} |" for refusal in REFUSED]
    return "\n".join(lines)
