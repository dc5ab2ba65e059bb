"""`count`: launches and host waits inside a block, by step of the round and by source line.

A captured function runs as written here, counts as one launch, and must not wait: `tests/test_captured_draft.py` shows
that it is one graph.
"""

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from hf_jetflow.bench.counts import STEPS, watched_steps
from hf_jetflow.target.prefilled import PrefilledTarget

from .device import install


FORWARD = "forward"  # of the target, as a captured function


@dataclass
class Counts:
    """Counts of the rounds of one or several `generate` calls; "other" is what runs outside of their steps."""

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)  # by step and place
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    captured: Counter[tuple[str, str]] = field(default_factory=Counter)  # their operations, by step and function
    step: str = "other"
    function: str | None = None  # the captured one that runs
    num_rounds: int = 0

    def per_round(self, events: Counter[tuple[str, str]], steps: tuple[str, ...] = STEPS) -> float:
        """Events of some steps of a round, divided by the rounds."""
        return sum(number for (where, _), number in events.items() if where in steps) / max(self.num_rounds, 1)

    def places(self, events: Counter[tuple[str, str]]) -> list[tuple[str, str, float]]:
        """Step, place and events per round, the most frequent first."""
        return [
            (step, place, number / self.num_rounds) for (step, place), number in events.most_common() if step in STEPS
        ]


@contextmanager
def count() -> Iterator[Counts]:
    """Counts what runs inside on the pretended device."""
    counts, device = Counts(), install()

    def listen(kind: str, operation: str) -> None:
        if counts.function is not None:
            assert kind == "launch", f"a captured function waits for {operation}"
            counts.captured[counts.step, counts.function] += 1
            return
        events = counts.launches if kind == "launch" else counts.waits
        events[counts.step, _place(sys._getframe(1), operation)] += 1

    @contextmanager
    def watch(step: str) -> Iterator[None]:
        outer, counts.step = counts.step, step
        yield
        counts.step = outer
        counts.num_rounds += step == "end_round"

    forward_of, captured = PrefilledTarget.forward_of, PrefilledTarget.captured
    PrefilledTarget.forward_of = lambda self, model: _as_captured(counts, model) if self.is_compiled else model
    PrefilledTarget.captured = lambda _self, function, **_: _as_captured(counts, function)
    device.listen(listen)
    try:
        with watched_steps(watch):
            yield counts
    finally:
        device.listen(None)
        PrefilledTarget.forward_of, PrefilledTarget.captured = forward_of, captured


def _as_captured(counts: Counts, function: Any) -> Any:
    @functools.wraps(function, updated=())
    def captured(*args: Any, **kwargs: Any) -> Any:
        counts.function = getattr(function, "__name__", FORWARD)
        counts.launches[counts.step, f"captured {counts.function}"] += 1
        try:
            return function(*args, **kwargs)
        finally:
            counts.function = None

    return captured


def _place(frame: FrameType | None, operation: str) -> str:
    """File and line of the package's innermost frame, and the operation."""
    while frame is not None:
        file = frame.f_code.co_filename
        if "/hf_jetflow/" in file:
            return f"{file.rsplit('/hf_jetflow/', 1)[1]}:{frame.f_lineno} {operation}"
        frame = frame.f_back
    return operation
