"""The figure of a bench: speedup, tokens per round, acceptance by depth, steps of a round, growth with the context.

matplotlib is imported only when a figure is drawn.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import JetFlowError
from ..files import atomic_write
from .rows import Row, machine, row_name, temperature_label
from .settings import plot_path


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEP_COLORS = {  # from the bottom of a bar
    "draft": "#4c72b0",
    "tree": "#8172b3",
    "verify": "#dd8452",
    "walk": "#55a868",
    "commit": "#c44e52",
    "emit": "#937860",
    "rest": "#c8c8c8",
    "whole round": "#9a9a9a",
}
LINE_COLORS = ("#c44e52", "#8c613c", "#e377c2", "#17becf", "#7f7f7f")  # chain and rivals


def draw_bench(result: dict[str, Any], path: Path) -> Path:
    """
    Draw a result as PNG or SVG; the write is atomic.

    Args:
        result: The result of `run_bench`, or its JSON.
        path (`Path`): A file, or a folder for `bench.png`.

    Returns:
        `Path`: The file.

    Raises:
        JetFlowError: If there is nothing to draw, or see `plot_path`.
    """
    path = plot_path(path)
    figure = make_figure(result)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130)
    return path


def make_figure(result: dict[str, Any]) -> "Figure":
    """One column of panels for each prompt set and temperature, at the first context length and batch size."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    if not rows:
        raise JetFlowError("the result holds no rows to draw; run the bench again")
    columns = [
        [row for row in rows if (row["prompts"], row["temperature"]) == key]
        for key in dict.fromkeys((row["prompts"], row["temperature"]) for row in rows)
    ]
    panels: list[Callable[[Axes, list[Row]], None]] = [
        partial(_by_budget, field="speedup", label="speedup (median, quartiles)"),
        partial(_by_budget, field="tokens_per_round", label="tokens per round (mean, quartiles)"),
        _acceptance,
        _round_times,
    ]
    num_basic = len(panels)
    if len({row.get("context_length") for row in rows}) > 1:
        by_context = partial(_by, by="context_length", x_label="context length (tokens)")
        panels += [
            partial(by_context, field="decode_speedup", label="decoding speedup (median)"),
            partial(by_context, field="seconds_per_round", label="ms per round", scale=1000),
        ]
    if len({row.get("batch_size") for row in rows}) > 1:
        by_batch = partial(_by, by="batch_size", x_label="batch size")
        panels += [
            partial(by_batch, field="speedup", label="speedup (median)"),
            partial(by_batch, field="tokens_per_second", label="tokens per second"),
        ]
    figure = Figure(figsize=(4.3 * len(columns) + 2, 2.9 * len(panels) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), len(columns), squeeze=False, sharey="row")
    for number, (draw, panel_row) in enumerate(zip(panels, axes, strict=True)):
        for column, ax in zip(columns, panel_row, strict=True):
            draw(ax, column if number >= num_basic else _first(column))
            ax.grid(axis="y", alpha=0.3)
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
            ax.yaxis.set_tick_params(labelleft=True)
        panel_row[0].set_ylim(0, 1 if draw is _acceptance else None)  # shared by the row once all of it is drawn
        for ax in panel_row[1:]:
            ax.set_ylabel("")
        _legend(panel_row)
    for column, ax in zip(columns, axes[0], strict=True):
        length = column[0].get("context_length")
        at = f", {length} tokens" if length else ""
        ax.set_title(f"{column[0]['prompts']}, {temperature_label(column[0]['temperature'])}{at}", fontsize=11)
    facts = (machine(result["environment"]), rows[0]["dtype"], f"torch {result['environment']['torch']}")
    figure.suptitle(", ".join(facts), fontsize=10, color="#555555")
    return figure


def _first(rows: list[Row]) -> list[Row]:
    """Rows of the first context length and batch size."""
    keys = ("context_length", "batch_size")
    return [row for row in rows if all(row.get(key) == rows[0].get(key) for key in keys)]


def _legend(panel_row: Sequence["Axes"]) -> None:
    """One legend for a row of panels, next to the last."""
    entries: dict[str, Any] = {}
    for ax in panel_row:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        panel_row[-1].legend(
            entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False
        )


def _trees(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["method"] == "jetflow"]


def _others(rows: list[Row]) -> list[tuple[Row, str]]:
    """Chain and rivals, each with a color."""
    others = [row for row in rows if row["method"] not in ("plain", "jetflow")]
    return [(row, LINE_COLORS[number % len(LINE_COLORS)]) for number, row in enumerate(others)]


def _colored(rows: list[Row]) -> list[tuple[Row, Any]]:
    """All drafting methods; trees from light to dark in the order of node budgets."""
    from matplotlib import colormaps

    trees = _trees(rows)
    shades = [colormaps["viridis_r"](0.15 + 0.8 * number / max(len(trees) - 1, 1)) for number in range(len(trees))]
    return _others(rows) + list(zip(trees, shades, strict=True))


def _by_budget(ax: "Axes", rows: list[Row], field: str, label: str) -> None:
    """Trees with the quartiles over answers as error bars; chain and rivals as horizontal lines."""
    trees, spread = _trees(rows), f"{field}_spread"
    ticks, values = range(len(trees)), [row[field] for row in trees]
    bars = [
        [max(row[field] - row[spread][0], 0) if row.get(spread) else 0 for row in trees],
        [max(row[spread][1] - row[field], 0) if row.get(spread) else 0 for row in trees],
    ]
    fixed = [tick for tick in ticks if trees[tick]["node_budget"] != "auto"]
    ax.plot(fixed, [values[tick] for tick in fixed], color="#1f4e79", linewidth=1)
    if trees:
        ax.errorbar(ticks, values, yerr=bars, fmt="o", color="#1f4e79", markersize=5, capsize=3, label="tree")
    ax.set_xticks(list(ticks), [str(row["node_budget"]) for row in trees])
    ax.margins(x=0.1)
    for row, color in _others(rows):
        ax.axhline(row[field], color=color, linestyle="--", linewidth=1.3, label=row_name(row))
    ax.axhline(1, color="black", linewidth=1, label="plain")
    ax.set_xlabel("node budget")
    ax.set_ylabel(label)


def _acceptance(ax: "Axes", rows: list[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    for row, color in _colored(rows):
        shares = row["acceptance_by_depth"]
        if shares:
            style = "--" if row["method"] == "chain" else "-"
            depths = range(1, len(shares) + 1)
            ax.plot(depths, shares, style, color=color, marker=".", linewidth=1.3, label=row_name(row))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("depth")
    ax.set_ylabel("accepted, of the rounds\nthat could reach it")


def _round_times(ax: "Axes", rows: list[Row]) -> None:
    """Stacked steps of our loop; a round of any other method is one bar."""
    timed = [row for row in rows if row.get("seconds_per_round") or row["round_seconds"]]
    for tick, row in enumerate(timed):
        steps = {step: seconds for step, seconds in row["round_seconds"].items() if step in STEP_COLORS}
        whole = row.get("seconds_per_round") or sum(steps.values())
        pieces = {**steps, "rest": max(whole - sum(steps.values()), 0)} if steps else {"whole round": whole}
        bottom = 0.0
        for step in [step for step in STEP_COLORS if step in pieces]:
            height = 1000 * pieces[step]
            ax.bar(tick, height, 0.7, bottom=bottom, color=STEP_COLORS[step], label=step)
            bottom += height
    names = [str(row["node_budget"] or row_name(row)) for row in timed]
    ax.set_xticks(range(len(timed)), names, rotation=40, ha="right", fontsize=8)
    ax.set_ylabel("ms per round")


def _by(ax: "Axes", rows: list[Row], by: str, x_label: str, field: str, label: str, scale: float = 1) -> None:
    """A line per method over context lengths or batch sizes."""
    names = {row_name(row): color for row, color in _colored(_first(rows))}
    for name, color in {"plain": "black", **names}.items():
        line = [row for row in rows if row_name(row) == name and row[field] is not None]
        sizes = [row[by] for row in line]
        ax.plot(sizes, [scale * row[field] for row in line], color=color, marker=".", linewidth=1.3, label=name)
    ax.set_xticks(sorted({row[by] for row in rows}))
    ax.set_xlabel(x_label)
    ax.set_ylabel(label)
