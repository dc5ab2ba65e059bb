"""What a run writes: checkpoints, of which incomplete ones are recognized, and the head in the output folder."""

import copy
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import JetFlowError
from ..head.modeling_jetflow import JetFlowHead


STATE_NAME = "trainer_state.json"  # the file that is written last
HEAD_FILES = ("README.md", "config.json", "generation_config.json", "model.safetensors")
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def find_checkpoints(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """The complete checkpoints of a run, oldest first, and the incomplete ones with the fault of each."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _NAME.fullmatch(path.name)]
    found.sort(key=lambda path: int(path.name.rpartition("-")[2]))
    faults = {path: fault for path in found if (fault := checkpoint_fault(path))}
    return [path for path in found if path not in faults], faults


def checkpoint_fault(folder: Path) -> str:
    """The missing or cut-off file that makes a checkpoint unusable; empty if there is none."""
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
    """Whether the file is complete; only formats that tell are checked."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return True
        except SafetensorError:
            return False
    return path.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(path)


def is_write_failure(error: Exception) -> bool:
    """Whether a file could not be written: torch and safetensors have their own errors for a full disk."""
    if isinstance(error, RuntimeError):
        return "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
    return isinstance(error, OSError | SafetensorError)


def write_head(head: JetFlowHead, card: str, folder: Path) -> None:
    """
    Write a head in bfloat16, with the node budget `"auto"`, and its card into the folder of a run.

    The head itself is not changed. Files that were there stay until all new ones are written. A run that is killed
    between two of the moves leaves no `config.json`: a mixture of two heads never loads.

    Raises:
        JetFlowError: If a file cannot be written.
    """
    partial = folder / ".head.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    try:
        state = {name: _in_bfloat16(tensor) for name, tensor in head.state_dict().items()}
        head.save_pretrained(partial, state_dict=state)
        for settings, name, value in (
            (head.config, "dtype", torch.bfloat16),
            (head.generation_config, "node_budget", "auto"),
        ):
            settings = copy.deepcopy(settings)
            setattr(settings, name, value)
            settings.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        (folder / "config.json").unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        raise JetFlowError(
            f"the head cannot be written to {folder} ({error}); free disk space, check the permissions and start the "
            "same command again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _in_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
