"""What to draft in the next round: a fixed node budget, or the one with the highest measured throughput.

`AutoPolicy` times its rounds by tree size and adapts. Each round it drafts a tree, estimates from the tree's own
probabilities how many tokens every size would yield, and verifies the size whose last node still repays its time.
"""

import math
import time
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import median
from typing import Any

from transformers import GenerationConfig

from ..errors import JetFlowError
from ..trees.tree import DraftTree, trim_tree


MAX_WIDTH = 64  # children per node; a child ranked lower has less than 1/64 of its parent's probability
MAX_CONTINUED = 16  # levels that n-grams may add below the head's last depth
AUTO_BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # choices of "auto"; 1 is plain decoding
FIRST_TRIALS = (16, 1, 32, 8, 64)  # measured in the first rounds of a process; the others are interpolated
NUM_TRIALS = 2  # rounds per trial; each budget's first round is a warm-up
NUM_SAMPLES = 9  # newest timings stored per size
ROOFLINE_SAMPLES = 9  # weight of the roofline fit, in samples, when blended with a size's own timings
NUM_SPEED_SAMPLES = 5  # newest rounds, of any size, from which the machine's current speed is estimated
MIN_SECONDS = 1e-9  # of a round: tests may stop the clock
EVIDENCE = 4.0  # drafted rounds needed to decide whether drafting pays
MARGIN = 1.03  # minimum throughput of drafted rounds over plain ones
PROBE_SHARE = 0.01  # maximum share of run time spent probing whether drafting pays again
MIN_CREDIT, MAX_CREDIT = -1.0, 6.0  # bounds of the time saved up for probing, in plain rounds
REFRESH_EVERY = 16  # drafted rounds between probes of a neighboring budget, to update its timings
REFRESH_FIRST = (4, 8, 12)  # further probes among the first rounds, when little is known
REFRESH_SHARE = 0.01  # maximum share of drafted time spent on these probes
RETIME_EVERY = 8  # rounds between plain rounds that update their timing, while the gain is small
SMALL_GAIN = 1.25  # throughput over plain rounds that counts as small
MIN_NODE_GAIN = 0.75  # minimum expected gain of a drafted node over its verification cost


@dataclass(frozen=True)
class RoundPlan:
    """Shape of one round. One node is plain decoding, width 1 is a chain."""

    node_budget: int  # rows to verify, root included
    max_depth: int  # levels to draft
    width: int  # candidates per depth
    min_logprob: float = -math.inf  # nodes below it are not drafted
    max_continued: int = 0  # levels that n-grams may add below the head's deepest


def read_limits(generation_config: GenerationConfig, block_size: int) -> RoundPlan:
    """
    The limits of the head's generation config, validated; for `node_budget="auto"` its largest budget.

    Raises:
        JetFlowError: If `node_budget`, `max_depth` or `width` is out of range; the message gives the range.
    """
    # Not declared by `GenerationConfig`, so read with a default.
    node_budget: Any = getattr(generation_config, "node_budget", None)
    max_depth: Any = getattr(generation_config, "max_depth", None)
    width: Any = getattr(generation_config, "width", None)
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
    return RoundPlan(node_budget, max_depth, width, max_continued=MAX_CONTINUED * (max_depth == block_size - 1))


def chain_limits(limits: RoundPlan) -> RoundPlan:
    """The same limits for a target that verifies chains only."""
    return RoundPlan(min(limits.node_budget, limits.max_depth + 1), limits.max_depth, width=1)


def plan_round(limits: RoundPlan, num_remaining: int | None, max_nodes: int | None = None) -> RoundPlan:
    """
    The next round within the limits.

    Args:
        num_remaining (`int`, *optional*): Tokens that it may yield, the bonus token included.
        max_nodes (`int`, *optional*): Nodes that the cache has room for.
    """
    node_budget = limits.node_budget if max_nodes is None else min(limits.node_budget, max_nodes)
    max_depth, max_continued = min(limits.max_depth, node_budget - 1), limits.max_continued
    if num_remaining is not None:
        max_depth = min(max_depth, num_remaining - 1)
        max_continued = min(max_continued, num_remaining - 1 - max_depth)
    width = min(limits.width, max(node_budget - 1, 1))
    return RoundPlan(node_budget, max_depth, width, limits.min_logprob, max_continued)


class FixedPolicy:
    """The same node budget in every round."""

    def __init__(self, limits: RoundPlan):
        self._limits = limits

    def plan(self, num_remaining: int | None, max_nodes: int | None = None) -> RoundPlan:
        return plan_round(self._limits, num_remaining, max_nodes)

    def fit(self, tree: DraftTree) -> DraftTree:
        return tree

    def record(self, tree: DraftTree, num_accepted: float) -> None:
        pass

    def report(self) -> dict[str, Any]:
        return {}


def roofline(known: list[tuple[int, float, int]]) -> list[float]:
    """
    Seconds of each size on the roofline that fits all of them best: level while memory is what takes the time, from
    some size on a line that rises.

    Args:
        known: Nodes in ascending order, seconds and number of samples of each size. Errors are taken to be relative.
    """
    weights = [num_samples / seconds**2 for _, seconds, num_samples in known]
    total = sum(weights)
    mean = sum(weight * seconds for weight, (_, seconds, _) in zip(weights, known, strict=True)) / (total or 1)
    explained, base, slope, knee = 0.0, mean, 0.0, 0
    w = wn = wnn = wt = wnt = 0.0  # sums over the sizes above the knee: of weights, times nodes, times seconds
    for i in range(len(known) - 1, 0, -1):
        nodes, seconds, _ = known[i]
        weight, below = weights[i], known[i - 1][0]
        w, wn, wnn = w + weight, wn + weight * nodes, wnn + weight * nodes**2
        wt, wnt = wt + weight * seconds, wnt + weight * nodes * seconds
        over = wn - below * w
        variance = wnn - 2 * below * wn + below**2 * w - over**2 / total
        covariance = wnt - below * wt - over * mean
        if covariance > 0 and variance > 0 and covariance**2 / variance > explained:
            explained, slope, knee = covariance**2 / variance, covariance / variance, below
            base = mean - slope * over / total
    return [base + slope * max(nodes - knee, 0) for nodes, _, _ in known]


@dataclass
class RoundCosts:
    """
    Costs and yields of rounds on this machine, for one pair of head and target; stored for the process.

    Threads share it. Samples are replaced, never changed, so that one thread can read what another one adds to.
    """

    num_places: int = 1  # sequences decoded at once; nodes, tokens and promises are those of one of them
    samples: dict[int, tuple[float, ...]] = field(default_factory=dict)  # latest rounds by nodes: seconds over `pace`
    paces: tuple[float, ...] = ()  # of the latest rounds of any size: seconds over what their size takes at pace 1
    expected: float = 1.0  # tokens that the draft probabilities promised in recent rounds
    accepted: float = 1.0  # tokens that were accepted in them
    tokens: float = 0.0  # mean yield of drafted rounds, the latest weighing most
    drafted_seconds: float = 0.0  # mean time of them, at pace 1
    num_drafted: int = 0
    credit: float = 0.0  # seconds at pace 1 that drafting may lose
    refresh_credit: float = 0.0  # seconds at pace 1 that taking neighbors of the best budget may lose
    _curve: list[tuple[int, float]] | None = None  # what `by_nodes` returns, until the next sample

    @property
    def pace(self) -> float:
        """Current slowdown of the machine: sizes not used lately are assumed to be as much slower as the others."""
        return median(self.paces) if self.paces else 1.0

    def add(self, num_nodes: int, seconds: float) -> None:
        """Add the timing of a round, without its drafting; the first of each size is a warm-up."""
        known = self.samples.get(num_nodes)
        if known:
            self.paces = (*self.paces, seconds / median(known))[-NUM_SPEED_SAMPLES:]
        self.samples[num_nodes] = () if known is None else (*known, seconds / self.pace)[-NUM_SAMPLES:]
        self._curve = None

    def untried(self, max_nodes: int) -> int | None:
        """A node budget still to be measured before there is anything to choose from; at most `max_nodes`."""
        trials = [1 if budget == 1 else min(max(budget // self.num_places, 2), max_nodes) for budget in FIRST_TRIALS]
        return next((budget for budget in trials if len(self.samples.get(budget, ())) < NUM_TRIALS - 1), None)

    def seconds(self, num_nodes: int) -> float:
        """Predicted time of a round without its drafting, at the current speed."""
        return self.pace * self.level(num_nodes)

    def level(self, num_nodes: int) -> float:
        """The same at pace 1: from its own timings, or interpolated between its neighbors."""
        known = self.by_nodes()
        above = next((i for i, (nodes, _) in enumerate(known) if nodes >= num_nodes), len(known) - 1)
        (low, low_seconds), (high, high_seconds) = known[max(above - 1, 0)], known[max(above, 1)]
        return low_seconds + (high_seconds - low_seconds) * (num_nodes - low) / (high - low)

    def seconds_per_node(self) -> float:
        """Minimum average time of verifying one more node than the anchor."""
        (_, plain), *others = self.by_nodes()
        return self.pace * min(((seconds - plain) / (nodes - 1) for nodes, seconds in others), default=0.0)

    def by_nodes(self) -> list[tuple[int, float]]:
        """Nodes and seconds at pace 1: between what each size took and what the sizes together suggest for it. Where
        more nodes still seem to take less time, both take the mean of the two."""
        curve = self._curve
        if curve is None:
            samples = sorted(self.samples.copy().items())
            known = [(nodes, median(values), len(values)) for nodes, values in samples if values]
            plain = [known.pop(0)[:2]] if known and known[0][0] == 1 else []
            levels: list[tuple[float, list[int]]] = []
            for (nodes, own, count), suggested in zip(known, roofline(known), strict=True):
                level = (count * own + ROOFLINE_SAMPLES * suggested) / (count + ROOFLINE_SAMPLES)
                members = [nodes]
                while levels and levels[-1][0] > level:
                    before, others = levels.pop()
                    level = (before * len(others) + level * len(members)) / (len(others) + len(members))
                    members = others + members
                levels.append((level, members))
            curve = self._curve = plain + [(nodes, level) for level, members in levels for nodes in members]
        return curve

    def earn(self, seconds: float) -> None:
        """Add to the probing credit, or take from it; seconds at pace 1."""
        plain = self.level(1)
        self.credit = min(max(self.credit + seconds, MIN_CREDIT * plain), MAX_CREDIT * plain)

    def count(self, expected: float, num_accepted: float, seconds: float) -> None:
        """Record a drafted round: tokens expected and accepted, and its time."""
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

    A tree is drafted, then cut to the `n` likeliest nodes that maximize 1 + c x sum of their path probabilities -
    r x seconds(n), with the seconds of earlier rounds and the calibration c of `RoundCosts`, and the tokens per second
    r of recent rounds: a round's last node must repay its time as well as the text does on average, which makes most
    of all rounds together, while the best ratio of each round alone does not. Where drafted rounds yield less than
    plain ones would, plain rounds follow; drafting is tried again as often as its loss stays within a small share of
    all time.
    """

    def __init__(self, limits: RoundPlan, costs: RoundCosts):
        self._limits, self._costs = limits, costs
        self._max_nodes = sum(limits.width**depth for depth in range(limits.max_depth + 1))  # that a tree can have
        self._ceiling = max(64 // costs.num_places, 4)  # nodes drafted: about twice of what was chosen last
        # Yield and time, at pace 1, of drafted rounds: of earlier generations at first, more and more of this one's.
        self._weight = EVIDENCE if costs.num_drafted else 0.0
        self._tokens, self._seconds = self._weight * costs.tokens, self._weight * costs.drafted_seconds
        self._is_trial = self._is_refresh = False
        self._num_planned = 0
        self._promised = 0.0  # drafted tokens that this round's tree promises
        self._start = self._start_of_rest = 0.0  # of the round, and of what follows its drafting

    def plan(self, num_remaining: int | None, max_nodes: int | None = None) -> RoundPlan:
        self._start = time.perf_counter()
        costs = self._costs
        untried = costs.untried(min(self._max_nodes, max_nodes or self._max_nodes))
        self._is_trial = untried is not None
        self._is_refresh = costs.num_drafted % REFRESH_EVERY == 0 or costs.num_drafted in REFRESH_FIRST
        self._num_planned += 1
        least = -math.inf if self._is_trial or self._is_refresh else self._min_logprob()
        limits = replace(self._limits, node_budget=untried or self._choose(), min_logprob=least)
        return plan_round(limits, num_remaining, max_nodes)

    def _min_logprob(self) -> float:
        """Minimum log-probability of a node that can repay its verification."""
        gain = MIN_NODE_GAIN * (self._rate or 0) * self._costs.seconds_per_node() / self._costs.calibration
        return math.log(gain) if gain > 0 else -math.inf

    def _choose(self) -> int:
        """Number of nodes to draft; 1 decodes plainly."""
        costs = self._costs
        if self._weight >= EVIDENCE:
            over_plain = self._tokens * costs.level(1) / self._seconds
            if over_plain < MARGIN and costs.credit <= 0:
                return 1
            if MARGIN <= over_plain < SMALL_GAIN and self._num_planned % RETIME_EVERY == 0:
                return 1
        return self._ceiling

    def fit(self, tree: DraftTree) -> DraftTree:
        """The part of the tree that repays its verification."""
        num_nodes = tree.num_nodes
        if num_nodes == 1:
            self._start_of_rest = self._start
            return tree
        self._start_of_rest = time.perf_counter()
        # The root's 1 comes first; of a batch, what its trees promise on average.
        trees = [sorted(map(math.exp, row), reverse=True) for row in tree.logprobs.view(-1, num_nodes).tolist()]
        gains = list(accumulate(sum(shares) / len(trees) for shares in zip(*trees, strict=True)))
        best = num_nodes if self._is_trial else self._best_budget(gains)
        self._promised = gains[best - 1] - 1
        return tree if best == num_nodes else trim_tree(tree, best)

    def _best_budget(self, gains: list[float]) -> int:
        """Of a tree whose best `n` nodes have path probabilities that sum to `gains[n - 1]`, the root's 1 included."""
        costs, most = self._costs, len(gains)
        budgets = [budget for budget in AUTO_BUDGETS[1:] if budget <= most]
        if most == self._max_nodes or not budgets:
            budgets.append(most)
        yields = [(1 + costs.calibration * (gains[n - 1] - 1), costs.seconds(n)) for n in budgets]
        drafting = self._start_of_rest - self._start
        rate = self._rate or max(tokens / (drafting + seconds) for tokens, seconds in yields)
        rate = max(rate, 1 / costs.seconds(1))
        surplus = [tokens - rate * seconds for tokens, seconds in yields]
        place = surplus.index(max(surplus))
        self._ceiling = next((budget for budget in AUTO_BUDGETS if budget >= 2 * budgets[place]), AUTO_BUDGETS[-1])
        if self._is_refresh:  # above and below in turn
            turn = costs.num_drafted // REFRESH_EVERY + costs.num_drafted // REFRESH_FIRST[0]
            other = min(max(place + (1 if turn % 2 else -1), 0), len(budgets) - 1)
            loss = 0.0 if costs.num_drafted in REFRESH_FIRST else (surplus[place] - surplus[other]) / rate / costs.pace
            if loss <= costs.refresh_credit:
                costs.refresh_credit -= loss
                place = other
        return budgets[place]

    def record(self, tree: DraftTree, num_accepted: float) -> None:
        """Learn from a finished round; in a batch, `num_accepted` is the mean."""
        now, costs, num_nodes = time.perf_counter(), self._costs, tree.num_nodes
        rest = max(now - self._start_of_rest, MIN_SECONDS)
        seconds = max(now - self._start, rest)
        costs.add(num_nodes, rest)
        if self._is_trial:
            return
        # How slow the machine was in this very round: it must not tell for or against drafting later.
        seconds *= costs.level(num_nodes) / rest
        costs.earn(PROBE_SHARE * seconds)
        if num_nodes == 1:
            return
        costs.earn((num_accepted + 1) * costs.level(1) - seconds)
        costs.count(self._promised, num_accepted, seconds)
        costs.refresh_credit += REFRESH_SHARE * seconds
        self._weight = 0.9 * self._weight + 1
        self._tokens = 0.9 * self._tokens + num_accepted + 1
        self._seconds = 0.9 * self._seconds + seconds

    @property
    def _rate(self) -> float | None:
        """Tokens per second of recent drafted rounds, at the current speed."""
        return self._tokens / (self._costs.pace * self._seconds) if self._seconds else None

    def report(self) -> dict[str, Any]:
        """Seconds of a round without its drafting by nodes, the calibration, and the yield of recent drafted rounds
        against plain ones."""
        costs, rate = self._costs, self._rate
        known = {nodes: costs.pace * seconds for nodes, seconds in costs.by_nodes()}
        return {
            "verify_seconds": known,
            "calibration": costs.calibration,
            "drafted_over_plain": rate * known[1] if rate is not None and 1 in known else None,
        }


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
