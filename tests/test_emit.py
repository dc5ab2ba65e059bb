"""What leaves a call with a head: where the text ends, what the streamer gets, and the return object."""

import pytest
import torch
from helpers import dotted_tokenizer
from reference import assert_same_text
from transformers import StoppingCriteria, StoppingCriteriaList

from hf_jetflow._compat import CACHE_NAME


NUM_TOKENS = 25
KINDS = ["random", "echo", "wrong", "noisy"]


def generate(target, input_ids, head=None, **kwargs):
    kwargs = dict(max_new_tokens=NUM_TOKENS, do_sample=False) | kwargs
    return target.generate(input_ids, assistant_model=head, **kwargs)


@pytest.fixture
def plain(target, prompt):
    """The text without an early end, (1, 12 + 25)."""
    return generate(target, prompt)


def first_indices(text, start):
    """Index of the first occurrence of each token from `start` on, ascending."""
    tokens = text[0].tolist()
    return sorted(tokens.index(token, start) for token in set(tokens[start:]))


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "kind"), [*((index, "echo") for index in range(12, 22)), (12, "wrong"), (15, "wrong")]
)
def test_an_eos_token_ends_the_text_wherever_it_lies_in_the_path(index, kind, target, head_of_kind, plain, prompt):
    index = first_indices(plain, 12)[index - 12]
    eos = int(plain[0, index])
    head = head_of_kind(kind, target, plain)
    drafted = generate(target, prompt, head, eos_token_id=eos)
    assert_same_text(generate(target, prompt, eos_token_id=eos), drafted)
    assert drafted.shape[1] == index + 1, "the text does not end with the EOS token"


def test_the_first_of_several_eos_tokens_ends_the_text(target, echo_head, plain, prompt):
    indices = first_indices(plain, 12)
    eos = [int(plain[0, index]) for index in (indices[9], indices[5], indices[7])] + [999]
    drafted = generate(target, prompt, echo_head(target, plain), eos_token_id=eos)
    assert_same_text(plain[:, : indices[5] + 1], drafted)


def test_without_an_eos_token_the_text_has_its_full_length(target, echo_head, plain, prompt):
    assert target.generation_config.eos_token_id is None
    drafted = generate(target, prompt, echo_head(target, plain), eos_token_id=None)
    assert drafted.shape[1] == prompt.shape[1] + NUM_TOKENS


def test_an_eos_token_in_the_prompt_does_not_end_the_text(target, echo_head, plain, prompt):
    eos = int(prompt[0, 3])
    assert eos not in plain[0, 12:]
    assert_same_text(plain, generate(target, prompt, echo_head(target, plain), eos_token_id=eos))


@pytest.fixture(scope="module")
def tokenizer():
    return dotted_tokenizer(257)


@pytest.mark.parametrize(
    ("index", "kind"), [(12, "echo"), (14, "echo"), (19, "echo"), (20, "echo"), (23, "echo"), (14, "wrong")]
)
def test_a_stop_string_ends_the_text_as_in_plain_decoding(index, kind, tokenizer, target, head_of_kind, plain, prompt):
    stop = dict(stop_strings=[f".{int(plain[0, index])}", "never"], tokenizer=tokenizer)
    expected = generate(target, prompt, **stop)
    assert expected.shape[1] < plain.shape[1], "the stop string does not occur, so this test shows nothing"
    assert_same_text(expected, generate(target, prompt, head_of_kind(kind, target, plain), **stop))


def test_a_stop_string_across_tokens_ends_the_text_as_in_plain_decoding(tokenizer, target, echo_head, plain, prompt):
    stop = dict(stop_strings=f".{int(plain[0, 17])}.{int(plain[0, 18])}", tokenizer=tokenizer)
    expected = generate(target, prompt, **stop)
    assert expected.shape[1] == 19
    assert_same_text(expected, generate(target, prompt, echo_head(target, plain), **stop))


def test_no_time_left_ends_the_text_after_the_first_token(target, echo_head, plain, prompt):
    drafted = generate(target, prompt, echo_head(target, plain), max_time=0.0)
    assert_same_text(generate(target, prompt, max_time=0.0), drafted)
    assert drafted.shape[1] == prompt.shape[1] + 1


def test_enough_time_changes_nothing(target, echo_head, plain, prompt):
    assert_same_text(plain, generate(target, prompt, echo_head(target, plain), max_time=3600.0))


class Watch(StoppingCriteria):
    """Notes what it is shown, and stops when the text has `length` tokens."""

    def __init__(self, length):
        self.length = length
        self.seen = []
        self.scores_seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids)
        self.scores_seen.append(None if scores is None else len(scores))
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("kind", KINDS)
def test_a_custom_stopping_criterion_is_asked_after_every_token(kind, target, head_of_kind, plain, prompt):
    watches = [Watch(28), Watch(28)]
    outputs = [dict(return_dict_in_generate=True, output_scores=True), {}]
    for watch, head in zip(watches, [None, head_of_kind(kind, target, plain)], strict=True):
        text = generate(target, prompt, head, stopping_criteria=StoppingCriteriaList([watch]), **outputs[0])
        assert_same_text(plain[:, :28], text.sequences)
    expected, got = watches
    assert [ids.tolist() for ids in got.seen] == [ids.tolist() for ids in expected.seen], (
        "the criterion was not shown the growing text token by token, or a text it keeps was changed later"
    )
    assert got.scores_seen == expected.scores_seen


def test_every_criterion_is_asked_even_when_the_length_ends_the_text(target, echo_head, plain, prompt):
    watch = Watch(999)
    generate(target, prompt, echo_head(target, plain), stopping_criteria=StoppingCriteriaList([watch]))
    assert [ids.shape[1] for ids in watch.seen] == list(range(13, 13 + NUM_TOKENS))


# --- the streamer ----------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append((tuple(value.shape), value.tolist(), str(value.device)))

    def end(self):
        self.events.append("end")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", ["length", "eos"])
def test_the_streamer_gets_what_it_gets_in_plain_decoding(stop, kind, target, head_of_kind, plain, prompt):
    kwargs = dict(eos_token_id=int(plain[0, first_indices(plain, 12)[10]])) if stop == "eos" else {}
    expected, got = Recorder(), Recorder()
    generate(target, prompt, streamer=expected, **kwargs)
    generate(target, prompt, head_of_kind(kind, target, plain), streamer=got, **kwargs)
    assert got.events == expected.events
    assert got.events[0][1] == prompt.tolist()
    assert got.events.count("end") == 1
    assert got.events[-1] == "end"


# --- the return object -----------------------------------------------------------------------------------------------


EVERYTHING = dict(
    return_dict_in_generate=True,
    output_scores=True,
    output_logits=True,
    output_hidden_states=True,
    output_attentions=True,
)
OUTPUT_FAMILIES = ["llama", "gpt_neox", "mistral-sliding", "gemma3_text", "gpt_oss"]


def assert_same_values(expected, got, name):
    """Compares tensors, or nested tuples of tensors, entry by entry."""
    if isinstance(expected, torch.Tensor):
        assert expected.shape == got.shape, f"{name}: shape {got.shape}, in plain decoding {expected.shape}"
        assert expected.dtype == got.dtype
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3, msg=lambda text: f"{name}: {text}")
        return
    assert len(expected) == len(got), f"{name} has {len(got)} entries, in plain decoding {len(expected)}"
    for index, (one, other) in enumerate(zip(expected, got, strict=True)):
        assert_same_values(one, other, f"{name}[{index}]")


def assert_same_outputs(expected, got):
    """Compares two return objects with everything in them."""
    assert type(got) is type(expected)
    assert_same_text(expected.sequences, got.sequences)
    for name in ("scores", "logits", "hidden_states", "attentions"):
        assert_same_values(expected[name], got[name], name)


@pytest.mark.parametrize(("kind", "prompt_length"), [("echo", 3), ("noisy", 12), ("wrong", 12)])
@pytest.mark.parametrize("family", OUTPUT_FAMILIES)
def test_every_output_equals_the_one_of_plain_decoding(prompt_length, kind, family, tiny_target, head_of_kind):
    target = tiny_target(family, attn_implementation="eager")
    input_ids = torch.randint(3, 257, (1, prompt_length))
    expected = generate(target, input_ids, **EVERYTHING)
    head = head_of_kind(kind, target, expected.sequences)
    got = generate(target, input_ids, head, **EVERYTHING)
    assert_same_outputs(expected, got)


@pytest.mark.parametrize("kind", ["echo", "noisy"])
def test_every_output_equals_the_one_of_plain_sampling(kind, tiny_target, head_of_kind, prompt):
    target = tiny_target("gemma3_text", attn_implementation="eager")
    settings = EVERYTHING | dict(do_sample=True, top_k=20, temperature=0.8)
    torch.manual_seed(5)
    expected = generate(target, prompt, **settings)
    head = head_of_kind(kind, target, expected.sequences)
    torch.manual_seed(5)
    got = generate(target, prompt, head, **settings)
    assert_same_outputs(expected, got)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_outputs_end_with_an_eos_token_inside_the_path(family, tiny_target, echo_head, prompt):
    target = tiny_target(family, attn_implementation="eager")
    plain = generate(target, prompt)
    settings = EVERYTHING | dict(eos_token_id=int(plain[0, first_indices(plain, 12)[6]]))
    expected = generate(target, prompt, **settings)
    got = generate(target, prompt, echo_head(target, plain), **settings)
    assert_same_outputs(expected, got)
    assert got.past_key_values.get_seq_length() == got.sequences.shape[1] - 1


def test_outputs_of_a_second_chat_turn_equal_those_of_plain_decoding(tiny_target, echo_head, prompt):
    target = tiny_target("gemma3_text", attn_implementation="eager")

    def take_turns(head):
        first = generate(target, prompt, head, **EVERYTHING)
        ids = torch.cat([first.sequences, prompt[:, :5]], dim=1)
        return generate(target, ids, head, past_key_values=first.past_key_values, **EVERYTHING)

    expected = take_turns(None)
    got = take_turns(echo_head(target, expected.sequences))
    assert_same_outputs(expected, got)


def test_outputs_behind_padding_equal_those_of_plain_decoding(tiny_target, echo_head, prompt):
    target = tiny_target("mistral-sliding", attn_implementation="eager")
    input_ids = torch.cat([prompt.new_zeros(1, 4), prompt], dim=1)
    settings = EVERYTHING | dict(attention_mask=(torch.arange(16) >= 4).long()[None])
    expected = generate(target, input_ids, **settings)
    got = generate(target, input_ids, echo_head(target, expected.sequences[:, 4:]), **settings)
    assert_same_outputs(expected, got)


@pytest.mark.parametrize("name", ["scores", "logits", "hidden_states"])
def test_only_the_outputs_asked_for_are_returned(name, target, echo_head, plain, prompt):
    settings = {"return_dict_in_generate": True, f"output_{name}": True}
    expected = generate(target, prompt, **settings)
    got = generate(target, prompt, echo_head(target, plain), **settings)
    assert {key for key, value in got.items() if value is not None} == {"sequences", CACHE_NAME, name}
    assert_same_values(expected[name], got[name], name)


def test_output_flags_without_a_return_object_return_the_ids(target, echo_head, plain, prompt):
    settings = EVERYTHING | dict(return_dict_in_generate=False, output_attentions=False)
    assert_same_text(plain, generate(target, prompt, echo_head(target, plain), **settings))


def test_a_returned_text_is_not_changed_by_later_calls(target, echo_head, plain, prompt):
    head = echo_head(target, plain)
    text = generate(target, prompt, head)
    copy = text.clone()
    generate(target, prompt[:, :5], head)
    assert torch.equal(text, copy)
