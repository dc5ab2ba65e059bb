"""What to draft in the next round: a fixed node budget, or the one with the highest measured throughput.

`AutoPolicy` times its rounds by tree size and adapts. Each round it drafts a tree, estimates from the tree's own
probabilities how many tokens every size would yield, and verifies the size whose last node still repays its time.
"""

import difflib
import math
import time
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..errors import JetFlowError
from ..head.modeling_jetflow import JetFlowHead
from ..target.layer_kinds import takes_trees
from ..transfer import must_not_wait
from ..trees.tree import DraftTree, trim_tree
from .round_costs import RoundCosts


MAX_WIDTH = 64  # children per node; a child ranked lower has less than 1/64 of its parent's probability
MAX_CONTINUED = 16  # levels that n-grams may add below the head's last depth
AUTO_BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # choices of "auto"; 1 is plain decoding
MIN_SECONDS = 1e-9  # of a round: a clock may be coarse
EVIDENCE = 4.0  # drafted rounds needed to decide whether drafting pays
PROBE_SHARE = 0.01  # maximum share of run time spent probing whether drafting pays again
REFRESH_EVERY = 16  # drafted rounds between probes of a neighboring budget, to update its timings
REFRESH_SHARE = 0.01  # maximum share of drafted time spent on these probes
RETIME_EVERY = 8  # rounds between plain rounds that update their timing, while the gain is small
SMALL_GAIN = 1.25  # threshold of a small gain: throughput over plain rounds


@dataclass(frozen=True)
class TreeLimits:
    """Limits of a drafted tree: of one round's (its plan), or of all trees of a generation. One node is plain
    decoding, width 1 is a chain."""

    node_budget: int  # rows to verify, root included
    max_depth: int  # levels to draft
    width: int  # maximum number of children of a node
    min_logprob: float = -math.inf  # nodes below it are not drafted
    max_continued: int = 0  # levels that n-grams may add below the head's deepest


SETTINGS = ("node_budget", "max_depth", "width", "lay_out_target")
_KNOWN = {*vars(GenerationConfig()), *SETTINGS}


def read_limits(generation_config: GenerationConfig, block_size: int) -> TreeLimits:
    """
    The limits of the head's generation config, validated; for `node_budget="auto"` its largest budget.

    N-gram continuation is allowed only at the full depth.

    Raises:
        JetFlowError: If one of `SETTINGS` is out of range or misspelled; the message gives the range or the name.
    """
    for name in vars(generation_config).keys() - _KNOWN:
        if close := difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.8):
            raise JetFlowError(f"`{name}` is no setting of a head, did you mean `{close[0]}`?")
    # Not declared by `GenerationConfig`, whose user may have made another one.
    node_budget: Any = getattr(generation_config, "node_budget", None)
    max_depth: Any = getattr(generation_config, "max_depth", None)
    width: Any = getattr(generation_config, "width", None)
    lay_out_target: Any = getattr(generation_config, "lay_out_target", None)
    if lay_out_target is not None and not isinstance(lay_out_target, bool):
        raise JetFlowError(f"`lay_out_target` is {lay_out_target!r}, but must be True, False or None")
    if node_budget == "auto":
        node_budget = AUTO_BUDGETS[-1]
    if not _is_int(node_budget) or node_budget < 1:
        raise JetFlowError(
            f"`node_budget` is {node_budget!r}, but must be 'auto' or an integer of at least 1 (root included)"
        )
    if not _is_int(max_depth) or not 1 <= max_depth < block_size:
        raise JetFlowError(
            f"`max_depth` is {max_depth!r}, but this head drafts 1 .. {block_size - 1} levels "
            f"(`block_size` {block_size})"
        )
    if width is not None and (not _is_int(width) or width < 1):
        raise JetFlowError(f"`width` is {width!r}, but must be an integer of at least 1 (1 drafts a chain)")
    width = min(width or MAX_WIDTH, max(node_budget - 1, 1))
    return TreeLimits(node_budget, max_depth, width, max_continued=MAX_CONTINUED if max_depth == block_size - 1 else 0)


def chain_limits(limits: TreeLimits) -> TreeLimits:
    """Limits for a target that verifies chains only: width 1, no n-gram continuation."""
    return TreeLimits(min(limits.node_budget, limits.max_depth + 1), limits.max_depth, width=1)


def plan_round(limits: TreeLimits, max_yield: int | None, max_nodes: int | None = None) -> TreeLimits:
    """
    The limits of the next round's tree, within those of the generation.

    Args:
        max_yield (`int`, *optional*): Tokens that the round may yield, the bonus token included.
        max_nodes (`int`, *optional*): Nodes that the target can verify.
    """
    node_budget = limits.node_budget if max_nodes is None else min(limits.node_budget, max_nodes)
    # A tree that reaches depth `node_budget - 1` is a full chain, so it is not continued.
    max_depth, max_continued = min(limits.max_depth, node_budget - 1), limits.max_continued
    if max_yield is not None:
        max_depth = min(max_depth, max_yield - 1)
        max_continued = min(max_continued, max_yield - 1 - max_depth)
    width = min(limits.width, max(node_budget - 1, 1))
    return TreeLimits(node_budget, max_depth, width, limits.min_logprob, max_continued)


class Policy(Protocol):
    """Decides the size of each round. Called in this order, once per round."""

    limits: TreeLimits  # of the trees of all rounds

    def plan(self, max_yield: int | None, max_nodes: int | None = None) -> TreeLimits:
        """The limits of the next round's tree; see `plan_round`."""

    def trim(self, tree: DraftTree, plan: TreeLimits) -> DraftTree:
        """The part of the drafted tree that is to be verified, within the plan: a captured draft exceeds it."""

    def record(self, tree: DraftTree, paths: list[list[int]]) -> None:
        """Learn from a finished round: the verified tree, and the accepted path of each sequence."""

    def report(self) -> dict[str, Any]:
        """What the choices were based on, for `GenerationStats.policy`."""


class FixedPolicy:
    """The same node budget in every round."""

    def __init__(self, limits: TreeLimits):
        self.limits = limits

    def plan(self, max_yield: int | None, max_nodes: int | None = None) -> TreeLimits:
        return plan_round(self.limits, max_yield, max_nodes)

    def trim(self, tree: DraftTree, plan: TreeLimits) -> DraftTree:
        return tree if tree.num_nodes <= plan.node_budget else trim_tree(tree, plan.node_budget)

    def record(self, tree: DraftTree, paths: list[list[int]]) -> None:
        pass

    def report(self) -> dict[str, Any]:
        return {}


@dataclass
class _OpenRound:
    """The round between its plan and its record."""

    start: float = 0.0
    start_of_rest: float = 0.0  # of what follows its drafting
    is_trial: bool = False  # times a size that has no timing yet
    is_refresh: bool = False  # times a neighbor of the best size
    logprobs: torch.Tensor | None = None  # of the drafted nodes, on their way to the host


class AutoPolicy:
    """
    Drafts a tree and keeps the best nodes that maximize expected tokens - r x seconds.

    `r` is the recent throughput in tokens per second. The last node must repay its time at that rate, which maximizes
    the throughput of all rounds together. Expected tokens follow from the tree's path probabilities and from how far
    earlier ones were right; seconds from `RoundCosts`. If drafting loses against plain decoding, plain rounds follow,
    and drafting is probed within a fixed share of run time.

    Args:
        limits ([`TreeLimits`]): Of the trees of all rounds.
        costs ([`RoundCosts`]): Of this pair, and of as many sequences.
        reads_late (`bool`): The host would have to wait for a tree's probabilities. A round's size then follows from
            the tree of the round before, whose probabilities reach the host with what the walk reads.
    """

    def __init__(self, limits: TreeLimits, costs: RoundCosts, reads_late: bool = False):
        self.limits, self._costs, self._reads_late = limits, costs, reads_late
        self._gains: list[float] = []  # by nodes: tokens that the best of them promise, of the latest tree read
        self._full_tree_size = sum(limits.width**depth for depth in range(limits.max_depth + 1))
        self._ceiling = max(64 // costs.num_sequences, 4)  # nodes to draft at most: about twice the last choice
        # Yield and normalized time of drafted rounds: of earlier generations at first, more and more of this one's.
        self._weight = EVIDENCE if costs.num_drafted else 0.0
        self._tokens, self._seconds = self._weight * costs.tokens, self._weight * costs.drafted_seconds
        self._num_planned = 0
        self._round = _OpenRound()

    def plan(self, max_yield: int | None, max_nodes: int | None = None) -> TreeLimits:
        start, costs = time.perf_counter(), self._costs
        untried = costs.untried(min(self._full_tree_size, max_nodes or self._full_tree_size))
        is_trial, is_refresh = untried is not None, costs.num_drafted % REFRESH_EVERY == 0
        self._round = _OpenRound(start, start, is_trial, is_refresh)
        self._num_planned += 1
        min_logprob = -math.inf if is_trial or is_refresh or self._reads_late else self._min_logprob()
        limits = replace(self.limits, node_budget=untried or self._choose(), min_logprob=min_logprob)
        return plan_round(limits, max_yield, max_nodes)

    def _min_logprob(self) -> float:
        """Minimum log-probability of a node that can repay its verification."""
        gain = (self._rate or 0) * self._costs.seconds_per_node() / self._costs.calibration
        return math.log(gain) if gain > 0 else -math.inf

    def _choose(self) -> int:
        """Number of nodes to draft; 1 decodes plainly."""
        costs = self._costs
        if self._weight >= EVIDENCE:
            over_plain = self._tokens * costs.normalized_seconds(1) / self._seconds
            if over_plain < 1 and costs.credit <= 0:
                return 1
            if 1 <= over_plain < SMALL_GAIN and self._num_planned % RETIME_EVERY == 0:
                return 1
        return self._ceiling

    def trim(self, tree: DraftTree, plan: TreeLimits) -> DraftTree:
        """The part of the tree that repays its verification."""
        num_nodes = min(tree.num_nodes, plan.node_budget)
        if tree.num_nodes == 1:
            return tree
        self._round.start_of_rest = time.perf_counter()
        if self._reads_late:
            self._round.logprobs = tree.logprobs.to("cpu", non_blocking=True)
        else:
            self._gains = _gains(tree.logprobs)
        gains = self._gains[:num_nodes]
        best = num_nodes if self._round.is_trial or not gains else self._best_budget(gains)
        return tree if best == tree.num_nodes else trim_tree(tree, best)

    def _best_budget(self, gains: list[float]) -> int:
        """The node budget of the highest surplus; see `_gains`."""
        costs, num_nodes = self._costs, len(gains)
        budgets = [budget for budget in AUTO_BUDGETS[1:] if budget <= num_nodes]
        if num_nodes == self._full_tree_size or not budgets:
            budgets.append(num_nodes)
        yields = [(1 + costs.calibration * (gains[n - 1] - 1), costs.seconds(n)) for n in budgets]
        drafting = self._round.start_of_rest - self._round.start
        rate = self._rate or max(tokens / (drafting + seconds) for tokens, seconds in yields)
        rate = max(rate, 1 / costs.seconds(1))
        surplus = [tokens - rate * seconds for tokens, seconds in yields]
        best = surplus.index(max(surplus))
        self._ceiling = next((budget for budget in AUTO_BUDGETS if budget >= 2 * budgets[best]), AUTO_BUDGETS[-1])
        if self._round.is_refresh:  # above and below in turn
            step = 1 if costs.num_drafted // REFRESH_EVERY % 2 else -1
            other = min(max(best + step, 0), len(budgets) - 1)
            loss = (surplus[best] - surplus[other]) / rate / costs.slowdown
            if loss <= costs.refresh_credit:
                costs.refresh_credit -= loss
                best = other
        return budgets[best]

    def record(self, tree: DraftTree, paths: list[list[int]]) -> None:
        now, costs, num_nodes = time.perf_counter(), self._costs, tree.num_nodes
        rest = max(now - self._round.start_of_rest, MIN_SECONDS)
        seconds = max(now - self._round.start, rest)
        costs.add(num_nodes, rest)
        if self._round.logprobs is not None:  # which are there: the walk has waited for the device
            self._gains = _gains(self._round.logprobs)
        if self._round.is_trial:
            return
        # Normalize by this round's own slowdown, so that a slow moment does not bias later choices.
        seconds *= costs.normalized_seconds(num_nodes) / rest
        costs.earn(PROBE_SHARE * seconds)
        if num_nodes == 1:
            return
        num_accepted = sum(len(path) - 1 for path in paths) / len(paths)  # per sequence
        costs.earn((num_accepted + 1) * costs.normalized_seconds(1) - seconds)
        costs.count(self._gains[num_nodes - 1] - 1, num_accepted, seconds)
        costs.refresh_credit += REFRESH_SHARE * seconds
        self._weight = 0.9 * self._weight + 1
        self._tokens = 0.9 * self._tokens + num_accepted + 1
        self._seconds = 0.9 * self._seconds + seconds

    @property
    def _rate(self) -> float | None:
        """Tokens per second of recent drafted rounds, at the current speed."""
        return self._tokens / (self._costs.slowdown * self._seconds) if self._seconds else None

    def report(self) -> dict[str, Any]:
        """Seconds from verify to commit by number of nodes, the calibration, and the recent throughput of drafted
        rounds over plain ones."""
        costs, rate = self._costs, self._rate
        known = {nodes: costs.slowdown * seconds for nodes, seconds in costs.by_nodes()}
        return {
            "verify_seconds": known,
            "calibration": costs.calibration,
            "drafted_over_plain": rate * known[1] if rate is not None and 1 in known else None,
        }


def _gains(logprobs: torch.Tensor) -> list[float]:
    """Sums of the highest path probabilities, by number of nodes, the root included; of a batch, averages."""
    trees = [sorted(map(math.exp, row), reverse=True) for row in logprobs.view(-1, logprobs.shape[-1]).tolist()]
    return list(accumulate(sum(shares) / len(trees) for shares in zip(*trees, strict=True)))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _num_candidates(head: JetFlowHead) -> int:
    """Most candidates that a depth can have; tokens outside the draft vocabulary aside."""
    config, num_scored = head.config, head.config.draft_vocab_size or head.config.vocab_size
    is_scored = bool(config.ngram_weights) or head.branch_correction is not None
    return min(num_scored, config.branch_candidates) if is_scored else num_scored


# Costs of rounds for each head and target that are still in use.
ROUND_COSTS: WeakKeyDictionary[JetFlowHead, WeakKeyDictionary[PreTrainedModel, dict]] = WeakKeyDictionary()


def choose_policy(head: JetFlowHead, model: PreTrainedModel, num_sequences: int) -> Policy:
    """The policy that the head's generation config asks for, for about `num_sequences` at once."""
    limits = read_limits(head.generation_config, head.config.block_size)
    limits = replace(limits, width=min(limits.width, _num_candidates(head)))
    if not takes_trees(model):
        limits = chain_limits(limits)
    if getattr(head.generation_config, "node_budget", None) != "auto":
        return FixedPolicy(limits)
    of_pair = ROUND_COSTS.setdefault(head, WeakKeyDictionary()).setdefault(model, {})
    lay_out_target = getattr(head.generation_config, "lay_out_target", None)
    key = (model.device, model.dtype, head.dtype, limits, num_sequences, lay_out_target)
    costs = of_pair.setdefault(key, RoundCosts(num_sequences))
    return AutoPolicy(limits, costs, reads_late=must_not_wait(model.device))
