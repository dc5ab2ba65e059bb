"""Terminal output of a simulation."""

from typing import Any

from rich.table import Table


def speedup_table(result: dict[str, Any]) -> Table:
    """Predicted speedup by prompt set, node budget and batch size."""
    batch_sizes = sorted({row["batch_size"] for row in result["rows"]})
    table = Table(title=f"Predicted speedup on {result['hardware']['name']}, {result['context']} tokens of context")
    table.add_column("prompts", no_wrap=True)
    for column in ("nodes", "tokens/round", *(f"batch {size}" for size in batch_sizes)):
        table.add_column(column, no_wrap=True, justify="right")
    cells: dict[tuple[str, int], list[str]] = {}
    for row in result["rows"]:
        line = cells.setdefault((row["prompts"], row["node_budget"]), [f"{row['tokens_per_round']:.2f}"])
        line.append(f"{row['speedup']:.2f}")
    for (prompts, budget), line in cells.items():
        table.add_row(prompts, str(budget), *line)
    return table
