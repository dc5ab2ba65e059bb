"""Settings that several commands share. Like every `settings.py`, importable in milliseconds, without torch."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import JetFlowError
from ..extras import require_package
from ..files import read_json


@dataclass
class PairSettings:
    """A target, a draft head for it, and the dtype of both."""

    target: str = field(metadata={"help": "Target model: a Hub id, a folder, or a .gguf file."})
    head: str = field(metadata={"help": "Draft head: a Hub id or a folder."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "float32, bfloat16, float16, or auto: bfloat16 where the device computes in it."},
    )

    def check(self) -> None:
        """
        Refuse what cannot be loaded.

        Raises:
            JetFlowError: If a path does not exist or is no folder of a head, or a package is missing.
        """
        model_source(self.target)
        check_head(self.head)


def check_head(source: str) -> None:
    """
    Check the name of a draft head as far as its path tells.

    Raises:
        JetFlowError: If a path does not exist or is no folder of a head.
    """
    if "::" in source:  # with a subfolder, which loading looks up
        return
    path, is_path = Path(source), source.startswith((".", "/", "~")) or source.count("/") > 1
    for is_refused, fault in (
        (is_path and not path.exists(), "does not exist"),
        (path.is_file(), "is a file"),
        (path.is_dir() and not (path / "config.json").is_file(), "has no config.json"),
    ):
        if is_refused:
            raise JetFlowError(f"`{source}` {fault}; give the folder of a draft head, or a Hub id")


def model_source(source: str) -> tuple[str, dict[str, Any]]:
    """
    Name and keywords of a target for `from_pretrained` of the Auto classes.

    Args:
        source: Hub id, folder or path of a `.gguf` file.

    Raises:
        JetFlowError: If a path does not exist, or a package is missing.
    """
    path = Path(source)
    if source.endswith(".gguf"):
        if not path.is_file():
            raise JetFlowError(f"`{source}` does not exist; give the path of a .gguf file, a folder or a Hub id")
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise JetFlowError(f"`{source}` is empty or no GGUF file; download it again, or give another target")
        require_package("gguf", "GGUF files")
        return str(path.parent), {"gguf_file": path.name}
    if (os.sep in source and source.count("/") != 1) and not path.exists():
        raise JetFlowError(f"`{source}` does not exist; give the path of a folder, a .gguf file or a Hub id")
    if (path / "config.json").is_file() and read_json(path / "config.json").get("model_type") == "jetflow":
        raise JetFlowError(f"`{source}` is a draft head, not a model that generates text; give its target")
    return source, {}
