"""What `hf-jetflow simulate` found, as a table and as lines."""

from pathlib import Path
from typing import Any

from rich.table import Table

from ..extras import require_package
from ..files import atomic_write


def speedup_table(result: dict[str, Any]) -> Table:
    """Speedup by prompt set, node budget and batch size."""
    batch_sizes = sorted({row["batch_size"] for row in result["rows"]})
    table = Table(title=f"Predicted speedup on {result['hardware']['name']}, {result['context']} tokens of context")
    table.add_column("acceptance of", no_wrap=True)
    for column in ("nodes", "tokens/round", *(f"batch {size}" for size in batch_sizes)):
        table.add_column(column, no_wrap=True, justify="right")
    cells: dict[tuple[str, int], list[str]] = {}
    for row in result["rows"]:
        line = cells.setdefault((row["prompts"], row["node_budget"]), [f"{row['tokens_per_round']:.2f}"])
        line.append(f"{row['speedup']:.2f}")
    for (prompts, budget), line in cells.items():
        table.add_row(prompts, str(budget), *line)
    return table


def plot_speedup(result: dict[str, Any], path: Path) -> None:
    """
    Lines of speedup over the node budget, one panel per prompt set, one line per batch size.

    Raises:
        ValueError: If matplotlib is not installed, or does not know the ending of `path`.
    """
    require_package("matplotlib", "plots")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    names = list(dict.fromkeys(row["prompts"] for row in rows))
    figure, panels = plt.subplots(
        1, len(names), figsize=(4.6 * len(names), 4), sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, name in zip(panels[0], names, strict=True):
        for batch_size in sorted({row["batch_size"] for row in rows}):
            line = [row for row in rows if row["prompts"] == name and row["batch_size"] == batch_size]
            budgets, speedups = [row["node_budget"] for row in line], [row["speedup"] for row in line]
            axis.plot(budgets, speedups, marker="o", label=f"batch {batch_size}")
        axis.axhline(1, color="grey", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, map(str, budgets))
        axis.set(title=name, xlabel="nodes")
        axis.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"predicted speedup, {result['hardware']['name']}")
    panels[0][0].legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format=path.suffix.removeprefix(".") or "png")
    plt.close(figure)
