"""Predict speedup by node budget and batch size on other hardware.

Example:

    hf-jetflow simulate --target Qwen/Qwen3-8B --head runs/my-head --acceptance bench.json --hardware h100-graphed

docs/cost-model.md compares predictions with measurements. `--plot` needs the extra `bench`, a .gguf target the extra
`train`: pip install 'hf-jetflow[bench,train]'.
"""

from dataclasses import dataclass, field

from ..simulate.inputs import read_acceptance, read_hardware
from ..simulate.plots import check_plot_path
from ..simulate.settings import SimulateSettings
from ..target.settings import check_head, model_source


@dataclass
class Output:
    """What is printed."""

    quiet: bool = field(default=False, metadata={"help": "Print no table."})


SETTINGS = (SimulateSettings, Output)


def check(settings: SimulateSettings, _: Output) -> None:
    read_acceptance(settings)
    read_hardware(settings.hardware)
    if settings.plot is not None:
        check_plot_path(settings.plot)
    model_source(settings.target)
    check_head(settings.head)


def run(settings: SimulateSettings, output: Output) -> None:
    from ..simulate.report import speedup_table
    from ..simulate.simulate import run_simulation
    from .console import note_files, table_console

    result = run_simulation(settings)
    if not output.quiet:
        console = table_console()
        console.print(speedup_table(result))
        console.print(*result["notes"], sep="\n", highlight=False, soft_wrap=True)
    note_files([settings.json, settings.plot])
