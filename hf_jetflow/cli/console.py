"""What the commands print: progress and notes on stderr, results on stdout."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


TABLE_WIDTH = 120  # in a file or a pipe, unless COLUMNS is set


class ConsoleReporter:
    """Progress bars, one per stage, and lines of the log; a quiet one prints warnings only."""

    def __init__(self, bars: Progress, quiet: bool):
        self._bars = bars
        self._quiet = quiet
        self._stages: dict[str, tuple[TaskID, int]] = {}  # the bar and how much is done

    def __call__(self, done: int, total: int, what: str) -> None:
        bar, done_before = self._stages.get(what, (None, 0))
        if bar is None:  # an earlier run may have done a part, which does not count for the remaining time
            self._bars.start()
            bar = self._bars.add_task(what, total=total, completed=done)
        elif done < done_before:  # the stage starts again
            self._bars.reset(bar, total=total, completed=done)
        else:
            self._bars.update(bar, completed=done, total=total)
        self._stages[what] = bar, done

    def say(self, text: str) -> None:
        if not self._quiet or text.startswith("warning: "):
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(quiet: bool = False) -> Iterator[ConsoleReporter]:
    """A reporter whose bars are shown inside the block. Quiet: neither these nor those of transformers and the Hub."""
    if quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    bars = Progress(*columns, *times, console=Console(stderr=True), disable=quiet)
    try:
        yield ConsoleReporter(bars, quiet)
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
