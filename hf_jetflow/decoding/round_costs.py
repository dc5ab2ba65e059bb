"""Times and yields of rounds on the running machine, which `node_budget="auto"` chooses by."""

from dataclasses import dataclass, field
from statistics import median


FIRST_TRIALS = (16, 1, 32, 8, 64)  # node budgets timed in the first rounds of a process; others are interpolated
NUM_SAMPLES = 9  # newest timings stored per size; also the weight of the roofline fit when blended with them
NUM_SPEED_SAMPLES = 5  # newest rounds, of any size, from which the machine's current speed is estimated
MIN_CREDIT, MAX_CREDIT = -1.0, 6.0  # bounds of the time budget for probing, in plain rounds


def roofline(known: list[tuple[int, float, int]]) -> list[float]:
    """
    Fit a roofline (constant while memory-bound, then linear) and return its seconds at each size.

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

    Seconds are normalized: divided by the machine's slowdown when they were measured. Threads share the object.
    Samples are replaced, never changed, so that one thread can read what another one adds to.
    """

    num_sequences: int = 1  # decoded together; all figures are per sequence
    samples: dict[int, tuple[float, ...]] = field(default_factory=dict)  # by nodes: normalized seconds
    slowdowns: tuple[float, ...] = ()  # of the latest rounds: seconds over the median of their size
    expected: float = 1.0  # tokens that the draft probabilities promised in recent rounds
    accepted: float = 1.0  # tokens that were accepted in them
    tokens: float = 0.0  # mean yield of drafted rounds, the latest weighing most
    drafted_seconds: float = 0.0  # their mean normalized time
    num_drafted: int = 0
    credit: float = 0.0  # time budget for probing drafting, normalized seconds
    refresh_credit: float = 0.0  # time budget for probing neighboring node budgets, normalized seconds
    _curve: list[tuple[int, float]] | None = None  # what `by_nodes` returns, until the next sample

    @property
    def slowdown(self) -> float:
        """Current slowdown of the machine; it is applied to all sizes, also to those not measured lately."""
        return median(self.slowdowns) if self.slowdowns else 1.0

    def add(self, num_nodes: int, seconds: float) -> None:
        """Add the timing of a round, without its drafting; the first of each size is a warm-up."""
        known = self.samples.get(num_nodes)
        if known:
            self.slowdowns = (*self.slowdowns, seconds / median(known))[-NUM_SPEED_SAMPLES:]
        self.samples[num_nodes] = () if known is None else (*known, seconds / self.slowdown)[-NUM_SAMPLES:]
        self._curve = None

    def untried(self, max_nodes: int) -> int | None:
        """Next node budget to time during warm-up, at most `max_nodes`; `None` once all are timed."""
        trials = [
            1 if budget == 1 else min(max(budget // self.num_sequences, 2), max_nodes) for budget in FIRST_TRIALS
        ]
        return next((budget for budget in trials if not self.samples.get(budget)), None)

    def seconds(self, num_nodes: int) -> float:
        """Predicted time of a round without its drafting, at the current speed."""
        return self.slowdown * self.normalized_seconds(num_nodes)

    def normalized_seconds(self, num_nodes: int) -> float:
        """Predicted time at slowdown 1: from the size's own timings, or interpolated between its neighbors."""
        known = self.by_nodes()
        above = next((i for i, (nodes, _) in enumerate(known) if nodes >= num_nodes), len(known) - 1)
        (low, low_seconds), (high, high_seconds) = known[max(above - 1, 0)], known[max(above, 1)]
        return low_seconds + (high_seconds - low_seconds) * (num_nodes - low) / (high - low)

    def seconds_per_node(self) -> float:
        """Minimum average time of verifying one more node than the anchor."""
        (_, plain), *others = self.by_nodes()
        return self.slowdown * min(((seconds - plain) / (nodes - 1) for nodes, seconds in others), default=0.0)

    def by_nodes(self) -> list[tuple[int, float]]:
        """Smoothed normalized seconds by number of nodes: medians blended with the roofline fit, then made
        non-decreasing (pool adjacent violators)."""
        curve = self._curve
        if curve is None:
            samples = sorted(self.samples.copy().items())
            known = [(nodes, median(values), len(values)) for nodes, values in samples if values]
            plain = [known.pop(0)[:2]] if known and known[0][0] == 1 else []
            levels: list[tuple[float, list[int]]] = []
            for (nodes, own, count), fitted in zip(known, roofline(known), strict=True):
                level = (count * own + NUM_SAMPLES * fitted) / (count + NUM_SAMPLES)
                members = [nodes]
                while levels and levels[-1][0] > level:
                    before, others = levels.pop()
                    level = (before * len(others) + level * len(members)) / (len(others) + len(members))
                    members = others + members
                levels.append((level, members))
            curve = self._curve = plain + [(nodes, level) for level, members in levels for nodes in members]
        return curve

    def earn(self, seconds: float) -> None:
        """Add normalized seconds to the time budget for probing, or take them from it."""
        plain = self.normalized_seconds(1)
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
