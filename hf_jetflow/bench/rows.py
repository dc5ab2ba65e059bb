"""Rows of a result: medians and quartiles over runs, means over rounds; and their names in tables and figures."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import PurePath
from typing import Any

from .forward_times import forward_seconds, rounds_by_nodes
from .runs import Run, Variant


Row = dict[str, Any]

CONTROL_BATCH = 4  # prompts of a batch that shows what the batch size alone changes in a text
CONTROL_NAME = f"plain, batch of {CONTROL_BATCH}"


def make_row(variant: Variant, runs: Sequence[Run], plain: Sequence[Run], forwards: Sequence[Any]) -> Row:
    """
    The figures of one variant.

    Args:
        runs: Its runs, one per prompt.
        plain: The plain runs of the same prompts, the base of speedups.
        forwards: The result of `time_forwards` for each run; empty if not timed.

    Returns:
        `dict`: The fields described in docs/benchmarks.md. A speedup is the median over runs of (plain seconds per
            token / own seconds per token), its spread the quartiles. `decode_speedup` and `decode_tokens_per_second`
            are `None` if no run decoded more than its first tokens.
    """
    pairs = list(zip(plain, runs, strict=True))
    speedups = [(base.seconds / len(base.new_ids)) / (run.seconds / len(run.new_ids)) for base, run in pairs]
    decode_speedups = [
        (base.decode_seconds / base.num_decoded) / (run.decode_seconds / run.num_decoded)
        for base, run in pairs
        if base.num_decoded and run.num_decoded
    ]
    num_rounds, num_decoded = sum(run.num_rounds for run in runs), sum(run.num_decoded for run in runs)
    decode_seconds = sum(run.decode_seconds for run in runs)
    per_round = decode_seconds / num_rounds if num_rounds else None
    parts = forward_seconds(runs, forwards)
    return {
        "method": variant.method,
        "node_budget": variant.node_budget,
        "num_new_tokens": sum(len(run.new_ids) for run in runs),
        "tokens_per_round": _rounded(_tokens_per_round(runs), 3),
        "tokens_per_round_spread": _quartiles([_tokens_per_round([run]) for run in runs if run.num_rounds]),
        "tokens_per_second": round(sum(len(run.new_ids) for run in runs) / sum(run.seconds for run in runs), 2),
        "speedup": _rounded(statistics.median(speedups), 3),
        "speedup_spread": _quartiles(speedups),
        "prefill_seconds": _rounded(statistics.median(run.prefill_seconds for run in runs), 6),
        "decode_tokens_per_second": round(num_decoded / decode_seconds, 2) if num_decoded else None,
        "decode_tokens_per_second_spread": _quartiles(
            [run.num_decoded / run.decode_seconds for run in runs if run.num_decoded]
        ),
        "decode_speedup": _rounded(statistics.median(decode_speedups), 3) if decode_speedups else None,
        "decode_speedup_spread": _quartiles(decode_speedups),
        "identical_to_plain": round(sum(run.new_ids == base.new_ids for base, run in pairs) / len(runs), 4),
        "seconds_per_round": _rounded(per_round, 6),
        "round_seconds": _round_seconds(runs),
        "forward_seconds": parts and {part: round(seconds, 6) for part, seconds in parts.items()},
        "loop_efficiency": parts and round((sum(parts.values()) - parts["round"]) / parts["round"], 3),
        "rounds_by_nodes": _shares(rounds_by_nodes(runs)),
        "acceptance_by_depth": _acceptance(runs),
    }


def _tokens_per_round(runs: Sequence[Run]) -> float:
    """
    Tokens per target forward after the prefill.

    Our loop counts all accepted tokens, even those after the end of the answer; other methods only emitted ones.
    """
    if all(run.stats is not None for run in runs):
        stats = [run.stats for run in runs if run.stats is not None]
        rounds = sum(each["num_rounds"] for each in stats)
        return (sum(each["num_accepted"] for each in stats) + rounds) / rounds if rounds else 1.0
    rounds = sum(run.num_rounds for run in runs)
    return sum(run.num_decoded for run in runs) / rounds if rounds else 1.0


def _round_seconds(runs: Sequence[Run]) -> dict[str, float]:
    """Mean seconds of each step of a round, as timed by the loop; prefill excluded."""
    steps: dict[str, float] = {}
    for run in runs:
        for step, seconds in (run.stats or {}).get("seconds_by_step", {}).items():
            steps[step] = steps.get(step, 0.0) + seconds
    rounds = sum(run.stats["num_rounds"] for run in runs if run.stats)
    return {step: round(steps[step] / rounds, 6) for step in steps if step != "prefill"} if rounds else {}


def _acceptance(runs: Sequence[Run]) -> list[float]:
    """By depth, the share of rounds drafting there that accepted a token."""
    all_stats = [run.stats for run in runs if run.stats is not None]
    depth = max((len(stats["offered_by_depth"]) for stats in all_stats), default=0)
    offered, accepted = [0] * depth, [0] * depth
    for stats in all_stats:
        for index, counts in enumerate(zip(stats["offered_by_depth"], stats["accepted_by_depth"], strict=True)):
            offered[index] += counts[0]
            accepted[index] += counts[1]
    return [round(yes / count, 4) for yes, count in zip(accepted, offered, strict=True)]


def _shares(counts: dict[int, int]) -> dict[str, float]:
    return {str(nodes): round(count / sum(counts.values()), 4) for nodes, count in counts.items()}


def _quartiles(values: Sequence[float]) -> list[float] | None:
    """First and third quartile; a single value twice; `None` without values."""
    if not values:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return [round(low, 3), round(high, 3)]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def machine(environment: dict[str, Any]) -> str:
    """The GPU, or the processor and its threads, of a result's `environment`."""
    threads = f"{environment['num_threads']} thread" + ("s" if environment["num_threads"] > 1 else "")
    return environment.get("cuda_device") or f"{environment['processor']}, {threads}"


def row_groups(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows with the same prompts, context length, batch size and temperature, each group with its label."""

    def label(row: Row) -> str:
        length = f", {row['context_length']} tokens" if row.get("context_length") else ""
        length += f", batches of {row['batch_size']}" if row.get("batch_size", 1) > 1 else ""
        return f"{row['prompts']}{length}, {temperature_label(row['temperature'])}"

    for name, group in groupby(rows, key=label):
        yield name, list(group)


def temperature_label(temperature: float) -> str:
    """`greedy`, or the temperature."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def row_name(row: Row) -> str:
    """A method and its node budget, short enough for a table or a legend."""
    method = row["method"]
    if len(method) > 32:  # the path of an assistant
        method = f"assistant:{PurePath(method).name}"
    return method if row["node_budget"] is None else f"{method}, {nodes_label(row['node_budget'])}"


def nodes_label(budget: int | str) -> str:
    """`auto`, or the number of nodes."""
    return "auto" if budget == "auto" else f"{budget} node" + ("s" if int(budget) > 1 else "")
