"""Rounds and their forwards are timed, and timing changes no text."""

import pytest
import torch
from helpers import alter

from hf_jetflow.bench.forward_times import _RoundTimer, forward_seconds, time_forwards, usual_node_counts
from hf_jetflow.bench.runs import Run


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_timed_generation_gives_the_plain_text(family, tiny_target, noisy_head, prompt):
    target = tiny_target(family)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=60)
    head = noisy_head(target, plain)
    head.generation_config.node_budget = 8
    with _RoundTimer(target, head, times_scores=True) as timer:
        text = target.generate(prompt, do_sample=False, max_new_tokens=60, assistant_model=head)
    assert torch.equal(text, plain)
    stats = head.last_stats
    num_rounds = stats.rounds_by_nodes[8]
    assert [nodes for nodes, _ in timer.rounds].count(8) in (num_rounds - 1, num_rounds), (
        "a round ends with the next one"
    )
    for _, (target_seconds, block_seconds, score_seconds, round_seconds) in timer.rounds:
        assert min(target_seconds, block_seconds, score_seconds) > 0
        assert target_seconds + block_seconds + score_seconds < round_seconds
    hooks = (target._forward_hooks, target._forward_pre_hooks, head._forward_hooks, head._forward_pre_hooks)
    assert not any(hooks)


def test_each_number_of_nodes_is_timed_and_plain_rounds_draft_nothing(target, random_head, prompt):
    table = time_forwards(target, random_head(target), prompt[0].tolist(), [1, 4, 12])
    assert [nodes for nodes, *_ in table if nodes in (1, 4, 12)] == [1, 4, 12]
    for nodes, target_seconds, block_seconds, score_seconds, round_seconds in table:
        assert target_seconds > 0
        assert (block_seconds > 0) == (score_seconds > 0) == (nodes > 1)
        assert target_seconds + block_seconds + score_seconds < round_seconds


def test_the_branch_correction_counts_as_scoring(target, random_head, prompt):
    head = random_head(target, branch_correction="path")
    alter(head)
    counted = []
    with _RoundTimer(target, head, times_scores=True) as timer:
        for layer in head.branch_correction.children():
            layer.register_forward_hook(lambda layer, *_: counted.append((layer, timer._seconds[2])))
        target.generate(prompt, do_sample=False, max_new_tokens=20, assistant_model=head)
    layers = [layer for layer, _ in counted]
    assert set(layers) == set(head.branch_correction.children())
    assert all(seconds > 0 for _, seconds in counted)


def test_forward_times_of_a_row_are_weighted_by_rounds_and_interpolated_by_nodes():
    def run(counts):
        return Run("jetflow", "auto", 1.0, 0.1, [1], 1, 1, {"rounds_by_nodes": counts})

    tables = [
        [[1, 2.0, 0.0, 0.0, 3.0], [8, 4.0, 1.0, 0.5, 8.0], [16, 6.0, 1.0, 1.5, 10.0]],
        [[12, 7.0, 3.0, 1.0, 13.0]],
        [],
    ]
    # The first table is interpolated between 8 and 16 nodes. The second has no plain rounds.
    parts = forward_seconds([run({"1": 1, "12": 3}), run({"1": 2, "20": 4}), run({"8": 5})], tables)
    assert parts == {
        "target": (2 + 3 * 5 + 4 * 7) / 8,
        "block": (3 * 1 + 4 * 3) / 8,
        "scores": (3 * 1 + 4 * 1) / 8,
        "round": (3 + 3 * 9 + 4 * 13) / 8,
    }
    assert forward_seconds([run({"8": 5})], [[]]) is None
    assert forward_seconds([Run("plain", None, 1.0, 0.1, [1], 1, 1, None)], tables[:1]) is None


def test_rare_numbers_of_nodes_are_not_timed():
    def run(counts):
        return Run("jetflow", "auto", 1.0, 0.1, [1], 1, 1, {"rounds_by_nodes": counts})

    assert usual_node_counts([run({"1": 50, "16": 49, "64": 1}), run({8: 3})]) == [1, 8, 16]
    assert usual_node_counts([Run("plain", None, 1.0, 0.1, [1], 1, 1, None)]) == []
