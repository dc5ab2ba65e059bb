"""Calls that users make by mistake or in a hurry: training mode, empty prompts, errors and interrupts in a round."""

import copy

import pytest
import torch
from conftest import build_target, make_prompt
from reference import assert_same_text
from torch import nn
from transformers.generation.streamers import BaseStreamer

from hf_jetflow.target.dropout import dropout_reason


SEED = 7


def both_texts(target, head, ids, **kwargs):
    """Texts without and with the head, and whether the random number generator ends in the same state."""
    kwargs = {"max_new_tokens": 24, "attention_mask": torch.ones_like(ids), **kwargs}
    torch.manual_seed(SEED)
    plain = target.generate(ids, **kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    drafted = target.generate(ids, assistant_model=head, **kwargs)
    return plain, drafted, torch.equal(torch.get_rng_state(), state)


# --- training mode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [("gpt2", {}), ("llama", dict(attention_dropout=0.2))],
    ids=["modules that drop out", "a rate in the configuration"],
)
def test_a_target_that_drops_out_is_decoded_plainly(family, sizes, do_sample, random_head, prompt):
    target = copy.deepcopy(build_target(family, **sizes)).train()
    head = random_head(target)
    head.record_trees = True
    plain, drafted, is_same_state = both_texts(target, head, prompt, do_sample=do_sample)
    assert_same_text(drafted, plain)
    assert is_same_state
    assert "is in training mode, where dropout is random; call `eval()`" in head.last_stats.policy["plain"]
    assert head.last_trees is None, "trees of an earlier call are no trees of this one"
    target.eval()
    both_texts(target, head, prompt)
    assert head.last_stats.num_drafted > 0
    assert head.last_trees


def test_a_target_that_drops_out_nothing_is_drafted_for_in_training_mode(random_head, prompt):
    target = copy.deepcopy(build_target("llama")).train()
    head = random_head(target)
    plain, drafted, is_same_state = both_texts(target, head, prompt, do_sample=True)
    assert_same_text(drafted, plain)
    assert is_same_state
    assert head.last_stats.num_drafted > 0


def test_one_module_in_training_mode_is_enough():
    target = copy.deepcopy(build_target("gpt2"))
    assert dropout_reason(target) is None
    next(module for module in target.modules() if isinstance(module, nn.Dropout) and module.p).train()
    assert dropout_reason(target)


def test_a_head_in_training_mode_draws_no_random_numbers(target, random_head, prompt):
    head = random_head(target, attention_dropout=0.3).train()
    plain, drafted, is_same_state = both_texts(target, head, prompt, do_sample=True)
    assert_same_text(drafted, plain)
    assert is_same_state
    assert head.training


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("num_prompts", [1, 3])
def test_prompts_of_nothing_but_padding(num_prompts, do_sample, target, random_head):
    ids = make_prompt(4).repeat(num_prompts, 1)
    mask = torch.zeros_like(ids)
    head = random_head(target)
    plain, drafted, is_same_state = both_texts(target, head, ids, attention_mask=mask, do_sample=do_sample)
    assert_same_text(drafted, plain)
    assert is_same_state
    assert head.last_stats.num_drafted > 0


def test_a_prompt_of_one_token_that_is_also_the_padding(random_head):
    """`generate` takes it for padding, as it does without any prompt where the first token doubles as padding."""
    target = build_target("llama", pad_token_id=1)
    plain = target.generate(torch.tensor([[1]]), max_new_tokens=12, do_sample=False)
    drafted = target.generate(
        torch.tensor([[1]]), assistant_model=random_head(target), max_new_tokens=12, do_sample=False
    )
    assert_same_text(drafted, plain)


# --- errors ----------------------------------------------------------------------------------------------------------


class FailingStreamer(BaseStreamer):
    """Fails when it is given its token number `fails_at`, the prompt included."""

    def __init__(self, fails_at):
        self.tokens, self.fails_at = [], fails_at

    def put(self, value):
        self.tokens.append(value.tolist())
        if len(self.tokens) == self.fails_at:
            raise BrokenPipeError

    def end(self):
        pass


def state_after(target, ids, error, **kwargs):
    """State of the random number generator after a sampled call that fails."""
    torch.manual_seed(SEED)
    with pytest.raises(error):
        target.generate(ids, do_sample=True, max_new_tokens=24, attention_mask=torch.ones_like(ids), **kwargs)
    return torch.get_rng_state()


@pytest.mark.parametrize("fails_at", [2, 3, 9, 16, 24])
@pytest.mark.parametrize("num_prompts", [1, 2])
def test_a_streamer_that_fails_leaves_the_generator_as_plain_decoding_does(
    num_prompts, fails_at, target, random_head, prompt
):
    ids = torch.cat([make_prompt(prompt.shape[1], seed=seed) for seed in range(num_prompts)])
    plain, drafted = FailingStreamer(fails_at), FailingStreamer(fails_at)
    expected = state_after(target, ids, BrokenPipeError, streamer=plain)
    head = random_head(target)
    state = state_after(target, ids, BrokenPipeError, streamer=drafted, assistant_model=head)
    assert drafted.tokens == plain.tokens
    assert torch.equal(state, expected)
    if num_prompts == 1:
        assert head.last_stats.num_new_tokens == fails_at - 1, "the token that it failed at was emitted"


@pytest.mark.parametrize("where", ["head", "target", "observer"])
def test_an_interrupt_leaves_the_generator_behind_the_tokens_that_were_emitted(where, target, random_head, prompt):
    target, calls = copy.deepcopy(target), []
    head = random_head(target)

    def interrupt(*_args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    if where == "observer":
        head.round_observers.append(interrupt)
    else:
        (head if where == "head" else target.model.layers[2]).register_forward_hook(interrupt)
    streamer = FailingStreamer(-1)
    state = state_after(target, prompt, KeyboardInterrupt, streamer=streamer, assistant_model=head)
    calls.clear()
    calls.extend([1] * 9)  # no further interrupt
    torch.manual_seed(SEED)
    num_emitted = len(streamer.tokens) - 1
    target.generate(prompt, do_sample=True, max_new_tokens=num_emitted, min_new_tokens=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_observers_are_told_how_many_tokens_there_are(target, random_head, prompt):
    head, counts = random_head(target), []
    head.round_observers.append(lambda each: counts.append((each.stats.num_new_tokens, each.stats.num_rounds)))
    target.generate(prompt, assistant_model=head, max_new_tokens=12, do_sample=False)
    assert counts[-1] == (12, head.last_stats.num_rounds)
    assert all(tokens > rounds for tokens, rounds in counts)
    assert counts == sorted(set(counts))


def test_a_criterion_that_generates_with_the_same_head_changes_no_statistics(target, random_head, prompt):
    head = random_head(target)

    def asks(input_ids, scores, **_):
        target.generate(prompt, assistant_model=head, max_new_tokens=3, do_sample=False)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    target.generate(prompt, assistant_model=head, max_new_tokens=9, do_sample=False, stopping_criteria=[asks])
    assert head.last_stats.num_new_tokens == 9
