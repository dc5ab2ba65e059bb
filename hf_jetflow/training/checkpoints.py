"""Checkpoint folders of a run: which are complete, and what the others lack."""

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


STATE_NAME = "trainer_state.json"  # the file that is written last
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def find_checkpoints(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """The complete checkpoints of a run, oldest first, and the incomplete ones with what is wrong with each."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _NAME.fullmatch(path.name)]
    found.sort(key=lambda path: int(path.name.rpartition("-")[2]))
    faults = {path: fault for path in found if (fault := checkpoint_fault(path))}
    return [path for path in found if path not in faults], faults


def checkpoint_fault(folder: Path) -> str:
    """What keeps training from being continued from a checkpoint: files missing or cut off; empty if nothing does."""
    if not (folder / STATE_NAME).is_file():
        return f"{STATE_NAME}, which is written last, is missing"
    try:
        TrainerState.load_from_json(str(folder / STATE_NAME))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        return f"{STATE_NAME} is cut off"
    if not any(folder.glob("model*.safetensors")):
        return "model.safetensors is missing"
    damaged = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not _is_whole(path)]
    return f"{', '.join(damaged)} cut off" if damaged else ""


def _is_whole(path: Path) -> bool:
    """Whether the file is as long as it says; only the formats that tell are looked at."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return True
        except SafetensorError:
            return False
    return path.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(path)


def is_write_failure(error: Exception) -> bool:
    """Whether files could not be written: torch and safetensors have errors of their own for a full disk."""
    if isinstance(error, RuntimeError):
        return "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
    return isinstance(error, OSError | SafetensorError)
