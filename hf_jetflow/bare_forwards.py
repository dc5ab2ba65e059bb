"""Bare forwards: what a round costs at least, to say how much of it is the loop's own work.

The loop efficiency of a row is (bare target forward + bare head forward) / whole round. Both forwards are the very
calls that the loop makes: during a short generation every call is repeated once, alone, with the same rows, mask,
positions and (a copy of) the same cache, and the repetition is timed. What counts as the loop's own work is all else:
planning, ranking and branch correction, building the tree, masks, walking, committing, emitting.
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
from .modeling_jetflow import JetFlowHead


NUM_CONTEXTS = 3  # texts on which the forwards are repeated
NUM_ROUNDS = 4  # rounds of each that count, for each number of nodes
LEAST_SHARE = 0.05  # numbers of nodes of fewer rounds are read off the others


class _Repeater(StoppingCriteria):
    """Repeats every forward of target and head inside, and ends a generation when it has seen enough rounds."""

    def __init__(self, target: PreTrainedModel, head: JetFlowHead):
        self._modules = (target, head)
        self._num_calls = {target: 0, head: 0}
        self._head_seconds = 0.0  # of the newest draft
        self.rounds: list[tuple[int, float, float]] = []  # nodes, seconds of the target, seconds of the head

    def __enter__(self) -> "_Repeater":
        self._handles = [module.register_forward_pre_hook(self._repeat, with_kwargs=True) for module in self._modules]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        is_done = len(self.rounds) >= NUM_ROUNDS
        return torch.full((len(input_ids),), is_done, device=input_ids.device)

    def _repeat(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        target = self._modules[0]
        self._num_calls[module] += 1
        if self._num_calls[module] == 1:  # both read the prompt in their first forward
            return
        own_cache = {**kwargs, "past_key_values": copy.deepcopy(kwargs["past_key_values"])}
        synchronize(target)
        start = time.perf_counter()
        module.forward(*args, **own_cache)  # not through the hooks
        synchronize(target)
        seconds = time.perf_counter() - start
        if module is target:
            self.rounds.append((kwargs["input_ids"].shape[1], seconds, self._head_seconds))
            self._head_seconds = 0.0
        else:
            self._head_seconds = seconds


def time_bare_forwards(
    target: PreTrainedModel, head: JetFlowHead, contexts: Sequence[Sequence[int]], node_counts: Sequence[int]
) -> list[list[float]]:
    """
    Seconds of the bare forwards of a round, by the nodes that are verified.

    Args:
        contexts: Token ids of texts of the length that decoding has there; the numbers of nodes take turns on each.
        node_counts: Node budgets to try; 1 is a plain round, without a head forward.

    Returns:
        `[[nodes, target seconds, head seconds], ...]`: Medians, by ascending nodes.
    """
    rounds: dict[int, list[tuple[float, float]]] = {}
    for ids in contexts[:NUM_CONTEXTS]:
        input_ids = torch.tensor([list(ids)], device=target.device)
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
            for verified, of_target, of_head in repeater.rounds:
                if of_head or verified == 1:  # the head's first forward was not timed
                    rounds.setdefault(verified, []).append((of_target, of_head))
    return [
        [nodes, median(pair[0] for pair in rounds[nodes]), median(pair[1] for pair in rounds[nodes])]
        for nodes in sorted(rounds)
    ]


def usual_node_counts(runs_by_variant: Sequence[Sequence[Run]]) -> list[int]:
    """Numbers of nodes that a fair share of some variant's rounds verified, ascending."""
    usual: set[int] = set()
    for runs in runs_by_variant:
        counts = rounds_by_nodes(runs)
        usual |= {nodes for nodes, count in counts.items() if count >= LEAST_SHARE * sum(counts.values())}
    return sorted(usual)


def rounds_by_nodes(runs: Sequence[Run]) -> dict[int, int]:
    """Rounds of some runs by the nodes they verified, ascending."""
    counts: dict[int, int] = {}
    for run in runs:
        for nodes, count in (run.stats or {}).get("rounds_by_nodes", {}).items():
            counts[int(nodes)] = counts.get(int(nodes), 0) + count  # JSON knows keys of text only
    return dict(sorted(counts.items()))


def bare_round_seconds(runs: Sequence[Run], bare: Sequence[Sequence[float]]) -> float | None:
    """Mean seconds of the bare forwards of these runs' rounds; `None` where nothing is known."""
    counts = rounds_by_nodes(runs)
    if not counts or not bare:
        return None
    nodes, of_target, of_head = (list(column) for column in zip(*bare, strict=True))
    seconds = sum(
        count * (np.interp(verified, nodes, of_target) + (verified > 1) * np.interp(verified, nodes, of_head))
        for verified, count in counts.items()
    )
    return float(seconds / sum(counts.values()))
