"""Files of a bench: the log of finished measurements, from which a killed bench continues, and the result."""

import os
from pathlib import Path
from typing import Any

from ..errors import JetFlowError
from ..files import read_json
from ..jsonl import append_jsonl, check_same_settings, drop_partial_line, read_jsonl


Key = tuple[Any, ...]  # prompt set, context length, batch size, temperature, and what was measured


class BenchLog:
    """
    Records by key, in a JSON lines file whose first line holds the settings.

    Args:
        path (`Path`, *optional*): The file; without one the records stay in memory.
        settings: What the measurements depend on; values that JSON can hold.

    Raises:
        JetFlowError: If the file holds measurements of other settings, or cannot be written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path = path
        self._records: dict[Key, Any] = {}
        if path is None:
            return
        if path.exists():
            drop_partial_line(path)
        earlier = list(read_jsonl(path)) if path.exists() else []
        if len(earlier) < 2:  # nothing was measured yet
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            append_jsonl(path, [{"settings": settings}])
            return
        check_same_settings(path, earlier[0].get("settings", {}), settings)
        self._records = {tuple(line["key"]): line["record"] for line in earlier[1:]}

    def get(self, *key: Any) -> Any:
        """The record of a key, `None` before it is measured."""
        return self._records.get(key)

    def add(self, record: Any, *key: Any) -> None:
        """Store a record; it is on disk when this returns."""
        self._records[key] = record
        if self._path is not None:
            append_jsonl(self._path, [{"key": key, "record": record}])


def num_measurements(path: Path | None, facts: dict[str, Any]) -> int:
    """
    How many measurements the log of a killed bench holds.

    Raises:
        JetFlowError: If it was started with other settings than `facts`, as far as they tell.
    """
    records = list(read_jsonl(path)) if path is not None and path.exists() else []
    if len(records) < 2:
        return 0
    assert path is not None
    earlier = records[0].get("settings", {})
    known = earlier.keys() & facts.keys()
    mine, theirs = ({name: each[name] for name in known} for each in (facts, earlier))
    check_same_settings(path, theirs, mine)
    return len(records) - 1


def read_result(path: str | os.PathLike) -> dict[str, Any]:
    """
    Read the JSON of a bench.

    Raises:
        JetFlowError: If the file does not exist or holds something else.
    """
    result = read_json(path)
    if not {"environment", "rows"} <= result.keys():
        raise JetFlowError(f"{path} is not the result of a bench; give the file that `hf-jetflow bench --json` wrote")
    return result
