"""Converting heads between layouts: any layout is read, one is written atomically and read back."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from ..errors import JetFlowError
from ..files import atomic_write, check_new_folder
from ..head.checkpoint_files import CONFIG, WEIGHTS
from ..head.modeling_jetflow import JetFlowHead
from ..target.loading import load_head, load_model, load_target_config
from .writers import EXPORTS, TargetFacts


LAYOUT_NAMES = ("jetflow", *EXPORTS)


def convert_head(source: str, to: str, output: Path, target: str | None = None) -> list[str]:
    """
    Write a head in another layout. Tensors keep their values and dtype.

    Args:
        source (`str`): Hub id or folder of the head, in any layout that loads.
        to (`str`): One of `LAYOUT_NAMES`.
        output (`Path`): New folder.
        target (`str`, *optional*): The head's target, for the fields of the layout that describe it.

    Returns:
        `list[str]`: Parts of the head that the layout cannot hold, which were dropped.

    Raises:
        JetFlowError: If the layout is not known or cannot hold the head, the target is another one, or `output` is not
            empty.
        OSError: If a file of the head is missing or damaged.
    """
    if to not in LAYOUT_NAMES:
        raise JetFlowError(f"the layout is {to!r}, expected one of {', '.join(LAYOUT_NAMES)}")
    check_new_folder(output)
    head = load_head(source, "auto")
    facts = _target_facts(head, to, target)
    with atomic_write(output) as folder:
        folder.mkdir()
        dropped = _write(head, to, folder, facts)
    try:
        JetFlowHead.from_pretrained(output)
    except (OSError, ValueError):
        shutil.rmtree(output)
        raise
    return dropped


def _write(head: JetFlowHead, to: str, folder: Path, facts: TargetFacts) -> list[str]:
    if to == "jetflow":
        head.save_pretrained(folder)
        return []
    tensors = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    export = EXPORTS[to](head.config, tensors, facts)
    (folder / CONFIG).write_text(json.dumps(export.config, indent=2) + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in export.tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    return export.dropped


def _target_facts(head: JetFlowHead, to: str, target: str | None) -> TargetFacts:
    if target is None:
        return TargetFacts()
    config = load_target_config(target)
    text = config.get_text_config(decoder=True)
    for what, of_head, of_target in (
        ("hidden size", head.config.target_hidden_size, text.hidden_size),
        ("vocabulary size", head.config.vocab_size, text.vocab_size),
        ("number of layers", head.config.num_target_layers, text.num_hidden_layers),
    ):
        if of_head is not None and of_head != of_target:
            raise JetFlowError(
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
    """Whether the embedding module scales: Gemma by the root of the width, others by a factor of their config."""
    factors: list[Any] = [getattr(text, name, None) for name in ("embedding_multiplier", "scale_emb")]
    return text.model_type.startswith("gemma") or any(factor not in (None, 1) for factor in factors)
