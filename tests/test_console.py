"""Progress of the commands: bars on a terminal, lines in a file."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from hf_jetflow.cli import console
from hf_jetflow.cli.console import BarReporter, LineReporter, progress


@pytest.fixture
def report(monkeypatch):
    """A reporter of lines whose clock is `report.now`."""
    report = LineReporter(Console(file=io.StringIO(), width=40))
    report.now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: report.now)
    report.lines = lambda: report._console.file.getvalue().splitlines()
    return report


def test_a_log_says_every_minute_how_far_a_stage_is_and_how_long_it_takes(report):
    for done in range(31):
        report.now = 5.0 * done
        report(done, 30, "updates of a long name")
    assert report.lines() == [
        "updates of a long name: 2 of 30 in 0:00:10, about 0:02:20 left",
        "updates of a long name: 14 of 30 in 0:01:10, about 0:01:20 left",
        "updates of a long name: 26 of 30 in 0:02:10, about 0:00:20 left",
        "updates of a long name: 30 of 30 in 0:02:30",
    ]


def test_an_end_that_is_told_twice_is_one_line(report):
    for done, report.now in ((0, 0.0), (1, 20.0), (2, 30.0), (2, 31.0)):
        report(done, 2, "prompts")
    assert report.lines()[1:] == ["prompts: 2 of 2 in 0:00:30"]


def test_what_an_earlier_run_did_does_not_count_for_the_remaining_time(report):
    report(100, 104, "updates")
    report.now = 30.0
    report(101, 104, "updates")
    assert report.lines() == ["updates: 101 of 104 in 0:00:30, about 0:01:30 left"]


def test_short_stages_leave_no_line_and_a_stage_can_start_again(report):
    for start in (0.0, 100.0):
        for done in range(3):
            report.now = start + done
            report(done, 2, "prompts")
    assert report.lines() == []
    report.now = 200.0
    report(0, 2, "prompts")
    report.now = 220.0
    report(1, 2, "prompts")
    assert report.lines() == ["prompts: 1 of 2 in 0:00:20, about 0:00:20 left"]


def test_a_stage_that_made_no_progress_has_no_remaining_time(report):
    report(0, 2, "prompts")
    report.now = 20.0
    report(0, 2, "prompts")
    assert report.lines() == ["prompts: 0 of 2 in 0:00:20"]


def test_a_terminal_gets_bars_and_a_file_lines(monkeypatch):
    with progress() as report:
        assert isinstance(report, LineReporter)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with progress() as report:
        assert isinstance(report, BarReporter)


def test_where_items_end_together_the_share_of_the_work_tells_the_remaining_time(report):
    report(100, 164, "answers", 0.0)  # an earlier run wrote 100
    for report.now, done, share in ((10.0, 100, 0.1), (70.0, 103, 0.5), (130.0, 164, 1.0)):
        report(done, 164, "answers", share)
    assert report.lines() == [
        "answers: 100 of 164 in 0:00:10, about 0:01:30 left",
        "answers: 103 of 164 in 0:01:10, about 0:01:10 left",
        "answers: 164 of 164 in 0:02:10",
    ]


def test_a_bar_is_as_long_as_the_share_of_the_work_and_counts_items():
    bars = Progress(console=Console(file=io.StringIO()))
    report = BarReporter(bars, quiet=False)
    report(3, 8, "answers", 0.75)
    report(3, 8, "updates")
    report(0, 8, "updates")
    assert [(task.percentage, task.fields["count"]) for task in bars.tasks] == [(75, "3/8"), (0, "0/8")]
    bars.stop()
