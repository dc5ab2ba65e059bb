"""`node_budget="auto"`: on made-up machines, the budget that yields most tokens per second, and no less than plain."""

import functools
import math
import sys
import threading

import pytest
import torch
from helpers import make_tree
from reference import assert_same_text

from hf_jetflow.decoding import policy as policy_module
from hf_jetflow.decoding.policy import (
    AUTO_BUDGETS,
    REFRESH_EVERY,
    AutoPolicy,
    FixedPolicy,
    TreeLimits,
    choose_policy,
)
from hf_jetflow.decoding.round_costs import FIRST_TRIALS, RoundCosts, roofline
from hf_jetflow.trees.tree import Candidates, build_tree, chain_of, trim_tree


LIMITS = TreeLimits(node_budget=128, max_depth=7, width=64)


@functools.cache
def shares(top):
    """Probabilities by rank: the best token's, and a rest that falls off by halves."""
    rest = 0.5 ** torch.arange(1, 64)
    return torch.cat([torch.tensor([top]), (1 - top) * rest / rest.sum()])


@functools.cache
def full_tree(claimed, node_budget, max_depth, width):
    """The tree of every round with these limits: the head's drafts do not depend on the text."""
    if not max_depth:
        return make_tree([0], [-1])
    row = shares(claimed).log()[:width]
    candidates = Candidates(torch.arange(len(row)).repeat(max_depth, 1), row.repeat(max_depth, 1))
    return build_tree(torch.tensor([0]), candidates, node_budget, width=width)


class Machine:
    """
    A clock, a target whose forward costs what `seconds(nodes)` says, and a head right with the given probability.

    Its drafts are shared rows, whose probabilities are `shares(top)`.
    """

    def __init__(self, monkeypatch, seconds, top, claimed=None, seed=0):
        self.now = 0.0
        self.seconds, self.top, self.claimed = seconds, top, claimed or top or 0.5
        self.generator = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(policy_module.time, "perf_counter", lambda: self.now)

    def run(self, policy, num_tokens):
        """Tokens and seconds of a generation."""
        done, start = 0, self.now
        while done < num_tokens:
            plan = policy.plan(num_tokens - done)
            tree = full_tree(self.claimed, plan.node_budget, plan.max_depth, plan.width)
            self.now += 0.2 if plan.max_depth else 0.0  # the draft
            tree = policy.trim(tree, plan)
            self.now += self.seconds(len(tree.tokens))
            node = accepted = 0
            children = {
                pair: i for i, pair in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))
            }
            while True:
                choice = -1  # no token that was drafted
                if self.top:
                    choice = int(torch.multinomial(shares(self.top), 1, generator=self.generator))
                if (node := children.get((node, choice), -1)) < 0:
                    break
                accepted += 1
            policy.record(tree, [list(range(accepted + 1))])
            done += accepted + 1
        return done, self.now - start


def test_a_plain_round_that_was_timed_too_slow_is_timed_anew(monkeypatch):
    machine = Machine(monkeypatch, lambda nodes: 1.0 if nodes == 1 else 4.4, top=0.6)
    costs = RoundCosts()
    costs.samples = {nodes: (1.25 if nodes == 1 else 4.4,) for nodes in (1, 8, 16, 32, 64)}  # as in a cold process
    machine.run(AutoPolicy(LIMITS, costs), 400)
    assert costs.seconds(1) == pytest.approx(1.0)
    tokens, spent = machine.run(AutoPolicy(LIMITS, costs), 400)
    assert tokens / spent > 0.95


def rate(monkeypatch, seconds, top, node_budget, claimed=None, reads_late=False):
    """Tokens per second with a fixed budget, or with "auto" once it has had its trials."""
    machine = Machine(monkeypatch, seconds, top, claimed)
    if node_budget != "auto":
        limits = TreeLimits(node_budget, LIMITS.max_depth, max(min(64, node_budget - 1), 1))
        tokens, spent = machine.run(policy_module.FixedPolicy(limits), 1000)
        return tokens / spent
    costs = RoundCosts()
    machine.run(AutoPolicy(LIMITS, costs), 100)
    totals = [machine.run(AutoPolicy(LIMITS, costs, reads_late), 400) for _ in range(4)]
    return sum(tokens for tokens, _ in totals) / sum(spent for _, spent in totals)


MACHINES = {
    "rows are nearly free": lambda nodes: 1 + 0.001 * nodes,
    "rows cost a little": lambda nodes: 1 + 0.02 * nodes,
    "rows cost much": lambda nodes: 1 + 0.1 * nodes,
    "free up to 32 rows": lambda nodes: 1 + 0.1 * max(nodes - 32, 0),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("top", [0.8, pytest.param(0.5, marks=pytest.mark.slow)])
def test_auto_is_close_to_the_best_fixed_budget(machine, top, monkeypatch):
    fixed = {budget: rate(monkeypatch, MACHINES[machine], top, budget) for budget in (1, 4, 8, 16, 32, 64, 128)}
    assert rate(monkeypatch, MACHINES[machine], top, "auto") > 0.92 * max(fixed.values())


@pytest.mark.parametrize("machine", MACHINES)
def test_the_tree_before_tells_as_much_as_the_tree_itself(machine, monkeypatch):
    early, late = (rate(monkeypatch, MACHINES[machine], 0.8, "auto", reads_late=late) for late in (False, True))
    assert late > 0.95 * early


@pytest.mark.parametrize("reads_late", [False, True])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_head_that_is_never_right_costs_next_to_nothing(machine, reads_late, monkeypatch):
    plain = rate(monkeypatch, MACHINES[machine], 0.0, 1)
    assert rate(monkeypatch, MACHINES[machine], 0.0, "auto", claimed=0.7, reads_late=reads_late) > 0.96 * plain


def test_where_reading_would_wait_the_tree_before_decides():
    """What the policy reads of a tree is there after the walk only."""
    samples = {nodes: (1 + 0.1 * nodes,) for nodes in (1, 8, 16, 32, 64)}
    costs = RoundCosts(samples=samples, tokens=1.0, drafted_seconds=1.0, num_drafted=1)
    policy = AutoPolicy(LIMITS, costs, reads_late=True)
    trees, sizes = [chain_of(torch.zeros(1, 64, dtype=torch.long)) for _ in range(3)], []
    for tree, share in zip(trees, (0.99, 0.5, 0.99), strict=True):
        tree.logprobs = torch.arange(64)[None] * math.log(share)
        assert policy.plan(100).min_logprob == -math.inf
        sizes.append(policy.trim(tree, LIMITS).num_nodes)
        policy.record(policy.trim(tree, LIMITS), [[*range(sizes[-1])]])
    assert sizes[0] == 64, "nothing was read yet"
    assert sizes[1] > sizes[2]


def share_drafted(machine, policy, costs, num_tokens):
    """Of the rounds of a generation, in per cent."""
    sizes, record = [], policy.record
    policy.record = lambda tree, paths: (sizes.append(len(tree.tokens)), record(tree, paths))
    machine.run(policy, num_tokens)
    policy.record = record
    return 100 * sum(size > 1 for size in sizes) / len(sizes)


def uneven(seconds, seed):
    """A machine whose speed jumps every few rounds, by up to twice."""
    generator = torch.Generator().manual_seed(seed)
    slowness = 1.0

    def now(nodes):
        nonlocal slowness
        if float(torch.rand(1, generator=generator)) < 0.04:
            slowness = (0.75, 1.0, 1.6)[int(torch.randint(3, (1,), generator=generator))]
        return slowness * seconds(nodes)

    return now


def test_speed_that_jumps_does_not_make_drafting_look_better(monkeypatch):
    shares = []
    for seed in range(6):
        seconds = uneven(MACHINES["rows cost a little"], seed)
        machine, costs = Machine(monkeypatch, seconds, 0.0, claimed=0.7, seed=seed), RoundCosts()
        machine.run(AutoPolicy(LIMITS, costs), 100)
        shares += [share_drafted(machine, AutoPolicy(LIMITS, costs), costs, 100) for _ in range(6)]
    assert sum(shares) / len(shares) < 8


def test_a_clock_that_stands_still_stops_nothing(monkeypatch):
    machine = Machine(monkeypatch, lambda nodes: 0.0, 0.6)
    monkeypatch.setattr(policy_module.time, "perf_counter", lambda: 5.0)
    costs = RoundCosts()
    for _ in range(3):
        tokens, _ = machine.run(AutoPolicy(LIMITS, costs), 100)
        assert tokens >= 100


def test_drafting_is_taken_up_again_when_it_pays(monkeypatch):
    machine, costs = Machine(monkeypatch, MACHINES["rows cost a little"], 0.0, claimed=0.7), RoundCosts()
    policy = AutoPolicy(LIMITS, costs)
    machine.run(policy, 300)
    assert 0 < share_drafted(machine, policy, costs, 300) < 12
    machine.top = 0.9
    machine.run(policy, 400)
    assert share_drafted(machine, policy, costs, 300) == 100


def test_a_few_poor_rounds_do_not_stop_a_head_that_has_paid(monkeypatch):
    machine, costs = Machine(monkeypatch, MACHINES["rows cost a little"], 0.8), RoundCosts()
    machine.run(AutoPolicy(LIMITS, costs), 400)
    policy = AutoPolicy(LIMITS, costs)
    machine.top = 0.0
    assert share_drafted(machine, policy, costs, 3) > 60
    machine.run(policy, 60)
    assert share_drafted(machine, policy, costs, 100) < 12


def test_short_answers_of_a_poor_head_stay_plain(monkeypatch):
    machine, costs = Machine(monkeypatch, MACHINES["rows cost a little"], 0.0, claimed=0.7), RoundCosts()
    machine.run(AutoPolicy(LIMITS, costs), 200)
    machine.now = 0.0
    spent = sum(machine.run(AutoPolicy(LIMITS, costs), 4)[1] for _ in range(100))
    assert spent < 1.04 * 400 * MACHINES["rows cost a little"](1)


def test_a_trial_that_was_disturbed_is_forgotten(monkeypatch):
    """Its budget is not chosen, but now and then as the neighbor of the best one, and so timed again."""
    seconds = MACHINES["rows cost much"]
    best = max((4, 8, 16), key=lambda budget: rate(monkeypatch, seconds, 0.8, budget))
    machine, costs = Machine(monkeypatch, seconds, 0.8), RoundCosts()
    machine.run(AutoPolicy(LIMITS, costs), 100)
    costs.samples[best] = (5 * seconds(best),)
    machine.run(AutoPolicy(LIMITS, costs), 3000)
    assert costs.seconds(best) < 1.5 * seconds(best)


def test_a_size_that_costs_much_more_is_seldom_taken_to_learn_its_seconds(monkeypatch):
    machine, costs = Machine(monkeypatch, lambda nodes: 1 + 0.2 * max(nodes - 32, 0), 0.8), RoundCosts()
    machine.run(AutoPolicy(LIMITS, costs), 200)
    sizes, policy = [], AutoPolicy(LIMITS, costs)
    record = policy.record
    monkeypatch.setattr(policy, "record", lambda tree, paths: (sizes.append(len(tree.tokens)), record(tree, paths)))
    machine.run(policy, 4000)
    assert 0 < sum(size > 32 for size in sizes) < 0.01 * len(sizes)


def test_one_thread_reads_what_another_one_learns():
    costs, is_over = RoundCosts(), threading.Event()

    def learn():
        while not is_over.is_set():
            for nodes in range(1, 100):
                costs.add(nodes, 1.0)

    for nodes in (1, 8) * 2:
        costs.add(nodes, 1.0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=learn)
    thread.start()
    try:
        assert {costs.seconds(5) for _ in range(1000)} == {1.0}
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_seconds_that_scatter_do_not_mislead(monkeypatch):
    """A fifth of all rounds are slowed down by something else."""
    noise = torch.Generator().manual_seed(2)
    steady = MACHINES["rows cost a little"]

    def seconds(nodes):
        return steady(nodes) * (1 + 0.5 * float(torch.rand(1, generator=noise) < 0.2))

    fixed = max(rate(monkeypatch, seconds, 0.7, budget) for budget in (1, 8, 16, 32, 64))
    assert rate(monkeypatch, seconds, 0.7, "auto") > 0.9 * fixed


def test_every_trial_is_made_first_and_once(monkeypatch):
    machine, costs = Machine(monkeypatch, MACHINES["rows cost a little"], 0.6), RoundCosts()
    sizes = []
    policy = AutoPolicy(LIMITS, costs)
    record = policy.record
    monkeypatch.setattr(policy, "record", lambda tree, paths: (sizes.append(len(tree.tokens)), record(tree, paths)))
    machine.run(policy, 200)
    assert sizes[: 2 * len(FIRST_TRIALS)] == [size for size in FIRST_TRIALS for _ in range(2)]
    assert costs.untried(128) is None
    sizes.clear()
    machine.run(AutoPolicy(LIMITS, costs), 20)  # the next generation chooses at once
    assert costs.untried(128) is None


@pytest.mark.parametrize(("max_depth", "width"), [(7, 1), (3, 1), (1, 2), (2, 3)])
def test_trees_that_cannot_be_large_do_not_wait_for_large_trials(max_depth, width, monkeypatch):
    machine, costs = Machine(monkeypatch, MACHINES["rows are nearly free"], 0.8), RoundCosts()
    policy = AutoPolicy(TreeLimits(128, max_depth, width), costs)
    machine.run(policy, 200)
    most = sum(width**depth for depth in range(max_depth + 1))
    assert costs.untried(most) is None
    assert policy.report()["verify_seconds"].keys() <= set(range(1, most + 1))
    assert policy.report()["drafted_over_plain"] > 1


@pytest.mark.parametrize(
    ("config", "most"), [(dict(branch_candidates=4), 4), (dict(draft_vocab_size=9), 9), ({}, 64)], ids=str
)
def test_a_tree_has_no_more_children_than_there_are_candidates(config, most, target, random_head):
    head = random_head(target, ngram_weights=[1.0], **config)
    head.generation_config.node_budget = "auto"
    assert choose_policy(head, target, 1).limits.width == most


def test_seconds_lie_on_the_line_between_what_was_measured():
    costs = RoundCosts()
    for nodes, seconds in ((1, 1.0), (16, 2.0), (64, 8.0)):
        for value in (99.0, seconds, seconds, seconds):  # the first one does not count
            costs.add(nodes, value)
    costs.add(16, 50.0)  # one that was disturbed does nothing
    assert [costs.seconds(nodes) for nodes in (1, 16, 64)] == [1.0, 2.0, 8.0]
    assert costs.seconds(40) == pytest.approx(5.0)
    assert costs.seconds(128) == pytest.approx(16.0)


def test_a_size_that_seems_faster_than_a_smaller_one_shares_its_seconds():
    samples = {1: (1.0,), 4: (3.0,) * 9, 8: (2.0,) * 9, 16: (5.0,) * 9}
    costs, shared = (
        RoundCosts(samples=samples),
        (2.5 + 30 / 13) / 2,
    )  # their mean, and that weighted by relative errors
    assert [costs.seconds(nodes) for nodes in (1, 4, 8, 16)] == pytest.approx([1.0, shared, shared, 5.0])
    costs = RoundCosts(samples={1: (9.0,), 4: (3.0,)})  # plain rounds are another kind
    assert [costs.seconds(nodes) for nodes in (1, 4)] == [9.0, 3.0]


@pytest.mark.parametrize("knee", [2, 8, 32, 64])
@pytest.mark.parametrize("slope", [0.0, 0.02, 0.1])
def test_sizes_on_a_roofline_keep_their_seconds(knee, slope):
    known = [(nodes, 1 + slope * max(nodes - knee, 0), nodes % 5 + 1) for nodes in (2, 4, 8, 16, 32, 64, 128)]
    assert roofline(known) == pytest.approx([seconds for _, seconds, _ in known])


def test_a_roofline_of_few_sizes():
    assert roofline([]) == []
    assert roofline([(8, 2.0, 1)]) == [2.0]
    assert roofline([(8, 2.0, 1), (16, 3.0, 5)]) == pytest.approx([2.0, 3.0])
    lower, upper = roofline([(8, 3.0, 5), (16, 2.0, 5)])  # never falls
    assert 2 < lower == upper < 3


def test_a_size_of_few_rounds_is_read_off_the_others():
    """As they are: one disturbed trial among steady sizes, and a size that differs from the others in many rounds."""
    steady = {nodes: (1 + 0.05 * nodes,) * 9 for nodes in (2, 4, 8, 24, 32, 64)}
    trial = RoundCosts(samples={1: (1.0,), 16: (3.6,), **steady})
    assert trial.seconds(16) == pytest.approx(1.8, rel=0.12)
    known_well = RoundCosts(samples={1: (1.0,), 16: (2.4,) * 9, **steady})
    assert 2.0 < known_well.seconds(16) < 2.4


def test_a_machine_that_slows_down_slows_every_size():
    costs = RoundCosts()
    for slowdown in (1.0, 1.5):
        for _ in range(20):
            costs.add(8, 2.0 * slowdown)
        if slowdown == 1.0:
            for _ in range(3):
                costs.add(16, 4.0)
    assert costs.seconds(16) == pytest.approx(6.0)


@pytest.mark.parametrize("text_rate", [0.5, 1.0, 2.0])
def test_the_last_node_repays_its_time_as_well_as_the_text_does(text_rate):
    """Not the round's own best ratio: a sure round goes on where an unsure one stops."""

    def sized(nodes):
        return 1 + 0.1 * nodes

    samples = {nodes: (sized(nodes),) for nodes in (1, 8, 16, 32, 64)}
    costs = RoundCosts(samples=samples, tokens=text_rate, drafted_seconds=1.0, num_drafted=1)
    promises = 0.9 ** torch.arange(64)
    gains = [float(promises[:nodes].sum()) for nodes in range(1, 65)]
    tree = chain_of(torch.zeros(1, 64, dtype=torch.long))
    tree.logprobs = promises.log()[None]
    budgets = [budget for budget in AUTO_BUDGETS if 2 <= budget <= 64]
    best = max(budgets, key=lambda nodes: gains[nodes - 1] - max(text_rate, 1 / 1.1) * sized(nodes))
    assert AutoPolicy(LIMITS, costs).trim(tree, LIMITS).num_nodes == best


@pytest.mark.parametrize("reads_late", [False, True])
def test_a_tree_larger_than_planned_is_cut_to_the_plan(reads_late):
    """Captured drafts have one size."""
    samples = {nodes: (1 + 0.001 * nodes,) for nodes in (1, 8, 16, 32, 64)}
    costs = RoundCosts(samples=samples, tokens=1.0, drafted_seconds=1.0, num_drafted=1)
    for policy in (FixedPolicy(LIMITS), AutoPolicy(LIMITS, costs, reads_late)):
        tree = chain_of(torch.zeros(1, 64, dtype=torch.long))
        tree.logprobs = torch.arange(64)[None] * math.log(0.99)
        for max_nodes in (20, 8):
            plan = policy.plan(100, max_nodes)
            trimmed = policy.trim(tree, plan)
            policy.record(trimmed, [[0]])
            assert 1 < trimmed.num_nodes <= max_nodes
            assert torch.equal(trimmed.parents, tree.parents[:, : trimmed.num_nodes])


@pytest.mark.parametrize(("per_node", "least"), [(0.1, 0.1), (0.02, 0.02), (0.0, 0.0)])
def test_nodes_that_cannot_repay_their_verification_are_not_drafted(per_node, least):
    """Nor those that barely do; two disturbed sizes change little of that."""
    samples = {nodes: (1 + per_node * (nodes - 1),) * 9 for nodes in (1, 4, 8, 16, 24, 32, 64)}
    costs = RoundCosts(samples=samples, tokens=4.0, drafted_seconds=4.0, num_drafted=5)
    plan = AutoPolicy(LIMITS, costs).plan(100)
    assert math.exp(plan.min_logprob) == pytest.approx(least, abs=1e-12)
    costs.samples, costs._curve = {**samples, 16: (9.0,), 32: (9.0,)}, None
    plan = AutoPolicy(LIMITS, costs).plan(100)
    assert math.exp(plan.min_logprob) == pytest.approx(least, rel=0.02, abs=0.001)
    costs.num_drafted = REFRESH_EVERY  # a round that may be larger than what repays, to learn what that takes
    assert AutoPolicy(LIMITS, costs).plan(100).min_logprob == -math.inf


def test_calibration_follows_what_was_accepted():
    costs = RoundCosts()
    for _ in range(300):
        costs.count(2.0, 1, 0.5)
    assert costs.calibration == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("node_budget", [1, 2, 5, 17, 30])
@pytest.mark.parametrize("seed", range(3))
def test_a_trimmed_tree_is_the_one_built_with_that_budget(node_budget, seed):
    logprobs = torch.log_softmax(torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)), -1)
    best = logprobs.topk(20)
    candidates = Candidates(best.indices, best.values)
    large, small = (build_tree(torch.tensor([7]), candidates, budget) for budget in (40, node_budget))
    trimmed = trim_tree(large, node_budget)
    for name in ("tokens", "parents", "depths", "logprobs"):
        assert torch.equal(getattr(trimmed, name), getattr(small, name)), name
    assert torch.equal(trimmed.ancestor_mask, small.ancestor_mask)


@pytest.mark.parametrize("kind", ["random", "echo", "noisy", "path"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_auto_gives_the_plain_text(kind, do_sample, target, head_of_kind, prompt):

    def generate(head=None):
        torch.manual_seed(5)
        return target.generate(prompt, max_new_tokens=40, do_sample=do_sample, assistant_model=head)

    plain = generate()
    head = head_of_kind(kind, target, plain)
    head.generation_config.node_budget = "auto"
    for _ in range(3):  # with trials, and without
        assert_same_text(plain, generate(head))
    stats = head.last_stats
    assert sum(stats.rounds_by_nodes.values()) == stats.num_rounds
    assert {1, 16} <= stats.policy["verify_seconds"].keys()


def test_a_fixed_budget_reports_no_choice(target, echo_head, prompt):
    plain = target.generate(prompt, max_new_tokens=20, do_sample=False)
    head = echo_head(target, plain)
    head.generation_config.node_budget = 8
    target.generate(prompt, max_new_tokens=20, do_sample=False, assistant_model=head)
    assert head.last_stats.policy == {}
    assert max(head.last_stats.rounds_by_nodes) <= 8
