"""From the runs of a bench to the rows of its result: medians, quartiles, means over rounds."""

import statistics
from collections.abc import Sequence
from typing import Any

from .forward_times import forward_seconds, rounds_by_nodes
from .runs import Run, Variant


def make_row(variant: Variant, runs: Sequence[Run], plain: Sequence[Run], forwards: Sequence[Any]) -> dict[str, Any]:
    """
    The figures of one variant.

    Args:
        runs: Its runs, prompt by prompt.
        plain: The plain runs of the same prompts, which speedups are ratios to.
        forwards: What `time_forwards` found beside each run, empty if nothing.

    Returns:
        `dict`: The fields described in docs/benchmarks.md. A speedup is the median over the runs of (plain
            seconds per token / own seconds per token), its spread the quartiles. Where no run decoded anything behind
            its first tokens, `decode_speedup` and `decode_tokens_per_second` are `None`.
    """
    pairs = list(zip(plain, runs, strict=True))
    speedups = [
        (of_plain.seconds / len(of_plain.new_ids)) / (run.seconds / len(run.new_ids)) for of_plain, run in pairs
    ]
    decode_speedups = [
        (of_plain.decode_seconds / of_plain.num_decoded) / (run.decode_seconds / run.num_decoded)
        for of_plain, run in pairs
        if of_plain.num_decoded and run.num_decoded
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
        "decode_speedup": _rounded(statistics.median(decode_speedups), 3) if decode_speedups else None,
        "decode_speedup_spread": _quartiles(decode_speedups),
        "identical_to_plain": round(sum(run.new_ids == of_plain.new_ids for of_plain, run in pairs) / len(runs), 4),
        "seconds_per_round": _rounded(per_round, 6),
        "round_seconds": _round_seconds(runs),
        "forward_seconds": parts and {part: round(seconds, 6) for part, seconds in parts.items()},
        "loop_efficiency": parts and round((sum(parts.values()) - parts["round"]) / parts["round"], 3),
        "rounds_by_nodes": _shares(rounds_by_nodes(runs)),
        "acceptance_by_depth": _acceptance(runs),
    }


def _tokens_per_round(runs: Sequence[Run]) -> float:
    """
    Tokens per target forward behind the prefill.

    Our own loop counts what it accepted, also behind the end of the answer; of other methods only emitted tokens are
    known.
    """
    if all(run.stats is not None for run in runs):
        stats = [run.stats for run in runs if run.stats is not None]
        rounds = sum(each["num_rounds"] for each in stats)
        return (sum(each["num_accepted"] for each in stats) + rounds) / rounds if rounds else 1.0
    rounds = sum(run.num_rounds for run in runs)
    return sum(run.num_decoded for run in runs) / rounds if rounds else 1.0


def _round_seconds(runs: Sequence[Run]) -> dict[str, float]:
    """Mean seconds of each step of a round, as the loop timed them; its prefill is no round."""
    steps: dict[str, float] = {}
    for run in runs:
        for step, seconds in (run.stats or {}).get("seconds_by_step", {}).items():
            steps[step] = steps.get(step, 0.0) + seconds
    rounds = sum(run.stats["num_rounds"] for run in runs if run.stats)
    return {step: round(steps[step] / rounds, 6) for step in steps if step != "prefill"} if rounds else {}


def _acceptance(runs: Sequence[Run]) -> list[float]:
    """Share of the rounds that drafted depth 1, 2, ... which kept a token there."""
    all_stats = [run.stats for run in runs if run.stats is not None]
    depth = max((len(stats["offered_by_depth"]) for stats in all_stats), default=0)
    offered, accepted = [0] * depth, [0] * depth
    for stats in all_stats:
        for level, (of_level, kept) in enumerate(
            zip(stats["offered_by_depth"], stats["accepted_by_depth"], strict=True)
        ):
            offered[level] += of_level
            accepted[level] += kept
    return [round(kept / of_level, 4) for kept, of_level in zip(accepted, offered, strict=True)]


def _shares(counts: dict[int, int]) -> dict[str, float]:
    return {str(nodes): round(count / sum(counts.values()), 4) for nodes, count in counts.items()}


def _quartiles(values: Sequence[float]) -> list[float] | None:
    """First and third quartile; of a single value that value twice, `None` of none."""
    if not values:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return [round(low, 3), round(high, 3)]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
