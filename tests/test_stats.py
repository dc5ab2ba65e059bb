"""Statistics of a generation, and their form for other tools."""

import json

import torch

from hf_jetflow import GenerationStats


def counted(*rounds):
    """Statistics after rounds of one sequence: drafted nodes, depth of the tree and accepted tokens of each."""
    stats = GenerationStats()
    for num_drafted, depth, num_accepted in rounds:
        stats.count_round(num_drafted, depth, [num_accepted])
    return stats


def test_the_form_for_other_tools_counts_rounds_by_accepted_tokens():
    assert counted((7, 3, 3), (7, 3, 0), (15, 4, 1), (7, 3, 3)).to_dict() == {
        "mean_acceptance_length": 1 + 7 / 4,
        "draft_acceptance_rate": 7 / 36,
        "acceptance_histogram": [1, 1, 0, 2, 0],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 7,
        "num_draft_tokens": 36,
        "num_spec_tokens": 4,
    }


def test_plain_steps_are_no_steps_of_speculative_decoding():
    drafted = counted((7, 3, 2))
    assert counted((7, 3, 2), (0, 0, 0), (0, 0, 0)).to_dict() == drafted.to_dict()
    nothing = counted((0, 0, 0)).to_dict()
    assert (nothing["num_spec_steps"], nothing["mean_acceptance_length"]) == (0, 1.0)
    assert nothing["acceptance_histogram"] == [0]


def test_what_readers_of_the_form_check_holds_after_a_generation(tiny_target, random_head, prompt):
    head = random_head(tiny_target("llama"))
    tiny_target("llama").generate(prompt, assistant_model=head, max_new_tokens=30, do_sample=False)
    found = json.loads(json.dumps(head.last_stats.to_dict()))
    histogram = found["acceptance_histogram"]
    assert sum(histogram) == found["num_spec_steps"] > 0
    assert sum(number * rounds for number, rounds in enumerate(histogram)) == found["num_accepted_draft_tokens"]
    assert found["num_accepted_draft_tokens"] <= found["num_draft_tokens"]
    assert len(histogram) == found["num_spec_tokens"] + 1
    assert torch.isfinite(torch.tensor([found["mean_acceptance_length"], found["draft_acceptance_rate"]])).all()
