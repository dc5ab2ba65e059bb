"""What to draft in the next round: a fixed node budget, or the one that the running machine repays best."""

import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from transformers import GenerationConfig

from .tree import DraftTree, trim_tree


MAX_WIDTH = 64  # children considered per node; a child ranked lower has a probability below 1/64 of its parent's
AUTO_BUDGETS = (1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # what "auto" chooses from; 1 is plain decoding
FIRST_TRIALS = (16, 1, 32, 8, 64)  # tried in the first rounds of a process; the other budgets are read off these
NUM_TRIALS = 2  # rounds per trial; each budget's first round is not counted (kernels are made ready in it)
SHORTEST_PAUSE, LONGEST_PAUSE = 8, 128  # plain rounds after which drafting is tried again where it did not pay
EVIDENCE = 4.0  # drafted rounds by which it is decided that drafting does not pay


@dataclass(frozen=True)
class RoundPlan:
    """Shape of one round. One node is plain decoding, width 1 is a chain."""

    node_budget: int  # rows to verify, root included
    max_depth: int  # levels to draft
    width: int  # candidates per depth


def read_limits(generation_config: GenerationConfig, block_size: int) -> RoundPlan:
    """
    The head's own limits, checked; for `node_budget="auto"` the greatest budget that may be chosen.

    Raises:
        ValueError: If `node_budget`, `max_depth` or `width` is out of range; the message gives the range.
    """
    # Not declared by `GenerationConfig`, so read with a default.
    node_budget: Any = getattr(generation_config, "node_budget", None)
    max_depth: Any = getattr(generation_config, "max_depth", None)
    width: Any = getattr(generation_config, "width", None)
    if node_budget == "auto":
        node_budget = AUTO_BUDGETS[-1]
    if not _is_int(node_budget) or node_budget < 1:
        raise ValueError(
            f"`node_budget` is {node_budget!r}, but 'auto' or an integer of at least 1 (root included) is needed"
        )
    if not _is_int(max_depth) or not 1 <= max_depth < block_size:
        raise ValueError(
            f"`max_depth` is {max_depth!r}, but this head drafts 1 .. {block_size - 1} levels "
            f"(`block_size` {block_size})"
        )
    if width is not None and (not _is_int(width) or width < 1):
        raise ValueError(f"`width` is {width!r}, but an integer of at least 1 is needed (1 drafts a chain)")
    return RoundPlan(node_budget, max_depth, min(width or MAX_WIDTH, max(node_budget - 1, 1)))


def plan_round(limits: RoundPlan, num_remaining: int | None) -> RoundPlan:
    """The next round, with `num_remaining` tokens (`None`: no limit) left to emit, the bonus token included."""
    max_depth = min(limits.max_depth, limits.node_budget - 1)
    if num_remaining is not None:
        max_depth = min(max_depth, num_remaining - 1)
    return RoundPlan(limits.node_budget, max_depth, limits.width)


class FixedPolicy:
    """The same node budget in every round."""

    def __init__(self, limits: RoundPlan):
        self._limits = limits

    def plan(self, num_remaining: int | None) -> RoundPlan:
        return plan_round(self._limits, num_remaining)

    def fit(self, tree: DraftTree) -> DraftTree:
        return tree

    def record(self, tree: DraftTree, num_accepted: int) -> None:
        pass

    def report(self) -> dict[str, Any]:
        return {}


@dataclass
class RoundCosts:
    """What rounds cost and yield on this machine, for one pair of head and target; kept for the process."""

    samples: dict[int, deque[float]] = field(default_factory=dict)  # seconds of the latest rounds, by nodes
    expected: float = 1.0  # tokens that the draft probabilities promised in recent rounds
    accepted: float = 1.0  # tokens that were accepted in them
    tokens: float = 0.0  # mean yield of drafted rounds, the latest weighing most
    drafted_seconds: float = 0.0  # mean time of them
    num_drafted: int = 0

    def add(self, num_nodes: int, seconds: float) -> None:
        """Count a round; the first one of each size is left out."""
        if num_nodes in self.samples:
            self.samples[num_nodes].append(seconds)
        else:
            self.samples[num_nodes] = deque(maxlen=9)

    def untried(self, most_nodes: int) -> int | None:
        """A node budget that must be tried before there is anything to choose by; no tree exceeds `most_nodes`."""
        trials = (min(budget, most_nodes) for budget in FIRST_TRIALS)
        return next((budget for budget in trials if len(self.samples.get(budget, ())) < NUM_TRIALS - 1), None)

    def seconds(self, num_nodes: int) -> float:
        """Of a round: the median of its latest, or what lies on the line between its neighbours'."""
        known = sorted((nodes, median(values)) for nodes, values in self.samples.items() if values)
        above = next((i for i, (nodes, _) in enumerate(known) if nodes >= num_nodes), len(known) - 1)
        (low, low_seconds), (high, high_seconds) = known[max(above - 1, 0)], known[max(above, 1)]
        return low_seconds + (high_seconds - low_seconds) * (num_nodes - low) / (high - low)

    def count(self, expected: float, num_accepted: int, seconds: float) -> None:
        """Compare a drafted round's promise with what was kept of it, and what it yielded with what it took."""
        self.expected = 0.98 * self.expected + expected
        self.accepted = 0.98 * self.accepted + num_accepted
        self.num_drafted += 1
        share = max(1 / self.num_drafted, 0.02)
        self.tokens += share * (num_accepted + 1 - self.tokens)
        self.drafted_seconds += share * (seconds - self.drafted_seconds)

    @property
    def calibration(self) -> float:
        """Tokens accepted per token promised."""
        return (self.accepted + 1) / (self.expected + 1)


class AutoPolicy:
    """
    Chooses the node budget of each round that yields most tokens per second, and plain decoding where none repays.

    A tree is drafted, then cut to the `n` likeliest nodes that maximise (1 + c x sum of their path probabilities) /
    seconds(n), with the seconds of earlier rounds and the calibration c of `RoundCosts` (arXiv 2606.01813 chooses a
    budget likewise). Where drafted rounds yield less than plain ones would, plain rounds follow, and another try.
    """

    def __init__(self, limits: RoundPlan, costs: RoundCosts):
        self._limits, self._costs = limits, costs
        self._most_nodes = sum(limits.width**depth for depth in range(limits.max_depth + 1))  # that a tree can have
        self._ceiling = 64  # nodes drafted: about twice of what was chosen last
        self._plain_rounds_left = 0
        self._pause = SHORTEST_PAUSE
        # Yield and time of drafted rounds: of earlier generations at first, more and more of this one's latest.
        self._weight = EVIDENCE if costs.num_drafted else 0.0
        self._tokens, self._seconds = self._weight * costs.tokens, self._weight * costs.drafted_seconds
        self._is_trial = False
        self._start = 0.0

    def plan(self, num_remaining: int | None) -> RoundPlan:
        self._start = time.perf_counter()
        untried = self._costs.untried(self._most_nodes)
        self._is_trial = untried is not None
        if not (self._is_trial or self._plain_rounds_left):
            self._pause_if_drafting_does_not_pay()
        budget = untried or (1 if self._plain_rounds_left else self._ceiling)
        limits = self._limits
        return plan_round(RoundPlan(budget, limits.max_depth, min(limits.width, max(budget - 1, 1))), num_remaining)

    def fit(self, tree: DraftTree) -> DraftTree:
        """The part of the tree that is worth its verification."""
        num_nodes = len(tree.tokens)
        if self._is_trial or num_nodes <= AUTO_BUDGETS[1]:
            return tree
        gains = tree.logprobs.exp().sort(descending=True).values.cumsum(0).tolist()  # the root's 1 comes first
        budgets = [budget for budget in AUTO_BUDGETS[1:] if budget < num_nodes] + [num_nodes]
        best = max(budgets, key=lambda n: (1 + self._costs.calibration * (gains[n - 1] - 1)) / self._costs.seconds(n))
        self._ceiling = next((budget for budget in AUTO_BUDGETS if budget >= 2 * best), AUTO_BUDGETS[-1])
        return tree if best == num_nodes else trim_tree(tree, best)

    def record(self, tree: DraftTree, num_accepted: int) -> None:
        """Learn from a round that is over."""
        seconds, costs = time.perf_counter() - self._start, self._costs
        num_nodes = len(tree.tokens)
        costs.add(num_nodes, seconds)
        if num_nodes == 1:
            self._plain_rounds_left = max(self._plain_rounds_left - 1, 0)
            return
        costs.count(float(tree.logprobs.exp().sum()) - 1, num_accepted, seconds)
        self._weight = 0.9 * self._weight + 1
        self._tokens = 0.9 * self._tokens + num_accepted + 1
        self._seconds = 0.9 * self._seconds + seconds

    def _pause_if_drafting_does_not_pay(self) -> None:
        if self._weight < EVIDENCE:
            return
        if self._tokens * self._costs.seconds(1) >= self._seconds:
            self._pause = SHORTEST_PAUSE
            return
        self._plain_rounds_left = self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        for name in ("_weight", "_tokens", "_seconds"):  # so that the next try counts as much as all before it
            setattr(self, name, getattr(self, name) / 2)

    def report(self) -> dict[str, Any]:
        """Seconds of a round by nodes, the calibration, and the yield of recent drafted rounds against plain ones."""
        costs = self._costs
        known = {nodes: median(values) for nodes, values in sorted(costs.samples.items()) if values}
        rate = self._tokens / self._seconds if self._seconds else None
        return {
            "round_seconds": known,
            "calibration": costs.calibration,
            "drafted_over_plain": rate * known[1] if rate is not None and 1 in known else None,
        }


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
