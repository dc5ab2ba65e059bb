"""The files that a simulation reads, checked in milliseconds: this imports no torch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import JetFlowError
from ..files import read_json
from .hardware import PRESETS, Hardware
from .settings import SimulateSettings


RANKS = "acceptance_by_rank"  # of a table of ranks


def read_acceptance(settings: SimulateSettings) -> dict[str, Any]:
    """
    The content of `--acceptance`.

    Raises:
        JetFlowError: If the file holds neither a table of ranks nor rows of the node budgets that are asked for.
    """
    figures = read_json(settings.acceptance)
    with _naming("--acceptance", settings.acceptance):
        if RANKS not in figures:
            measured_tokens(figures, settings.node_budgets)
    return figures


def read_hardware(source: str) -> Hardware | dict[str, Any]:
    """
    What `--hardware` names: a preset, hardware figures from JSON, or the JSON of a bench.

    Raises:
        JetFlowError: If it is none of these, or the bench holds too few rows to fit to.
    """
    if source in PRESETS:
        return PRESETS[source]
    if not Path(source).is_file():
        raise JetFlowError(f"`--hardware` is {source!r}, expected one of {', '.join(PRESETS)}, or a JSON file")
    figures = read_json(source)
    with _naming("--hardware", source):
        if "rows" not in figures:
            return Hardware.from_dict(figures)
        fitting_rows(figures["rows"])
        return figures


@contextmanager
def _naming(option: str, value: object) -> Iterator[None]:
    """Put the option and its value in front of an error."""
    try:
        yield
    except JetFlowError as error:
        raise JetFlowError(f"`{option} {value}`: {error}") from error


def fitting_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """
    Rows to fit to, from the first prompt set of a bench: plain decoding, the smallest and the largest node budget.

    Raises:
        JetFlowError: If the bench has no plain decoding or fewer than two fixed node budgets.
    """
    first = [row for row in rows if row.get("prompts") == rows[0].get("prompts") and not row.get("temperature")]
    plain = [row for row in first if row.get("method") == "plain"]
    trees = [row for row in first if row.get("method") == "jetflow" and isinstance(row["node_budget"], int)]
    trees.sort(key=lambda row: row["node_budget"])
    if not plain or len(trees) < 2:
        raise JetFlowError(
            "fitting hardware needs plain decoding and two fixed node budgets at temperature 0, but the first prompt "
            f"set of this bench has {'plain decoding' if plain else 'no plain decoding'} and {len(trees)} fixed node "
            f"budget{'' if len(trees) == 1 else 's'}; run it again with two, such as `--node-budgets 16 64`"
        )
    return plain[0], trees[0], trees[-1]


def measured_tokens(figures: Mapping[str, Any], node_budgets: Sequence[int] | None) -> dict[str, dict[int, float]]:
    """
    Tokens per round by prompt set and node budget, from the rows of a bench or a replay.

    Raises:
        JetFlowError: If there are no such rows, or a node budget was not measured.
    """
    measured: dict[str, dict[int, float]] = {}
    for row in figures.get("rows", ()):
        if isinstance(row.get("node_budget"), int):
            if missing := {"prompts", "tokens_per_round"} - row.keys():
                raise JetFlowError(f"a row of the acceptance file has no {sorted(missing)}: {row}; measure it again")
            at = f", T = {row['temperature']:g}" if row.get("temperature") else ""
            measured.setdefault(row["prompts"] + at, {})[row["node_budget"]] = row["tokens_per_round"]
    if not measured:
        raise JetFlowError(
            f"the acceptance file holds no `rows` with node budgets and no `{RANKS}`; give the JSON of `hf-jetflow "
            "bench` with fixed node budgets, or of examples/measure_ranks.py"
        )
    for name, tokens in measured.items():
        if missing := sorted(set(node_budgets or ()) - tokens.keys()):
            raise JetFlowError(
                f"node budgets {missing} were not measured on {name}, only {sorted(tokens)}; measure them, or give a "
                "table of ranks (examples/measure_ranks.py)"
            )
    return {name: {budget: tokens[budget] for budget in node_budgets or tokens} for name, tokens in measured.items()}
