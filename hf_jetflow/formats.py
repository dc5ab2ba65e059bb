"""Which checkpoint layouts a head loads from, and what is said about the rest.

Reads `config.json` itself, before any class is chosen from it, so that a foreign layout is refused by its name.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils.hub import cached_file


HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def require_jetflow_layout(source: str, kwargs: dict[str, Any]) -> None:
    """Refuse any `config.json` that does not describe a JetFlow head, naming the layout that was found."""
    if not os.path.isdir(source) and (os.path.exists(source) or os.path.isabs(source) or source.startswith(".")):
        raise OSError(f"`{source}` is not a folder; give the folder or Hub id of a saved head")
    path = find_file(source, "config.json", kwargs)
    if path is None:
        raise OSError(f"`{source}` holds no config.json; give the folder or Hub id of a saved head")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    if not isinstance(config, dict):
        raise ValueError(f"`{source}`: config.json holds a {type(config).__name__}, but a JSON object is needed")
    if config.get("model_type") != "jetflow":
        raise ValueError(
            f"`{source}` holds {layout_name(config)}, but this version loads heads in the JetFlow layout only "
            '(`"model_type": "jetflow"` in config.json)'
        )


def find_file(source: str, name: str, kwargs: dict[str, Any]) -> str | None:
    """Path of a file of a local folder or Hub id, downloaded if need be; `None` where there is no such file."""
    hub_kwargs = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)


def layout_name(config: dict[str, Any]) -> str:
    """What a foreign `config.json` describes, in words for an error message."""
    if "speculators_model_type" in config:
        return f"a speculators checkpoint (`speculators_model_type: {config['speculators_model_type']}`)"
    for key, name in (("dflash_config", "a JetSpec / DFlash head"), ("jetspec_config", "a TensorRT JetSpec head")):
        if key in config:
            return name
    architectures = config.get("architectures") or ["no architecture"]
    return f"`{architectures[0]}` (`model_type: {config.get('model_type')}`)"


def check_loaded_tensors(source: str, info: dict[str, Any]) -> None:
    """Raise a `ValueError` naming the tensors when a load was not exact."""
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
            f"`{source}`: the tensors do not match config.json: {'; '.join(problems)}. Nothing was loaded; "
            "the checkpoint is incomplete, or its config.json belongs to another head"
        )


@contextmanager
def readable_load_errors(source: str) -> Iterator[None]:
    """Turn whatever goes wrong while loading into one line that names the source and the cause."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(
            f"`{source}`: config.json is not valid JSON ({error}); download or save the head again"
        ) from error
    except SafetensorError as error:
        raise OSError(
            f"`{source}`: model.safetensors is damaged or cut off ({error}); download or save the head again"
        ) from error
    except StrictDataclassError as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"`{source}`: config.json has a wrong field: {cause}") from error
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        cause = " ".join(str(error).split())
        raise kind(cause if source in cause else f"`{source}`: {cause}") from error
