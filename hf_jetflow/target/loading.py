"""Loading a target, its tokenizer, or its configuration alone, from a Hub id, a folder or a `.gguf` file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging

from ..errors import JetFlowError
from ..head.modeling_jetflow import JetFlowHead
from .settings import PairSettings, model_source


try:
    from transformers import GgufConfig
except ImportError:  # earlier releases always dequantize the weights
    GgufConfig = None


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fast_dtype() -> str:
    """The dtype `"auto"`: bfloat16 where the device computes in it, float32 elsewhere."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def read_dtype(name: str) -> torch.dtype:
    """
    The dtype that an option names.

    Raises:
        JetFlowError: If it is unknown.
    """
    if name != "auto" and name not in DTYPES:
        raise JetFlowError(f"the dtype is {name!r}, expected auto or one of {sorted(DTYPES)}")
    return DTYPES[fast_dtype() if name == "auto" else name]


def load_pair(pair: PairSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, JetFlowHead]:
    """
    Load a target, its tokenizer and a head for it.

    Raises:
        JetFlowError: If the dtype is unknown, or the target or the head cannot be loaded.
    """
    head = load_head(pair.head, read_dtype(pair.dtype))  # first: a head that is refused costs seconds, not minutes
    target, tokenizer = load_target(pair.target, pair.dtype)
    return target, tokenizer, head.to(target.device)


def load_head(source: str | os.PathLike, dtype: str | torch.dtype) -> JetFlowHead:
    """
    `JetFlowHead.from_pretrained` for a command.

    Raises:
        JetFlowError: If the head cannot be loaded.
    """
    with head_errors():
        return JetFlowHead.from_pretrained(source, dtype=dtype)


@contextmanager
def head_errors() -> Iterator[None]:
    """Turn the errors of loading a head, which name source and cause in one line, into `JetFlowError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise JetFlowError(str(error)) from error


def load_target(source: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A target in evaluation mode, and its tokenizer.

    Args:
        source (`str`): Hub id, local folder, or path of a `.gguf` file (needs the `gguf` package).
        dtype (`str`): `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        JetFlowError: If `dtype` is unknown, `source` cannot be loaded or is no causal language model, or a package is
            missing.
    """
    return load_model(source, dtype), load_tokenizer(source)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `load_target`."""
    name, kwargs = model_source(source)
    with _readable_errors(source):
        return AutoTokenizer.from_pretrained(name, **kwargs)


def load_model(source: str, dtype: str) -> PreTrainedModel:
    """`load_target` without the tokenizer."""
    torch_dtype = read_dtype(dtype)
    name, kwargs = model_source(source)
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # unlike all other bars, this one heeds no `disable_progress_bar`
    if "gguf_file" in kwargs and GgufConfig is not None:
        # A head reads rows of the output embedding, which must not be quantized.
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    with _readable_errors(source):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype, **kwargs)
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval()


def load_target_config(source: str) -> PreTrainedConfig:
    """
    Configuration of a target, without its weights.

    Args:
        source (`str`): Hub id, local folder, path of its `config.json`, or of a `.gguf` file.

    Raises:
        JetFlowError: If it cannot be loaded, or a package is missing.
    """
    name, kwargs = model_source(source)
    with _readable_errors(source):
        return AutoConfig.from_pretrained(name, **kwargs)


@contextmanager
def _readable_errors(source: str) -> Iterator[None]:
    """Say which target cannot be loaded, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if reason.startswith("Unrecognized configuration class"):
            raise JetFlowError(
                f"`{source}` holds no model that generates text; give the target itself, not a head or another kind "
                "of model"
            ) from error
        if isinstance(error, OSError) or reason.startswith("Unrecognized model in"):
            remedy = "give a Hub id, a folder or a .gguf file"
            if "connect" in reason:
                remedy = "check the connection, or give a folder or a .gguf file (docs/usage.md, Without the Hub)"
            raise JetFlowError(f"cannot load `{source}`: {reason.rstrip('.')}; {remedy}") from error
        raise
