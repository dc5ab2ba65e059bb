"""The figure of a simulation; matplotlib is imported only when it is drawn."""

from pathlib import Path
from typing import Any

from ..errors import JetFlowError
from ..extras import require_package
from ..files import atomic_write, check_writable


SUFFIXES = (".png", ".svg", ".pdf")


def check_plot_path(path: Path) -> None:
    """
    Check that a figure can be drawn.

    Raises:
        JetFlowError: If the suffix is unknown, the path cannot be written or matplotlib is missing.
    """
    if path.suffix not in SUFFIXES:
        raise JetFlowError(f"`--plot` is {path}, expected a name that ends in {', '.join(SUFFIXES)}")
    check_writable(path, "--plot")
    require_package("matplotlib", "plots")


def plot_speedup(result: dict[str, Any], path: Path) -> None:
    """
    Draw speedup over the node budget: one panel per prompt set, one line per batch size.

    Raises:
        JetFlowError: See `check_plot_path`.
    """
    check_plot_path(path)
    from matplotlib.figure import Figure

    rows = result["rows"]
    names = list(dict.fromkeys(row["prompts"] for row in rows))
    figure = Figure(figsize=(4.6 * len(names), 4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)
    for axis, name in zip(panels[0], names, strict=True):
        batch_sizes = sorted({row["batch_size"] for row in rows})
        for number, batch_size in enumerate(batch_sizes, 1):  # thinner lines over thicker ones: equal curves are seen
            line = [row for row in rows if row["prompts"] == name and row["batch_size"] == batch_size]
            budgets, speedups = [row["node_budget"] for row in line], [row["speedup"] for row in line]
            width = 1.5 + 3 * (len(batch_sizes) - number)
            axis.plot(budgets, speedups, marker="o", lw=width, ms=3 + width, label=f"batch {batch_size}")
        axis.axhline(1, color="grey", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, map(str, budgets))
        axis.set(title=name, xlabel="nodes")
        axis.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"predicted speedup, {result['hardware']['name']}")
    panels[0][0].legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)
