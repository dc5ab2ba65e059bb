"""Bare forwards: what a round costs at least, to say how much of it is the loop's own work.

The loop efficiency of a row is (bare target forward + bare head forward) / whole round. Both forwards are the very
calls that the loop makes: during a short generation every call of target and head, of the output projection and of the
branch correction's layers is repeated once, alone, with the same rows, mask, positions and (a copy of) the same cache,
and the repetition is timed, beside each prompt's runs, so that both see the machine in the same state. What counts as
the loop's own work is all else: planning, ranking, scoring branches from what those layers yield, building the tree,
masks, walking, committing, emitting.
"""

import copy
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from .bench_runs import Run, Variant, configure, synchronize
from .draft_weights import draft_weights
from .modeling_jetflow import JetFlowHead
from .target import Target


NUM_ROUNDS = 4  # rounds of a text that are repeated, for each number of nodes
PARTS = ("target", "block", "scores")  # see `time_bare_forwards`
LEAST_SHARE = 0.05  # numbers of nodes of fewer rounds are read off the others


class _Repeater(StoppingCriteria):
    """Repeats every forward of target and head inside, and ends a generation when it has seen enough rounds."""

    def __init__(self, target: PreTrainedModel, head: JetFlowHead):
        self._target, self._head = target, head
        self._num_calls = {target: 0, head: 0}
        self._draft_seconds: list[float] | None = None  # of the newest draft: its first forward, and what scores
        self.rounds: list[tuple[int, float, float, float]] = []  # nodes, seconds of the target, of the draft's two

    def __enter__(self) -> "_Repeater":
        correction = self._head.branch_correction
        scoring = [] if correction is None else list(correction.children())
        projection = draft_weights(self._head, Target(self._target, self._head.config)).projection
        if projection is not None:
            scoring.append(projection)
        self._handles = [
            module.register_forward_pre_hook(repeat, with_kwargs=True)
            for repeat, modules in (
                (self._repeat, (self._target, self._head)),
                (self._repeat_scoring, scoring),
            )
            for module in modules
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        is_done = len(self.rounds) >= NUM_ROUNDS
        return torch.full((len(input_ids),), is_done, device=input_ids.device)

    def _repeat(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._num_calls[module] += 1
        if self._num_calls[module] == 1:  # both read the prompt in their first forward
            return
        seconds = self._time(module, args, {**kwargs, "past_key_values": copy.deepcopy(kwargs["past_key_values"])})
        if module is self._target:
            of_block, of_scores = self._draft_seconds or (0.0, 0.0)
            self.rounds.append((kwargs["input_ids"].shape[1], seconds, of_block, of_scores))
            self._draft_seconds = None
        else:
            self._draft_seconds = [seconds, 0.0]

    def _repeat_scoring(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._draft_seconds is not None:
            self._draft_seconds[1] += self._time(module, args, kwargs)

    def _time(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> float:
        synchronize(self._target)
        start = time.perf_counter()
        module.forward(*args, **kwargs)  # not through the hooks
        synchronize(self._target)
        return time.perf_counter() - start


def time_bare_forwards(
    target: PreTrainedModel, head: JetFlowHead, context_ids: Sequence[int], node_counts: Sequence[int]
) -> list[list[float]]:
    """
    Seconds of the bare forwards of a round, by the nodes that are verified.

    Args:
        context_ids: Token ids of a text of the length that decoding has there.
        node_counts: Node budgets to try; 1 is a plain round, without a head forward.

    Returns:
        `[[nodes, target, block, scores], ...]`: Medians of seconds by ascending nodes: of the target's forward, of the
            head's over its block, and of what it scores nodes with, output projection and branch correction.
    """
    rounds: dict[int, list[tuple[float, ...]]] = {}
    input_ids = torch.tensor([list(context_ids)], device=target.device)
    for nodes in node_counts:
        configure(head, Variant("jetflow", nodes))
        with _Repeater(target, head) as repeater:
            target.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                assistant_model=head,
                do_sample=False,
                max_new_tokens=(NUM_ROUNDS + 2) * head.config.block_size,
                stopping_criteria=StoppingCriteriaList([repeater]),
            )
        for verified, of_target, of_block, of_scores in repeater.rounds:
            if of_block or verified == 1:  # the head's first forward was not timed
                rounds.setdefault(verified, []).append((of_target, of_block, of_scores))
    return [[nodes, *map(median, zip(*rounds[nodes], strict=True))] for nodes in sorted(rounds)]


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


def bare_round_seconds(runs: Sequence[Run], bare: Sequence[Sequence[Sequence[float]]]) -> dict[str, float] | None:
    """Mean seconds of the bare forwards of a round, by part, given what `time_bare_forwards` found beside each
    run; `None` where nothing is known."""
    total, num_rounds = np.zeros(len(PARTS)), 0
    for run, table in zip(runs, bare, strict=True):
        counts = rounds_by_nodes([run])
        if counts and table:
            nodes, *columns = (list(column) for column in zip(*table, strict=True))
            verified, rounds = list(counts), np.array(list(counts.values()))
            drafted = rounds * (np.array(verified) > 1)  # a plain round drafts nothing
            for part, column in enumerate(columns):
                total[part] += (drafted if part else rounds) @ np.interp(verified, nodes, column)
            num_rounds += sum(counts.values())
    return dict(zip(PARTS, (total / num_rounds).tolist(), strict=True)) if num_rounds else None
