"""Converting heads between layouts: read any, write one beside its place, move it there and read it back."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig

from ..head.checkpoint_files import CONFIG, WEIGHTS
from ..head.modeling_jetflow import JetFlowHead
from ..target.loading import load_model, model_source
from .writers import EXPORTS, TargetFacts


LAYOUT_NAMES = ("jetflow", *EXPORTS)


def convert_head(source: str, to: str, output: Path, target: str | None = None) -> list[str]:
    """
    Write a head in another layout. Tensors keep their values and dtype.

    Args:
        source (`str`): Hub id or folder of the head, in any layout that loads.
        to (`str`): One of `LAYOUT_NAMES`.
        output (`Path`): New folder.
        target (`str`, *optional*): The head's target, for what the layout says about it.

    Returns:
        `list[str]`: What the layout has no place for and was left out.

    Raises:
        ValueError: If the layout is not known, cannot hold the head, or the target is another one.
        OSError: If a file is missing or damaged, or `output` is not empty.
    """
    if to not in LAYOUT_NAMES:
        raise ValueError(f"the layout is {to!r}, but one of {', '.join(LAYOUT_NAMES)} is needed")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OSError(f"`{output}` exists already; give a new folder")
    head = JetFlowHead.from_pretrained(source, dtype="auto")
    facts = _target_facts(head, to, target)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        left_out = _write(head, to, folder, facts)
        folder.chmod(0o755)
        os.replace(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        JetFlowHead.from_pretrained(output)
    except (OSError, ValueError):
        shutil.rmtree(output)
        raise
    return left_out


def _write(head: JetFlowHead, to: str, folder: Path, facts: TargetFacts) -> list[str]:
    if to == "jetflow":
        head.save_pretrained(folder)
        return []
    tensors = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    export = EXPORTS[to](head.config, tensors, facts)
    (folder / CONFIG).write_text(json.dumps(export.config, indent=2) + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in export.tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    return export.left_out


def _target_facts(head: JetFlowHead, to: str, target: str | None) -> TargetFacts:
    if target is None:
        return TargetFacts()
    name, kwargs = model_source(target)
    config = AutoConfig.from_pretrained(name, **kwargs)
    text = config.get_text_config(decoder=True)
    for what, of_head, of_target in (
        ("hidden size", head.config.target_hidden_size, text.hidden_size),
        ("vocabulary size", head.config.vocab_size, text.vocab_size),
        ("number of layers", head.config.num_target_layers, text.num_hidden_layers),
    ):
        if of_head is not None and of_head != of_target:
            raise ValueError(
                f"the head expects a target with {what} {of_head}, but `{target}` has {of_target}; give the target "
                "that the head was made for"
            )
    rows = None
    if to == "speculators" and head.config.draft_vocab_size is not None and not head.config.own_lm_head:
        rows = _output_rows(target, head.d2t)
    return TargetFacts(
        name=target,
        architectures=list(config.architectures or []),
        num_layers=text.num_hidden_layers,
        scales_embeddings=_scales_embeddings(text),
        output_rows=rows,
    )


def _output_rows(target: str, token_ids: torch.Tensor) -> torch.Tensor:
    """Rows (draft_vocab, hidden) of the target's output embedding."""
    weight = load_model(target, "float32").get_output_embeddings().weight
    return weight.detach().cpu()[token_ids.cpu()]


def _scales_embeddings(text: PreTrainedConfig) -> bool:
    """Gemma models scale by the root of the width, some others by a factor of their configuration."""
    factors: list[Any] = [getattr(text, name, None) for name in ("embedding_multiplier", "scale_emb")]
    return text.model_type.startswith("gemma") or any(factor not in (None, 1) for factor in factors)
