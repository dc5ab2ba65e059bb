"""What the forwards of a round take, to say how much of it is the loop's own work.

The loop efficiency of a row is (target forward + head forward) / whole round. During a short generation beside each
prompt's runs every call of the target, of the head and of the layers it scores nodes with, its output projection and
branch correction, is timed where the loop makes it, and so are the rounds it belongs to. Taking the time of the many
small scoring layers takes time itself, so the same rounds are decoded twice, and only the second time these layers are
timed, against the target's forward. What counts as the loop's own work is what is left: planning, ranking, scoring
branches from what those layers yield, building the tree, masks, walking, committing, emitting.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..decoding.draft_weights import draft_weights
from ..head.modeling_jetflow import JetFlowHead
from ..target.target import Target
from .runs import Run, Variant, configure, synchronize


MAX_TOKENS = 40  # of the generation whose rounds are timed, for each number of nodes
PARTS = ("target", "block", "scores", "round")  # see `time_forwards`
LEAST_SHARE = 0.05  # numbers of nodes of fewer rounds are read off the others


class _RoundTimer:
    """Times the rounds inside, each from one target forward to the next, and the forwards in them, on demand those of
    the scoring layers."""

    def __init__(self, target: PreTrainedModel, head: JetFlowHead, times_scores: bool):
        self._target = target
        self._part_of: dict[nn.Module, int] = {target: 0, head: 1}
        if times_scores:
            self._part_of |= dict.fromkeys(_scoring_layers(target, head), 2)
        self._num_forwards = 0  # of the target; the first reads the prompt
        self._nodes, self._begin, self._start = 0, 0.0, 0.0  # of the round; the latest forward's start
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
            if self._num_forwards > 1 and nodes == self._nodes:  # the draft between the two was for as many nodes
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
    Seconds of rounds and of the forwards in them, by the nodes that are verified.

    Args:
        context_ids: Token ids of a text of the length that decoding has there.
        node_counts: Node budgets to try; 1 is a plain round, without a head forward.

    Returns:
        `[[nodes, target, block, scores, round], ...]`: Means by ascending nodes: of the target's forward, of the
            head's over its block, of what it scores nodes with, and of whole rounds.
    """
    input_ids = torch.tensor([list(context_ids)], device=target.device)

    def timed_rounds(count: int, times_scores: bool) -> dict[int, list[float]]:
        configure(head, Variant("jetflow", count))
        with _RoundTimer(target, head, times_scores) as timer:
            target.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                assistant_model=head,
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
            )
        rounds: dict[int, list[list[float]]] = {}
        for nodes, seconds in timer.rounds:
            rounds.setdefault(nodes, []).append(seconds)
        return {nodes: np.mean(seconds, axis=0).tolist() for nodes, seconds in rounds.items()}

    found: dict[int, list[list[float]]] = {}
    for count in node_counts:
        rounds, with_scores = (timed_rounds(count, times_scores) for times_scores in (False, True))
        for nodes in rounds.keys() & with_scores.keys():
            of_target, of_block, _, of_round = rounds[nodes]
            of_scores = with_scores[nodes][2] / with_scores[nodes][0] * of_target
            found.setdefault(nodes, []).append([of_target, of_block, of_scores, of_round])
    return [[nodes, *np.mean(found[nodes], axis=0).tolist()] for nodes in sorted(found)]


def _scoring_layers(target: PreTrainedModel, head: JetFlowHead) -> list[nn.Module]:
    """What the head scores nodes with, beside the pass over its block."""
    correction = head.branch_correction
    projection = draft_weights(head, Target(target, head.config)).projection
    layers: list[nn.Module] = [] if correction is None else list(correction.children())
    return layers if projection is None else [*layers, projection]


def usual_node_counts(runs: Sequence[Run]) -> list[int]:
    """Numbers of nodes that a fair share of some run's rounds verified, ascending."""
    usual: set[int] = set()
    for run in runs:
        counts = rounds_by_nodes([run])
        usual |= {nodes for nodes, count in counts.items() if count >= LEAST_SHARE * sum(counts.values())}
    return sorted(usual)


def rounds_by_nodes(runs: Sequence[Run]) -> dict[int, int]:
    """Rounds of some runs by the nodes they verified, ascending."""
    counts: dict[int, int] = {}
    for run in runs:
        for nodes, count in (run.stats or {}).get("rounds_by_nodes", {}).items():
            counts[int(nodes)] = counts.get(int(nodes), 0) + count  # JSON knows keys of text only
    return dict(sorted(counts.items()))


def forward_seconds(runs: Sequence[Run], tables: Sequence[Sequence[Sequence[float]]]) -> dict[str, float] | None:
    """Mean seconds of a round of these runs and of its forwards, by part, given what `time_forwards` found beside each
    run; `None` where nothing is known."""
    total, num_rounds = np.zeros(len(PARTS)), 0
    for run, table in zip(runs, tables, strict=True):
        for verified, count in rounds_by_nodes([run]).items():
            rows = [row for row in table if (row[0] > 1) == (verified > 1)]  # a plain round drafts nothing
            if rows:
                nodes, *columns = zip(*rows, strict=True)
                total += [count * np.interp(verified, nodes, column) for column in columns]
                num_rounds += count
    return dict(zip(PARTS, (total / num_rounds).tolist(), strict=True)) if num_rounds else None
