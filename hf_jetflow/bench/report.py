"""What a bench says on the terminal: a table for each prompt set, agreement by depth, and what is best where."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.table import Table

from .runs import LOOP_METHODS


Row = dict[str, Any]


def print_tables(result: dict[str, Any], console: Console) -> None:
    """The whole result as tables."""
    facts = result["environment"]
    console.print(f"{machine(facts)}, torch {facts['torch']}, transformers {facts['transformers']}", highlight=False)
    for label, rows in row_groups(result["rows"]):
        console.print(_rows_table(label, rows))
    if any(result["agreement"].values()):
        console.print(_agreement_table(result["agreement"]))


def machine(facts: dict[str, Any]) -> str:
    """What the models ran on, of a result's `environment`."""
    threads = f"{facts['num_threads']} thread" + ("s" if facts["num_threads"] > 1 else "")
    return facts.get("cuda_device") or f"{facts['processor']}, {threads}"


def row_groups(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of the same prompts, context length and temperature, with words for them."""

    def label(row: Row) -> str:
        length = f", {row['context_length']} tokens" if row.get("context_length") else ""
        length += f", batches of {row['batch_size']}" if row.get("batch_size", 1) > 1 else ""
        return f"{row['prompts']}{length}, {temperature_words(row['temperature'])}"

    for words, group in groupby(rows, key=label):
        yield words, list(group)


def temperature_words(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def row_name(row: Row) -> str:
    """A method and its node budget, short enough for a table or a legend."""
    method = row["method"]
    if len(method) > 32:  # an assistant's path
        method = f"assistant:{PurePath(method).name}"
    return method if row["node_budget"] is None else f"{method}, {_nodes(row['node_budget'])}"


def _nodes(budget: int | str) -> str:
    return "auto" if budget == "auto" else f"{budget} node" + ("s" if int(budget) > 1 else "")


def _rows_table(label: str, rows: list[Row]) -> Table:
    counts = f"{rows[0]['num_prompts']} prompts of {rows[0]['prompt_tokens']:g} tokens"
    table = Table(title=f"{label} ({counts}, {rows[0]['dtype']})", caption=_auto_choices(rows))
    columns = ("tokens/round", "tokens/s", "speedup", "quartiles", "prefill", "decoding", "loop", "identical")
    table.add_column("method")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        table.add_row(
            row_name(row),
            f"{row['tokens_per_round']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}",
            "{:.2f} - {:.2f}".format(*row["speedup_spread"]),
            f"{1000 * row['prefill_seconds']:.0f} ms",
            "-" if row["decode_speedup"] is None else f"{row['decode_speedup']:.2f}",
            "" if row["loop_efficiency"] is None else f"{100 * row['loop_efficiency']:.0f} %",
            f"{100 * row['identical_to_plain']:.0f} %",
        )
    return table


def _auto_choices(rows: list[Row]) -> str | None:
    """Nodes that "auto" chose, the commonest first."""
    for row in rows:
        if row["node_budget"] == "auto":
            shares = sorted(row["rounds_by_nodes"].items(), key=lambda item: -item[1])[:5]
            return "rounds of auto: " + ", ".join(f"{100 * share:.0f} % {_nodes(nodes)}" for nodes, share in shares)
    return None


def _agreement_table(agreement: dict[str, dict[str, list[float]]]) -> Table:
    """How often the head ranks the target's token first, by depth."""
    measures = {
        "spine_top1": "on the greedy spine",
        "spine_corrected_top1": "the same, corrected",
        "sibling_top1": "after an accepted sibling",
        "sibling_corrected_top1": "the same, corrected",
    }
    depths = max(len(values) for rates in agreement.values() for values in rates.values())
    table = Table(title="Share of the target's tokens that the head ranks first, by depth")
    for column in ("prompts", "where", *map(str, range(1, depths + 1))):
        table.add_column(column, no_wrap=True, justify="left" if column in ("prompts", "where") else "right")
    for prompts, rates in agreement.items():
        for name, words in measures.items():
            if name in rates:
                start = 1 if name.startswith("sibling") else 0  # depth 1 follows the anchor, which has no sibling
                cells = ["-"] * start + [f"{value:.2f}" for value in rates[name][start:]]
                table.add_row(prompts, words, *cells)
    return table


def closing_sentences(rows: list[Row]) -> list[str]:
    """The best method for each prompt set, and where nothing helps."""
    sentences = []
    for label, group in row_groups(rows):
        drafted = [row for row in group if row["method"] != "plain"]
        if drafted:
            sentences.append(f"{label}: {_verdict(max(drafted, key=lambda row: row['speedup']))}")
        sentences += [f"{label}: {row_name(row)} {_OTHER_TEXT}" for row in drafted if _has_other_text(row)]
    return sentences


def _verdict(best: Row) -> str:
    name, speedup, (low, high) = row_name(best), best["speedup"], best["speedup_spread"]
    if speedup <= 1:
        return f"nothing helps; the best, {name}, runs at {speedup:.2f} of plain decoding. Decode plainly here."
    words = f"{name} is best, {speedup:.2f} times as fast as plain decoding (quartiles {low:.2f} - {high:.2f})"
    return f"{words}, but a quarter of the answers gained nothing." if low <= 1 else f"{words}."


_OTHER_TEXT = "gave other texts than plain decoding, which must not happen in float32; please report it."


def _has_other_text(row: Row) -> bool:
    """In float32 every greedy text is plain decoding's, and our own loop's sampled ones are too."""
    is_exact = row["dtype"] == "float32" and (row["temperature"] == 0 or row["method"] in LOOP_METHODS)
    return is_exact and row["identical_to_plain"] < 1
