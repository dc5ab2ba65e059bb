"""Settings that several commands share. Like every `settings.py`, importable in milliseconds, without torch."""

from dataclasses import dataclass, field
from typing import Literal

from ..errors import JetFlowError


@dataclass
class PairSettings:
    """A target, a draft head for it, and the dtype of both."""

    target: str = field(metadata={"help": "Target model: a Hub id, a folder, or a .gguf file."})
    head: str = field(metadata={"help": "Draft head: a Hub id or a folder."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "float32, bfloat16, float16, or auto: bfloat16 where the device computes in it."},
    )


def read_node_budget(text: str) -> int | str:
    """
    A node budget from text: `"auto"`, or the rows verified per round, root included.

    Raises:
        JetFlowError: If it is neither.
    """
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise JetFlowError(f"expected a node budget of at least 1, or 'auto', got {text!r}; use a number such as 32")
    return int(text)
