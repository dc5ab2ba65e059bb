"""Finished measurements of a bench, kept on disk so that a killed one continues where it stopped."""

from pathlib import Path
from typing import Any

from ..jsonl import append_jsonl, check_same_settings, drop_partial_line, read_jsonl


Place = tuple[Any, ...]  # prompt set, context length, temperature, and what was measured there


class BenchLog:
    """
    Records by their place, in a JSON lines file whose first line holds the settings.

    Args:
        path (`Path`, *optional*): The file; without one the records are in memory only.
        settings: What the measurements depend on; values that JSON can hold.

    Raises:
        JetFlowError: If the file holds measurements of other settings; the message names what differs.
            The same if the file cannot be written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path = path
        self._records: dict[Place, Any] = {}
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
        self._records = {tuple(line["place"]): line["record"] for line in earlier[1:]}

    def __len__(self) -> int:
        return len(self._records)

    def get(self, *place: Any) -> Any:
        """The record of a place, `None` where nothing was measured yet."""
        return self._records.get(place)

    def add(self, record: Any, *place: Any) -> None:
        """Keep a record; it is on disk when this returns."""
        self._records[place] = record
        if self._path is not None:
            append_jsonl(self._path, [{"place": place, "record": record}])
