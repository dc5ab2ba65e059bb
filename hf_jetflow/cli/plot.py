"""Draw the figure of a bench from its JSON.

Example:

    hf-jetflow plot bench.json bench.png

Needs the extra `bench`: pip install 'hf-jetflow[bench]'.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..bench.log import read_result
from ..bench.settings import plot_path


@dataclass
class PlotSettings:
    """The result to draw and the figure to write."""

    result: Path = field(metadata={"help": "JSON that `hf-jetflow bench --json` wrote.", "is_positional": True})
    figure: Path = field(metadata={"help": "File (.png or .svg) or folder to draw into.", "is_positional": True})


SETTINGS = (PlotSettings,)


def check(settings: PlotSettings) -> None:
    plot_path(settings.figure)
    read_result(settings.result)


def run(settings: PlotSettings) -> None:
    from ..bench.plots import draw_bench
    from .console import note_files

    note_files([draw_bench(read_result(settings.result), settings.figure)])
