"""JSON lines files: read with errors that name the line, appended to so that a killed writer loses no record."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import JetFlowError


_AS_OBJECTS = 'write one object in braces on each line, such as {"prompt": "..."}'


def read_jsonl(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Records of a JSON lines file; for the errors see `numbered_records`."""
    return (record for _, _, record in numbered_records(path))


def numbered_records(path: str | os.PathLike) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """
    Line number (from 1), byte offset and content of each record. Empty lines are skipped.

    A last line without a newline that is no JSON is skipped too: its writer was killed.

    Raises:
        JetFlowError: If the file does not exist, or a line holds no JSON object.
    """
    if not Path(path).exists() or Path(path).is_dir():
        raise JetFlowError(f"{path} does not exist or is a folder; give the path of a JSON lines file")
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                if not line.endswith(b"\n"):
                    return
                if isinstance(error, UnicodeDecodeError):
                    raise JetFlowError(f"{path}, line {number}: not UTF-8 text; save the file as UTF-8") from error
                remedy = "repair or remove the line" if line.lstrip().startswith(b"{") else _AS_OBJECTS
                raise JetFlowError(
                    f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno}); {remedy}"
                ) from error
            if not isinstance(record, dict):
                raise JetFlowError(
                    f"{path}, line {number}: expected a JSON object, got a {type(record).__name__}; {_AS_OBJECTS}"
                )
            yield number, start, record


def append_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """
    Append records to a JSON lines file.

    Raises:
        JetFlowError: If they cannot be written. Records written earlier stay in the file.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        raise JetFlowError(
            f"{path} cannot be written ({error.strerror or error}); earlier records are safe: free disk space, check "
            "the permissions and run the same command again"
        ) from error


def drop_partial_line(path: Path) -> None:
    """Remove a half-written last line, so that appending starts on a new line."""
    with open(path, "rb+") as file:
        size = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(size)


def check_same_settings(
    path: Path,
    earlier: dict[str, Any],
    settings: dict[str, Any],
    otherwise: str = "delete the file to start again",
) -> None:
    """
    Refuse to continue what was started with other settings.

    Args:
        path: The file or folder, for the message.
        earlier, settings: Values that JSON can hold.
        otherwise: What to do to use the new settings, for the message.

    Raises:
        JetFlowError: Naming each setting that differs.
    """
    settings = json.loads(json.dumps(settings))
    differing = [
        f"`{name}` was {shown(earlier.get(name))} and is {shown(settings.get(name))}"
        for name in sorted(earlier.keys() | settings.keys())
        if earlier.get(name) != settings.get(name)
    ]
    if differing:
        raise JetFlowError(
            f"{path} was started with other settings: {'; '.join(differing)}; use the same settings to finish it, "
            f"or {otherwise}"
        )


def shown(value: Any) -> str:
    """A value for an error message, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
