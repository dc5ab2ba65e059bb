"""Time of the forwards in a round: the rest of the round is the overhead of the loop.

Loop efficiency is (target forward + head forwards) / whole round. It is measured in a short generation next to the
runs of each prompt, by hooks on the target, the head, and the layers that score nodes (output projection, branch
correction). These layers are many and small, and hooks on them slow the round down. So the rounds are decoded twice:
the first pass times rounds, target and head, the second times the scoring layers as a share of its target forwards.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from ..decoding.draft_weights import draft_weights
from ..head.modeling_jetflow import JetFlowHead
from ..head.settings import head_settings
from ..target.target import Target
from ..training.evaluation import greedy_ids
from .runs import Run, Variant, synchronize


MAX_TOKENS = 40  # per generation whose rounds are timed
PARTS = ("target", "block", "scores", "round")  # see `time_forwards`
MIN_SHARE = 0.05  # rarer numbers of nodes are interpolated, not timed


class _RoundTimer:
    """Times rounds, from one target forward to the next, and the forwards in them; on request the scoring layers."""

    def __init__(self, target: PreTrainedModel, head: JetFlowHead, times_scores: bool):
        self._target = target
        self._part_of: dict[nn.Module, int] = {target: 0, head: 1}
        if times_scores:
            self._part_of |= dict.fromkeys(_scoring_layers(target, head), 2)
        self._num_forwards = 0  # of the target; the first is the prefill
        self._nodes, self._begin = 0, 0.0  # of the current round
        self._start = 0.0  # of the latest forward
        self._seconds = [0.0] * 3
        self.rounds: list[tuple[int, list[float]]] = []  # nodes, and seconds in the order of `PARTS`

    def __enter__(self) -> "_RoundTimer":
        self._handles = []
        for module in self._part_of:
            self._handles.append(module.register_forward_pre_hook(self._started, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._ended))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _started(self, module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self._start = self._now()
        if module is self._target:
            nodes = kwargs["input_ids"].shape[1]
            # The draft between two target forwards is for the second one: count it if both have as many nodes.
            if self._num_forwards > 1 and nodes == self._nodes:
                self.rounds.append((nodes, [*self._seconds, self._start - self._begin]))
            self._num_forwards += 1
            self._nodes, self._begin, self._seconds = nodes, self._start, [0.0] * 3

    def _ended(self, module: nn.Module, *_: Any) -> None:
        self._seconds[self._part_of[module]] += self._now() - self._start

    def _now(self) -> float:
        synchronize(self._target)
        return time.perf_counter()


def time_forwards(
    target: PreTrainedModel, head: JetFlowHead, context_ids: Sequence[int], node_counts: Sequence[int]
) -> list[list[float]]:
    """
    Seconds of rounds and of the forwards in them, by the number of nodes verified.

    Args:
        context_ids: Token ids of a text as long as the contexts of the timed runs.
        node_counts: Node budgets to time; 1 is a plain round without a head forward.

    Returns:
        `[[nodes, target, block, scores, round], ...]`: Means by ascending number of nodes: target forward, head
            forward over its block, scoring layers, whole round.
    """

    def timed_rounds(count: int, times_scores: bool) -> dict[int, list[float]]:
        settings = head_settings(head, **Variant("jetflow", count).head_settings(head))
        with settings, _RoundTimer(target, head, times_scores) as timer:
            greedy_ids(target, context_ids, MAX_TOKENS, assistant_model=head)
        rounds: dict[int, list[list[float]]] = {}
        for nodes, seconds in timer.rounds:
            rounds.setdefault(nodes, []).append(seconds)
        return {nodes: np.mean(seconds, axis=0).tolist() for nodes, seconds in rounds.items()}

    found: dict[int, list[list[float]]] = {}
    for count in node_counts:
        rounds, with_scores = (timed_rounds(count, times_scores) for times_scores in (False, True))
        for nodes in rounds.keys() & with_scores.keys():
            target_seconds, block_seconds, _, round_seconds = rounds[nodes]
            score_seconds = with_scores[nodes][2] / with_scores[nodes][0] * target_seconds
            found.setdefault(nodes, []).append([target_seconds, block_seconds, score_seconds, round_seconds])
    return [[nodes, *np.mean(found[nodes], axis=0).tolist()] for nodes in sorted(found)]


def _scoring_layers(target: PreTrainedModel, head: JetFlowHead) -> list[nn.Module]:
    """The layers that score nodes, which run outside the head's forward."""
    correction = head.branch_correction
    projection = draft_weights(head, Target(target, head.config)).projection
    layers: list[nn.Module] = [] if correction is None else list(correction.children())
    return layers if projection is None else [*layers, projection]


def usual_node_counts(runs: Sequence[Run]) -> list[int]:
    """Numbers of nodes that at least `MIN_SHARE` of a run's rounds verified, ascending."""
    usual: set[int] = set()
    for run in runs:
        counts = rounds_by_nodes([run])
        usual |= {nodes for nodes, count in counts.items() if count >= MIN_SHARE * sum(counts.values())}
    return sorted(usual)


def rounds_by_nodes(runs: Sequence[Run]) -> dict[int, int]:
    """Number of rounds by the number of nodes verified, ascending."""
    counts: dict[int, int] = {}
    for run in runs:
        for nodes, count in (run.stats or {}).get("rounds_by_nodes", {}).items():
            counts[int(nodes)] = counts.get(int(nodes), 0) + count  # JSON keys are strings
    return dict(sorted(counts.items()))


def forward_seconds(runs: Sequence[Run], tables: Sequence[Sequence[Sequence[float]]]) -> dict[str, float] | None:
    """
    Mean seconds of a round and of its forwards, by part.

    Args:
        runs: The runs whose rounds are averaged.
        tables: The result of `time_forwards` for each run; empty if not timed.

    Returns:
        Seconds by the names in `PARTS`, or `None` if no round is timed.
    """
    total, num_rounds = np.zeros(len(PARTS)), 0
    for run, table in zip(runs, tables, strict=True):
        for verified, count in rounds_by_nodes([run]).items():
            rows = [row for row in table if (row[0] > 1) == (verified > 1)]  # a plain round drafts nothing
            if rows:
                nodes, *columns = zip(*rows, strict=True)
                total += [count * np.interp(verified, nodes, column) for column in columns]
                num_rounds += count
    return dict(zip(PARTS, (total / num_rounds).tolist(), strict=True)) if num_rounds else None
