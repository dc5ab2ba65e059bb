"""Find and read the files of a checkpoint, in a local folder or on the Hub.

Only `config.json`, `generation_config.json` and safetensors files (with their index) are ever requested.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open


CONFIG, SETTINGS, WEIGHTS, INDEX = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
WEIGHT_PATTERNS = (SETTINGS, WEIGHTS, INDEX, "model-*-of-*.safetensors")
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "revision", "token")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """A local folder or a repository of the Hub, and the folder in it that holds the head."""

    name: str
    subfolder: str = ""
    hub: dict[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        return os.path.isdir(self.name)

    def folder(self, *patterns: str) -> Path:
        """Local folder of the head. Files of a Hub repository that match `patterns` are downloaded first."""
        if self.is_local:
            return Path(self.name, self.subfolder)
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        return Path(
            snapshot_download(self.name, allow_patterns=[prefix + pattern for pattern in patterns], **self.hub),
            self.subfolder,
        )

    def has(self, path: str) -> bool:
        """Whether the file exists, without downloading it. Returns False when offline (`local_files_only=True`)."""
        path = f"{self.subfolder}/{path}" if self.subfolder else path
        if self.is_local:
            return Path(self.name, path).exists()
        if self.hub.get("local_files_only"):
            return False
        try:
            return file_exists(self.name, path, revision=self.hub.get("revision"), token=self.hub.get("token"))
        except (OSError, HfHubHTTPError):
            return False


def locate(name: str, kwargs: dict[str, Any]) -> Source:
    """
    Resolve the name given to `from_pretrained`: a folder, a Hub id, or `id::subfolder`. Removes the Hub's keywords
    from `kwargs`.

    Raises:
        ValueError: If two subfolders are given.
        OSError: If a path is given that is not a folder.
    """
    subfolder = kwargs.pop("subfolder", "") or ""
    if "::" in name and not os.path.isdir(name):
        name, _, spelled = name.partition("::")
        if subfolder and subfolder != spelled:
            raise ValueError(f"two subfolders are given, `{spelled}` and `subfolder={subfolder!r}`; give one")
        subfolder = spelled
    is_path = os.path.exists(name) or os.path.isabs(name) or name.startswith(".") or name.count("/") > 1
    if is_path and not os.path.isdir(name):
        raise OSError(f"`{name}` is not a folder; give the folder or Hub id of a saved head")
    hub = {key: kwargs.pop(key) for key in HUB_KEYWORDS if key in kwargs}
    return Source(name, subfolder.strip("/"), hub)


def read_config(source: Source) -> dict[str, Any]:
    """
    Read `config.json` without transformers, before a class is chosen from it.

    Raises:
        OSError: If there is none.
        ValueError: If it is not a JSON object.
    """
    path = source.folder(CONFIG) / CONFIG
    if not path.is_file():
        if source.has("converter.safetensors"):
            raise OSError(
                f"`{source.name}` holds the adapter of a JetSpec++ head in `{source.subfolder or '.'}`, which is not "
                "supported; load the repository itself, without subfolder: its draft head works without the adapter"
            )
        raise OSError(f"`{source.name}` holds no config.json; give the folder or Hub id of a saved head")
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(
            f"`{source.name}`: config.json holds a {type(config).__name__}, but a JSON object is needed; download or "
            "save the head again"
        )
    return config


def read_tensors(folder: Path) -> Tensors:
    """
    All tensors of a checkpoint, one file or shards.

    Raises:
        OSError: If a file is missing or damaged. Pickled weights count as missing.
    """
    tensors: Tensors = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # not a dict
        except SafetensorError as error:
            raise OSError(f"{path.name} is damaged or cut off ({error}); download or save the head again") from error
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise OSError(
            f"no {WEIGHTS} found; a head is read from safetensors only, never from pickled weights; "
            "save it again as safetensors where you can load it"
        )
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{INDEX} is not a valid index ({error}); download or save the head again") from error
    missing = sorted(
        str(name)
        for name in names
        if Path(str(name)).name != name or not name.endswith(".safetensors") or not (folder / name).is_file()
    )
    if missing:
        raise OSError(
            f"{INDEX} lists {', '.join(missing[:3])}, but there are no such safetensors files; download or save the "
            "head again"
        )
    return [folder / name for name in sorted(names)]


def check_loaded_tensors(source: str, layout: str, info: dict[str, Any]) -> None:
    """Raise a `ValueError` that names the layout and all tensors that are missing, unexpected or misshapen."""
    problems = []
    for kind in ("missing", "unexpected"):
        names = sorted(info[f"{kind}_keys"])
        if names:
            problems.append(f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    mismatched = [
        f"{name}: {tuple(found)} in the file, {tuple(wanted)} by config.json"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    if mismatched:
        problems.append(f"{len(mismatched)} misshapen ({'; '.join(mismatched[:3])})")
    if problems:
        raise ValueError(
            f"`{source}` ({layout}): the tensors do not match config.json: {'; '.join(problems)}. Nothing was loaded; "
            "the checkpoint is incomplete, or its config.json belongs to another head"
        )


@contextmanager
def readable_load_errors(source: str) -> Iterator[None]:
    """Turn any error while loading into one line that names the source and the cause."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(
            f"`{source}`: config.json is not valid JSON ({error}); download or save the head again"
        ) from error
    except StrictDataclassError as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"`{source}`: config.json has a wrong field: {cause}; correct it there") from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        cause = " ".join(str(error).split())
        raise OSError(
            f"there is no folder `{source}` in {Path.cwd()}, and the Hub gives no such head ({cause.rstrip('.')}); "
            "give the folder or Hub id of a saved head, or check connection and access"
        ) from error
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        cause = " ".join(str(error).split())
        raise kind(cause if source in cause else f"`{source}`: {cause}") from error
