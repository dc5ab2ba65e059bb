"""Loading a target, its tokenizer or its configuration alone, from a Hub id, a folder, or a `.gguf` file."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..head.modeling_jetflow import JetFlowHead


try:
    from transformers import GgufConfig
except ImportError:  # releases before it always unpack the weights
    GgufConfig = None


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fast_dtype() -> str:
    """bfloat16 where the device computes in it, float32 elsewhere."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


@dataclass
class PairSettings:
    """A target, a draft head for it, and the dtype of both."""

    target: str = field(metadata={"help": "Target model: a Hub id, a folder, or a .gguf file."})
    head: str = field(metadata={"help": "Draft head: a Hub id or a folder."})
    dtype: str = field(
        default="auto",
        metadata={"help": "float32, bfloat16, float16, or auto: bfloat16 where the device computes in it."},
    )

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, JetFlowHead]:
        """
        Load the target, its tokenizer and the head.

        Raises:
            ValueError: If the dtype is unknown, or the target or the head is of a kind that does not load.
            OSError: If a file is missing.
        """
        target, tokenizer = load_target(self.target, fast_dtype() if self.dtype == "auto" else self.dtype)
        return target, tokenizer, JetFlowHead.from_pretrained(self.head, dtype=target.dtype).to(target.device)


def load_target(source: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A target in evaluation mode, and its tokenizer.

    Args:
        source (`str`): Hub id, local folder, or path of a `.gguf` file (needs the `gguf` package).
        dtype (`str`): `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        ValueError: If `dtype` is unknown, or `source` is no causal language model.
        OSError: If a file is missing.
    """
    model = load_model(source, dtype)
    name, kwargs = model_source(source)
    return model, AutoTokenizer.from_pretrained(name, **kwargs)


def load_model(source: str, dtype: str) -> PreTrainedModel:
    """`load_target` without the tokenizer."""
    if dtype not in DTYPES:
        raise ValueError(f"the dtype is {dtype!r}, but one of {sorted(DTYPES)} is needed")
    name, kwargs = model_source(source)
    if "gguf_file" in kwargs and GgufConfig is not None:
        # A head borrows rows of the output embedding, which must not be packed.
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], **kwargs)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"`{source}` holds no model that generates text; give the target itself, not a head or another kind of "
            "model"
        ) from error
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval()


def load_target_config(source: str) -> PreTrainedConfig:
    """
    Configuration of a target, without its weights.

    Args:
        source (`str`): Hub id, local folder, path of its `config.json`, or of a `.gguf` file.

    Raises:
        OSError: If a file is missing.
    """
    name, kwargs = model_source(source)
    return AutoConfig.from_pretrained(name, **kwargs)


def model_source(source: str) -> tuple[str, dict[str, Any]]:
    """What the Auto classes take for a Hub id, a folder or a `.gguf` file."""
    path = Path(source)
    if source.endswith(".gguf"):
        if not path.is_file():
            raise OSError(f"`{source}` does not exist; give the path of a .gguf file, a folder or a Hub id")
        return str(path.parent), {"gguf_file": path.name}
    if (os.sep in source and source.count("/") != 1) and not path.exists():
        raise OSError(f"`{source}` does not exist; give the path of a folder, a .gguf file or a Hub id")
    return source, {}
