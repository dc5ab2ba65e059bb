"""Check a head against a target, and find the mistake if it drafts badly.

Example:

    hf-jetflow doctor --target org/model --head org/head

Exit status: 0 if no fault was found, 1 if one was, 2 if the examination could not be made.

A .gguf target needs the extra `train`: pip install 'hf-jetflow[train]'.
"""

from dataclasses import dataclass, field

from ..doctor.settings import DoctorSettings
from ..target.settings import PairSettings


@dataclass
class Output:
    """What is printed."""

    quiet: bool = field(default=False, metadata={"help": "Print the verdict only."})


SETTINGS = (PairSettings, DoctorSettings, Output)
FAILURE = 2  # exit status


def check(pair: PairSettings, settings: DoctorSettings, __: Output) -> None:
    settings.conversations()
    pair.check()


def run(pair: PairSettings, settings: DoctorSettings, output: Output) -> int:
    from ..doctor.doctor import examine_pair
    from ..doctor.report import print_findings, verdict_lines
    from .console import note_files, progress, table_console

    with progress(output.quiet) as report:
        report.say(f"loading {pair.target} and {pair.head} ...")
        findings = examine_pair(pair, settings, report)
    note_files([settings.json])
    console = table_console()
    if not output.quiet:
        print_findings(findings, console)
    console.print(*verdict_lines(findings), sep="\n", markup=False, highlight=False, soft_wrap=True)
    return 1 if findings["faults"] else 0
