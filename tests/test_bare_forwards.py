"""Bare forwards: every call of the loop is repeated with its own arguments, and nothing else changes."""

import pytest
import torch
from transformers import StoppingCriteriaList

from hf_jetflow.bare_forwards import _Repeater, time_bare_forwards, usual_node_counts
from hf_jetflow.bench_runs import Run, Variant, configure


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_generation_whose_forwards_are_repeated_gives_the_plain_text(family, tiny_target, noisy_head, prompt):
    target = tiny_target(family)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=60)
    head = noisy_head(target, plain)
    configure(head, Variant("jetflow", 8))
    calls = {target: [], head: []}
    for module, outputs in calls.items():
        original = module.forward

        def recording(*args, original=original, outputs=outputs, **kwargs):
            outputs.append(original(*args, **kwargs))
            return outputs[-1]

        module.forward = recording
    try:
        with _Repeater(target, head) as repeater:
            text = target.generate(
                prompt,
                do_sample=False,
                max_new_tokens=40,
                assistant_model=head,
                stopping_criteria=StoppingCriteriaList([repeater]),
            )
    finally:
        del target.forward, head.forward
    assert torch.equal(text, plain[:, : text.shape[1]])
    assert [nodes for nodes, *_ in repeater.rounds] == [8] * 4
    logits = [
        outputs.logits for outputs in calls[target][1:]
    ]  # behind the prefill: a repetition, then the call itself
    assert len(logits) == 2 * 4
    for repeated, own in zip(logits[::2], logits[1::2], strict=True):
        torch.testing.assert_close(repeated, own)
    rows = calls[head][1:]
    assert len(rows) == 2 * 3
    assert all(torch.equal(repeated, own) for repeated, own in zip(rows[::2], rows[1::2], strict=True))


def test_each_number_of_nodes_is_timed_and_plain_rounds_draft_nothing(tiny_target, random_head, prompt):
    target = tiny_target("llama")
    bare = time_bare_forwards(target, random_head(target), prompt[0].tolist(), [1, 4, 12])
    assert [nodes for nodes, *_ in bare] == [1, 4, 12]
    assert all(of_target > 0 for _, of_target, _, _ in bare)
    assert [(of_block > 0, of_scores > 0) for *_, of_block, of_scores in bare] == [(False, False), *[(True, True)] * 2]


def test_rare_numbers_of_nodes_are_not_timed():
    def run(counts):
        return Run("jetflow", "auto", 1.0, 0.1, [1], 1, 1, {"rounds_by_nodes": counts})

    assert usual_node_counts([run({"1": 50, "16": 49, "64": 1}), run({8: 3})]) == [1, 8, 16]
    assert usual_node_counts([Run("plain", None, 1.0, 0.1, [1], 1, 1, None)]) == []
