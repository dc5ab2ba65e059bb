"""Stopping criteria of any kind are called as in plain decoding, and their answers end what they end there."""

import pytest
import torch
from test_batch import Collector, assert_same_batch, generate, prompts, small_head, small_target
from transformers import MaxTimeCriteria, StoppingCriteria


SOME_EOS = [4, 5, 6, 7]


class StopAt(StoppingCriteria):
    """The texts end at a length, as far as `answer` says so of their last tokens (batch,)."""

    def __init__(self, answer, length=20):
        self.answer, self.length = answer, length

    def __call__(self, input_ids, scores, **kwargs):
        return self.answer(input_ids[:, -1], input_ids.shape[1] >= self.length)


ANSWERS = {
    "bool": lambda last, is_long: is_long,
    "int": lambda last, is_long: int(is_long),
    "scalar tensor": lambda last, is_long: torch.tensor(is_long),
    "one of a batch": lambda last, is_long: torch.full((len(last),), is_long),
    "each its own": lambda last, is_long: last % 5 == 0,
    "each its own number": lambda last, is_long: (last % 5 == 0).long(),
    "all by one": lambda last, is_long: is_long and bool(last[0] % 3 == 0),
    "never": lambda last, is_long: False,
}


class EndOfText(StoppingCriteria):
    """Ends a batch when every sequence has written a pair of tokens: how evaluation harnesses stop at strings."""

    def __init__(self, pairs, batch):
        self.pairs, self.is_done = pairs, [False] * batch

    def __call__(self, input_ids, scores, **kwargs):
        for index, tail in enumerate(input_ids[:, -2:].sum(dim=1).tolist()):
            self.is_done[index] = self.is_done[index] or tail % self.pairs == 0
        return all(self.is_done)


class Recorder(StoppingCriteria):
    """Keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(input_ids.tolist())
        return len(self.calls) == 15


def one_prompt():
    return dict(input_ids=prompts()["input_ids"][3:4])


@pytest.mark.parametrize("eos", [None, SOME_EOS], ids=["no eos", "eos"])
@pytest.mark.parametrize("inputs", [one_prompt, prompts], ids=["one", "batch"])
@pytest.mark.parametrize("kind", ANSWERS)
def test_whatever_a_criterion_returns_ends_what_it_ends_in_plain_decoding(kind, inputs, eos):
    settings = dict(stopping_criteria=[StopAt(ANSWERS[kind])], eos_token_id=eos, max_new_tokens=40)
    head = small_head()
    text = assert_same_batch(small_target(), head, inputs(), **settings)
    assert_same_batch(small_target(), head, inputs(), do_sample=True, **settings)
    assert "plain" not in head.last_stats.policy
    assert kind == "never" or text.shape[1] < 52


@pytest.mark.parametrize("inputs", [one_prompt, prompts], ids=["one", "batch"])
def test_a_list_is_no_answer_with_a_head_either(inputs):
    criteria = [StopAt(lambda last, is_long: [is_long] * len(last))]
    for head in (None, small_head()):
        with pytest.raises(TypeError, match="unsupported operand"):
            generate(small_target(), head, inputs(), stopping_criteria=criteria)


@pytest.mark.parametrize("eos", [None, SOME_EOS], ids=["no eos", "eos"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_a_criterion_that_remembers_each_sequence_drafts_in_batches(do_sample, eos):
    plain, drafted = (
        generate(
            small_target(),
            head,
            stopping_criteria=[EndOfText(pairs, 5) for pairs in (9, 11)],
            do_sample=do_sample,
            eos_token_id=eos,
            max_new_tokens=60,
        )
        for head in (None, small_head())
    )
    assert drafted[0].tolist() == plain[0].tolist()
    assert drafted[1] == plain[1]
    assert plain[0].shape[1] < 72
    assert small_head().last_stats.num_accepted > 0


@pytest.mark.parametrize("eos", [None, SOME_EOS], ids=["no eos", "eos"])
@pytest.mark.parametrize("inputs", [one_prompt, prompts], ids=["one", "batch"])
def test_a_criterion_is_called_as_often_and_with_the_same_ids_as_in_plain_decoding(inputs, eos):
    plain, drafted = Recorder(), Recorder()
    for head, recorder in ((None, plain), (small_head(), drafted)):
        generate(small_target(), head, inputs(), stopping_criteria=[recorder], eos_token_id=eos, max_new_tokens=40)
    assert drafted.calls == plain.calls


def test_several_criteria_of_different_kinds():
    def criteria():
        return [StopAt(ANSWERS["each its own"]), EndOfText(7, 5), MaxTimeCriteria(1000), StopAt(ANSWERS["bool"], 25)]

    plain, _ = generate(small_target(), None, stopping_criteria=criteria(), eos_token_id=SOME_EOS)
    drafted, _ = generate(small_target(), small_head(), stopping_criteria=criteria(), eos_token_id=SOME_EOS)
    assert drafted.tolist() == plain.tolist()


def test_a_row_wise_criterion_ends_a_sequence_without_waiting_for_the_others():
    class SumsTo(StoppingCriteria):
        is_row_wise, sizes = True, []

        def __call__(self, input_ids, scores, **kwargs):
            self.sizes.append(len(input_ids))
            return input_ids.sum(dim=1) % 11 == 0

    for settings in (dict(eos_token_id=SOME_EOS), dict()):
        SumsTo.sizes.clear()
        assert_same_batch(small_target(), small_head(), stopping_criteria=[SumsTo()], **settings)
        assert (1 in SumsTo.sizes) == bool(settings), "without an EOS token no sequence ends before the others"


@pytest.mark.parametrize("eos", [None, SOME_EOS], ids=["no eos", "eos"])
def test_a_streamer_gets_no_token_behind_the_end(eos):
    collectors = []
    for head in (None, small_head()):
        collectors.append(Collector())
        criteria = [StopAt(ANSWERS["each its own"]), StopAt(ANSWERS["bool"], 22)]
        generate(small_target(), head, streamer=collectors[-1], stopping_criteria=criteria, eos_token_id=eos)
    assert collectors[1].parts == collectors[0].parts


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
@pytest.mark.parametrize("kind", ["bool", "each its own"])
@pytest.mark.parametrize("eos", [None, SOME_EOS], ids=["no eos", "eos"])
def test_sequences_that_were_ahead_of_the_end_leave_the_cache_of_plain_decoding(eos, kind, family):
    settings = dict(stopping_criteria=[StopAt(ANSWERS[kind], 26)], eos_token_id=eos, return_dict_in_generate=True)
    plain, _ = generate(small_target(family), None, max_new_tokens=40, **settings)
    drafted, _ = generate(small_target(family), small_head(family), max_new_tokens=40, **settings)
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    for expected, got in zip(plain.past_key_values.layers, drafted.past_key_values.layers, strict=True):
        assert got.get_seq_length() == expected.get_seq_length()
        torch.testing.assert_close(got.keys, expected.keys, atol=1e-3, rtol=1e-3)


def test_an_end_that_a_criterion_gives_to_a_sequence_that_has_ended_counts():
    # The first sequence ends itself far behind the step at which the criterion ends all.
    text, _ = generate(small_target(), None, max_new_tokens=40)
    for end in range(14, 30):
        settings = dict(stopping_criteria=[StopAt(ANSWERS["bool"], end)], eos_token_id=text[0, 30:34].tolist())
        assert_same_batch(small_target(), small_head(), max_new_tokens=40, **settings)


def test_int32_prompts_return_what_plain_decoding_returns():
    for inputs in (one_prompt(), prompts()):
        inputs["input_ids"] = inputs["input_ids"].int()
        for settings in (dict(), dict(do_sample=True), dict(eos_token_id=SOME_EOS)):
            plain, _ = generate(small_target(), None, inputs, **settings)
            drafted, _ = generate(small_target(), small_head(), inputs, **settings)
            assert drafted.dtype == plain.dtype == torch.int64
            assert drafted.tolist() == plain.tolist()
