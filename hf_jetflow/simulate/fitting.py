"""Hardware figures fitted to a bench: what a machine achieves with one target and head."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import JetFlowError
from .hardware import Hardware
from .roofline import HeadShape, ModelShape, forward_seconds, round_seconds


def fit_hardware(
    name: str,
    target: ModelShape,
    head: HeadShape,
    plain: Mapping[str, Any],
    small: Mapping[str, Any],
    large: Mapping[str, Any],
    *,
    context: int,
    bytes_per_value: int = 2,
) -> Hardware:
    """
    Fit hardware to three rows of a bench: plain decoding and trees of two node budgets.

    Verify times are assumed to be bound by operations and determine `flops` and `launch_seconds`. The plain step is
    assumed to be bound by reads and determines `bandwidth`. The rest of a tree round is the host's time.

    Raises:
        JetFlowError: If the rows contradict these assumptions, for example where launches take longest.
    """
    budgets = [row["node_budget"] for row in (small, large)]
    verify = [row["round_seconds"]["verify"] for row in (small, large)]
    seconds = [1 / plain["tokens_per_second"], *verify]
    fitted = _fit_forwards(name, target, [1, *budgets], seconds, context, bytes_per_value)
    rest = []
    for row, budget, verify_seconds in zip((small, large), budgets, verify, strict=True):
        model = round_seconds(target, head, fitted, budget, context=context)
        whole = row["tokens_per_round"] / row["tokens_per_second"]
        rest.append(whole - verify_seconds - model.draft - model.correct)
    per_node = max((rest[1] - rest[0]) / (budgets[1] - budgets[0]), 0.0)
    return dataclasses.replace(
        fitted,
        host_seconds=max(rest[0] - per_node * budgets[0], 0.0),
        host_seconds_per_node=per_node,
        source=f"fitted to plain decoding and {budgets[0]} and {budgets[1]} nodes on {plain['prompts']}",
    )


def _fit_forwards(
    name: str, target: ModelShape, rows: Sequence[int], seconds: Sequence[float], context: int, bytes_per_value: int
) -> Hardware:
    """Hardware whose forwards over 1 and two larger numbers of rows take the given seconds."""
    parts = [list(target.parts(number, 1, context, number).values()) for number in rows]
    read = bytes_per_value * sum(values for values, _ in parts[0])
    done = [sum(operations for _, operations in part) for part in parts]
    if rows[1] < rows[2] and seconds[1] < seconds[2]:
        flops = (done[2] - done[1]) / (seconds[2] - seconds[1])
        launch = (seconds[1] - done[1] / flops) / target.num_layers
        reading = seconds[0] - target.num_layers * launch
        if launch >= 0 and reading > 0:
            fitted = Hardware(name, read / reading, flops, 1.0, 1.0, launch, False, bytes_per_value=bytes_per_value)
            found = [forward_seconds(target, fitted, number, context=context) for number in rows]
            if all(abs(a / b - 1) < 0.05 for a, b in zip(found, seconds, strict=True)):
                return fitted
    measured = ", ".join(f"{number} rows in {1e3 * value:.2f} ms" for number, value in zip(rows, seconds, strict=True))
    raise JetFlowError(
        f"cannot fit hardware: expected forwards bound by memory first, then by operations, got {measured}; give a "
        "JSON file of hardware figures (if launches take longest, `launch_seconds` is the plain step / layers)"
    )
