"""Terminal output of a bench: a table per prompt set, agreement by depth, and the best method."""

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .rows import CONTROL_NAME, Row, machine, nodes_label, row_groups, row_name
from .settings import LOOP_METHODS


WIDE = 112  # columns of a terminal that holds the whole table


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Print the result as tables."""
    found = result["environment"]
    console.print(f"{machine(found)}, torch {found['torch']}, transformers {found['transformers']}", highlight=False)
    control = {f"{label}, greedy": share for label, share in result.get("control", {}).items()}
    for label, rows in row_groups(result["rows"]):
        console.print(_rows_table(label, rows, control.get(label), is_narrow=console.width < WIDE))
    if any(result["agreement"].values()):
        console.print(_agreement_table(result["agreement"], is_narrow=console.width < WIDE))


def _rows_table(label: str, rows: list[Row], control: float | None, is_narrow: bool) -> Table:
    """
    The rows of a prompt set.

    Args:
        control: Share of plain texts that stay the same in a batch.
        is_narrow: Leave out prefill, decoding and loop, and the frame, so that the table fits 80 columns.
    """
    counts = f"{rows[0]['num_prompts']} prompts of {rows[0]['prompt_tokens']:g} tokens"
    title = f"{label} ({counts}, {rows[0]['dtype']})"
    table = Table(title=title, caption=_auto_choices(rows), **_frame(is_narrow))
    columns = [name for name in _CELLS if not (is_narrow and name in _WIDE_ONLY)]
    table.add_column("method")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        table.add_row(row_name(row), *(_CELLS[column](row) for column in columns))
    if control is not None:
        table.add_row(CONTROL_NAME, *[""] * (len(columns) - 1), f"{100 * control:.0f} %")
    return table


def _frame(is_narrow: bool) -> dict[str, Any]:
    return {"box": box.SIMPLE, "pad_edge": False, "collapse_padding": True} if is_narrow else {}


_WIDE_ONLY = ("prefill", "decoding", "loop")
_CELLS: dict[str, Callable[[Row], str]] = {
    "tokens/round": lambda row: f"{row['tokens_per_round']:.2f}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
    "speedup": lambda row: f"{row['speedup']:.2f}",
    "quartiles": lambda row: "{:.2f} - {:.2f}".format(*row["speedup_spread"]),
    "prefill": lambda row: f"{1000 * row['prefill_seconds']:.0f} ms",
    "decoding": lambda row: "-" if row["decode_speedup"] is None else f"{row['decode_speedup']:.2f}",
    "loop": lambda row: "" if row["loop_efficiency"] is None else f"{100 * row['loop_efficiency']:.0f} %",
    "identical": lambda row: f"{100 * row['identical_to_plain']:.0f} %",
}


def _auto_choices(rows: list[Row]) -> str | None:
    """The node budgets that "auto" chose, most frequent first."""
    for row in rows:
        if row["node_budget"] == "auto":
            shares = sorted(row["rounds_by_nodes"].items(), key=lambda item: -item[1])[:5]
            return "auto chose " + ", ".join(f"{nodes_label(nodes)} in {100 * share:.0f} %" for nodes, share in shares)
    return None


def _agreement_table(agreement: dict[str, dict[str, list[float]]], is_narrow: bool) -> Table:
    """Share of slots at which the head ranks the target's token first, by depth."""
    measures = {
        "spine_top1": "on the greedy spine",
        "spine_corrected_top1": "the same, corrected",
        "sibling_top1": "after an accepted sibling",
        "sibling_corrected_top1": "the same, corrected",
    }
    depths = max(len(values) for rates in agreement.values() for values in rates.values())
    title = "Share of the target's tokens that the head ranks first, by depth"
    table = Table(title=title, **_frame(is_narrow))
    for column in ("prompts", "where"):
        table.add_column(column)
    for depth in range(1, depths + 1):
        table.add_column(str(depth), no_wrap=True, justify="right")
    for prompts, rates in agreement.items():
        for name, label in measures.items():
            if name in rates:
                start = 1 if name.startswith("sibling") else 0  # depth 1 follows the anchor, which has no siblings
                cells = ["-"] * start + [f"{value:.2f}" for value in rates[name][start:]]
                table.add_row(prompts, label, *cells)
    return table


def closing_sentences(rows: list[Row]) -> list[str]:
    """The best method of each prompt set, or that no method helps; and methods whose text or speed cannot be right."""
    sentences = []
    for label, group in row_groups(rows):
        sentences += [f"{label}: {_uneven(row)}" for row in group if row["method"] == "plain" and _is_uneven(row)]
        drafted = [row for row in group if row["method"] != "plain"]
        if drafted:
            sentences.append(f"{label}: {_verdict(max(drafted, key=lambda row: row['speedup']))}")
        sentences += [f"{label}: {row_name(row)} {_WRONG_TEXT}" for row in drafted if _has_wrong_text(row)]
        sentences += [f"{label}: {row_name(row)} {_DISTURBED}" for row in drafted if _is_disturbed(row)]
    return sentences


def _verdict(best: Row) -> str:
    name, speedup, (low, high) = row_name(best), best["speedup"], best["speedup_spread"]
    if speedup <= 1:
        return f"no method helps; the best, {name}, runs at {speedup:.2f} of plain decoding. Decode without a draft."
    sentence = f"{name} is best: {speedup:.2f} times plain decoding (quartiles {low:.2f} - {high:.2f})"
    return f"{sentence}, but a quarter of the answers gained nothing." if low <= 1 else f"{sentence}."


UNEVEN = 1.3  # quartiles of plain decoding's speed, the third over the first, above which a reader is told


def _is_uneven(plain: Row) -> bool:
    low, high = plain.get("decode_tokens_per_second_spread") or (1.0, 1.0)
    return high > UNEVEN * low


def _uneven(plain: Row) -> str:
    low, high = plain["decode_tokens_per_second_spread"]
    return (
        f"plain decoding ran at {low:.1f} to {high:.1f} tokens/s (quartiles): other work slowed it down, or prompts "
        "differ much in length. The speedups are uncertain; measure again on a quiet machine."
    )


_WRONG_TEXT = "gave other text than plain decoding, which must not happen in float32; please report it."


_DISTURBED = (
    "shows a speedup above its tokens per round, which drafting alone cannot give: plain decoding was slowed down, by "
    "other work or by its attention over a long context. Measure again on a quiet machine."
)


def _is_disturbed(row: Row) -> bool:
    return row["method"] in LOOP_METHODS and row["speedup"] > row["tokens_per_round"]


def _has_wrong_text(row: Row) -> bool:
    """Whether text differs where it must be equal: float32, greedy or sampled by our loop."""
    is_exact = row["dtype"] == "float32" and (row["temperature"] == 0 or row["method"] in LOOP_METHODS)
    return is_exact and row["identical_to_plain"] < 1
