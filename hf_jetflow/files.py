"""Atomic writes: a killed run leaves the old file or the new one, never half of one. JSON files of one object."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import JetFlowError


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yield a temporary path; what is written there becomes `path` at the end of the block, or is removed on an error.

    The temporary path lies in the same folder, which is created if needed, and has the same suffix. A folder can be
    written too, where `path` does not exist or is empty.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def check_new_folder(path: Path) -> None:
    """
    Check that a folder can be written: the path is free or an empty folder.

    Raises:
        JetFlowError: If it is not.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise JetFlowError(f"`{path}` exists already; give a new folder")
    check_writable(path, "--output")


def check_writable(path: Path, option: str) -> None:
    """
    Check, before work whose result goes there, that a path can be written as far as the folders on its way tell.

    Raises:
        JetFlowError: If one of them is a file, or writing in the last that exists is not allowed.
    """
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir():
        raise JetFlowError(f"`{option}` is {path}, but {folder} is a file; give a path in a folder")
    if not os.access(folder, os.W_OK):
        raise JetFlowError(f"`{option}` is {path}, but writing in {folder} is not allowed; give another path")


def check_json_path(path: Path | None) -> None:
    """
    Check the value of `--json`.

    Raises:
        JetFlowError: If it is a folder, or cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise JetFlowError(f"`--json` is the folder {path}, expected a file such as {path / 'result.json'}")
    check_writable(path, "--json")


def write_json(content: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a JSON object; the write is atomic."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """
    Read a JSON object.

    Raises:
        JetFlowError: If the file does not exist or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise JetFlowError(f"{path} does not exist; give the path of a JSON file")
    remedy = "give a file that a command wrote with `--json`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise JetFlowError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise JetFlowError(f"{path}: expected a JSON object, got a {type(content).__name__}; {remedy}")
    return content
