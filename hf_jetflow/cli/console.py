"""What the commands print: progress and notes on stderr, results on stdout."""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..training.settings import Reporter


TABLE_WIDTH = 120  # in a file or a pipe, unless COLUMNS is set
MIN_SHARE = 0.03  # of the work, before which a share says too little of the remaining time
LINE_SECONDS = 10, 60  # of a stage, until its first line of progress and between two


class BarReporter:
    """For a terminal: progress bars, one per stage, and lines of the log; a quiet one prints warnings only."""

    def __init__(self, bars: Progress, quiet: bool):
        self._bars = bars
        self._quiet = quiet
        self._stages: dict[str, tuple[TaskID, int]] = {}  # the bar and how much is done

    def __call__(self, done: int, total: int, what: str, share: float | None = None) -> None:
        length, part = (total, done) if share is None else (1.0, share)
        shown: Any = dict(total=length, completed=part, count=f"{done}/{total}")
        bar, done_before = self._stages.get(what, (None, 0))
        if bar is None:  # an earlier run may have done a part, which does not count for the remaining time
            self._bars.start()
            bar = self._bars.add_task(what, **shown)
        elif done < done_before:  # the stage starts again
            self._bars.reset(bar, **shown)
        else:
            self._bars.update(bar, **shown)
        self._stages[what] = bar, done

    def say(self, text: str) -> None:
        if not self._quiet or text.startswith("warning: "):
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass
class _Stage:
    """A stage of a log, and what it has printed. Times are those of `time.monotonic`."""

    start: float
    first: float  # share of the work that was done before, by an earlier run
    done: int
    next_line: float
    has_lines: bool = False


class LineReporter:
    """For a file or a pipe: how far each stage is, in lines of the log, after ten seconds and then a minute apart."""

    def __init__(self, console: Console):
        self._console = console
        self._stages: dict[str, _Stage] = {}

    def __call__(self, done: int, total: int, what: str, share: float | None = None) -> None:
        least = 0.0 if share is None else MIN_SHARE
        share = done / max(total, 1) if share is None else share
        now, stage = time.monotonic(), self._stages.get(what)
        if stage is None or done < stage.done:
            stage = self._stages[what] = _Stage(now, share, done, now + LINE_SECONDS[0])
        is_end = done == total and done > stage.done and stage.has_lines
        stage.done = done
        if now < stage.next_line and not is_end:
            return
        stage.has_lines, stage.next_line = True, now + LINE_SECONDS[1]
        line, elapsed = f"{what}: {done} of {total} in {_clock(now - stage.start)}", now - stage.start
        if stage.first < share < 1 and share - stage.first >= least:
            line += f", about {_clock(elapsed / (share - stage.first) * (1 - share))} left"
        self.say(line)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def progress(quiet: bool = False) -> Iterator[Reporter]:
    """
    A reporter for the time of the block: bars on a terminal, lines elsewhere.

    Quiet, or where there is no terminal, the bars of transformers and the Hub are off.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if not (quiet or console.is_terminal):
        yield LineReporter(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    bars = Progress(*columns, *times, console=console, disable=quiet)
    try:
        yield BarReporter(bars, quiet)
    finally:
        if bars.live.is_started:
            bars.stop()


def note(text: str) -> None:
    """Print a line that is no result, such as where a file was written."""
    print(text, file=sys.stderr)


def note_files(paths: Sequence[Path | None]) -> None:
    """Say which files were written."""
    for path in paths:
        if path is not None:
            note(f"written to {path}")


def table_console() -> Console:
    """The console for tables: as wide as the terminal or the variable COLUMNS says."""
    return Console(width=shutil.get_terminal_size((TABLE_WIDTH, 0)).columns)
