"""Calls that go on from a cache: the text is the plain one, and the head drafts by all that it has been shown."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import make_prompt
from reference import assert_same_text
from transformers import DynamicCache, QuantizedCache, StaticCache

from hf_jetflow import JetFlowCandidateGenerator
from hf_jetflow.decoding.reuse import CacheMarks, stored_context
from hf_jetflow.target.growing_cache import GrowingLayer


FAMILIES = [("llama", True), ("qwen3", False), ("mistral-sliding", False), ("gemma3_text", True)]


def generate(target, input_ids, head=None, **kwargs):
    torch.manual_seed(5)
    settings = dict(max_new_tokens=24, do_sample=False, assistant_model=head)
    return target.generate(input_ids, **{**settings, **kwargs})


def ask(target, input_ids, head=None, **kwargs):
    """Text and cache of one turn."""
    output = generate(target, input_ids, head, return_dict_in_generate=True, **kwargs)
    return output.sequences, output.past_key_values


def follow_up(text, seed=9, length=7):
    """The text, and what the user says next."""
    return torch.cat([text, make_prompt(length, seed=seed)], dim=1)


def known_positions(cache, head):
    """Positions of the tokens that a call which goes on from the cache need not show to the head again."""
    context = stored_context(cache, head)
    return [] if context is None else context.position_ids[0].tolist() + context.feature_position_ids[0].tolist()


@pytest.fixture
def drafts_of(monkeypatch):
    """`drafts_of(call)`: what the call returns, and position, tokens and log-probabilities of its drafts."""
    drafts = []
    propose = JetFlowCandidateGenerator.propose

    def record(self, anchor_id, position, max_depth, width, noise):
        draft = propose(self, anchor_id, position, max_depth, width, noise)
        if max_depth:
            drafts.append((position, draft.candidates.tokens, draft.candidates.logprobs))
        return draft

    monkeypatch.setattr(JetFlowCandidateGenerator, "propose", record)

    def run(call, *args, **kwargs):
        drafts.clear()
        return call(*args, **kwargs), list(drafts)

    return run


def assert_same_drafts(expected, got):
    assert [draft[0] for draft in got] == [draft[0] for draft in expected], "the rounds accepted different tokens"
    for (_, tokens, logprobs), (_, other_tokens, other_logprobs) in zip(expected, got, strict=True):
        # Near-ties may swap, and the last of them fall out.
        is_same = (tokens[..., None] == other_tokens[..., None, :]).int()
        is_common = is_same.sum(-1) == 1
        assert is_common.float().mean() > 0.98
        others = other_logprobs.gather(-1, is_same.argmax(-1))
        torch.testing.assert_close(others[is_common], logprobs[is_common], atol=1e-4, rtol=1e-4)


def differs(draft, other):
    return not torch.allclose(draft[2], other[2], atol=1e-3)


# --- the next turn of a chat -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "do_sample"), FAMILIES)
def test_the_turns_of_a_chat_are_drafted_as_if_read_anew(
    family, do_sample, tiny_target, random_head, prompt, drafts_of
):
    target = tiny_target(family)
    head = random_head(target)
    text, cache = ask(target, prompt, head, do_sample=do_sample)
    for seed in (9, 10):
        text = follow_up(text, seed)
        plain = generate(target, text, do_sample=do_sample)
        _, fresh = drafts_of(generate, target, text, head, do_sample=do_sample)
        (text, cache), drafts = drafts_of(ask, target, text, head, past_key_values=cache, do_sample=do_sample)
        assert_same_text(plain, text)
        assert_same_drafts(fresh, drafts)


def test_a_chat_in_a_static_cache_is_drafted_as_if_read_anew(tiny_target, random_head, prompt, drafts_of):
    target = tiny_target("llama")
    head = random_head(target)
    cache = StaticCache(config=target.config, max_cache_len=200)
    text, cache = ask(target, prompt, head, past_key_values=cache)
    for seed in (9, 10):
        text = follow_up(text, seed)
        plain = generate(target, text)
        _, fresh = drafts_of(generate, target, text, head)
        (text, cache), drafts = drafts_of(ask, target, text, head, past_key_values=cache)
        assert_same_text(plain, text)
        assert_same_drafts(fresh, drafts)
    cache.reset()
    other = make_prompt(20, seed=11)
    assert known_positions(cache, head) == []
    _, fresh = drafts_of(generate, target, other, head)
    text, drafts = drafts_of(generate, target, other, head, past_key_values=cache)
    assert_same_text(generate(target, other), text)
    assert_same_drafts(fresh, drafts)


def test_a_padded_chat_goes_on(tiny_target, random_head, prompt, drafts_of):
    target = tiny_target("llama")
    head = random_head(target)
    padded = torch.cat([prompt.new_zeros(1, 4), prompt], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 4).long()[None]
    text, cache = ask(target, padded, head, attention_mask=mask)
    assert known_positions(cache, head) == list(range(text.shape[1] - 5))
    text = follow_up(text)
    mask = (torch.arange(text.shape[1]) >= 4).long()[None]
    plain = generate(target, text, attention_mask=mask)
    _, fresh = drafts_of(generate, target, text, head, attention_mask=mask)
    got, drafts = drafts_of(generate, target, text, head, attention_mask=mask, past_key_values=cache)
    assert_same_text(plain, got)
    assert_same_drafts(fresh, drafts)


def test_a_turn_may_be_passed_without_the_text_before_it(tiny_target, random_head, prompt, drafts_of):
    target = tiny_target("llama")
    head = random_head(target, ngram_weights=[])  # only the head has read the text before
    text, cache = ask(target, prompt, head)
    text = follow_up(text)
    plain = generate(target, text)
    _, fresh = drafts_of(generate, target, text, head)
    new = text[:, int(cache.get_seq_length()) :]
    mask = torch.ones_like(text)
    got, drafts = drafts_of(generate, target, new, head, past_key_values=cache, attention_mask=mask)
    assert got[0].tolist() == plain[0, -got.shape[1] :].tolist()
    assert_same_drafts(fresh, drafts)


def test_the_prompt_is_not_read_again(tiny_target, random_head, prompt):
    target = tiny_target("llama")
    head = random_head(target)
    text, cache = ask(target, prompt, head)
    num_cached = int(cache.get_seq_length())
    text = follow_up(text)
    rows = {"target": [], "head": []}
    hooks = [
        target.register_forward_pre_hook(
            lambda _, args, kwargs: rows["target"].append(kwargs["input_ids"].shape[1]), with_kwargs=True
        ),
        head.register_forward_pre_hook(
            lambda _, args, kwargs: rows["head"].append(kwargs["features"].shape[1]), with_kwargs=True
        ),
    ]
    generate(target, text, head, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    assert rows["target"][0] == text.shape[1] - num_cached == 8  # the last token of the answer, and the user's
    assert rows["head"][0] <= 8 + head.config.block_size  # these, and the path of the first turn's last round


# --- caches that something else was done with ------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "do_sample"), FAMILIES)
def test_a_cache_of_plain_decoding_is_gone_on_from(family, do_sample, tiny_target, random_head, prompt, drafts_of):
    """The head sees the new tokens only, at their true positions, and drafts by them."""
    target = tiny_target(family)
    head = random_head(target)
    text, cache = ask(target, prompt, do_sample=do_sample)
    num_cached = int(cache.get_seq_length())
    text = follow_up(text)
    plain = generate(target, text, do_sample=do_sample)
    _, fresh = drafts_of(generate, target, text, head, do_sample=do_sample)
    (got, cache), drafts = drafts_of(ask, target, text, head, past_key_values=cache, do_sample=do_sample)
    assert_same_text(plain, got)
    assert differs(fresh[0], drafts[0]), "this test cannot tell whether the head knows the first turn"
    assert known_positions(cache, head) == list(range(num_cached, got.shape[1] - 1))


def test_tokens_of_plain_decoding_in_between_are_a_gap(tiny_target, random_head, prompt):
    target = tiny_target("llama")
    head = random_head(target)
    text, cache = ask(target, prompt, head)
    known = list(range(text.shape[1] - 1))
    text, cache = ask(target, follow_up(text), past_key_values=cache)
    assert known_positions(cache, head) == known
    new = range(int(cache.get_seq_length()), follow_up(text).shape[1] + 23)
    plain = generate(target, follow_up(text))
    text, cache = ask(target, follow_up(text), head, past_key_values=cache)
    assert_same_text(plain, text)
    assert known_positions(cache, head) == [*known, *new]


@pytest.mark.parametrize("num_removed", [1, 6, 24, 30, 34])
def test_a_cropped_cache_keeps_what_the_head_knows_of_the_rest(
    num_removed, tiny_target, random_head, prompt, drafts_of
):
    target = tiny_target("llama")
    head = random_head(target)
    text, cache = ask(target, prompt, head)
    cache.crop(-num_removed)
    num_cached = int(cache.get_seq_length())
    assert known_positions(cache, head) == list(range(num_cached))
    text = follow_up(text[:, :num_cached])
    plain = generate(target, text)
    _, fresh = drafts_of(generate, target, text, head)
    got, drafts = drafts_of(generate, target, text, head, past_key_values=cache)
    assert_same_text(plain, got)
    assert_same_drafts(fresh, drafts)


def test_what_was_known_of_tokens_that_were_replaced_is_forgotten(tiny_target, random_head, prompt):
    """The cache is cropped and filled up by plain decoding: as long as before, but of another text."""
    target = tiny_target("llama")
    head = random_head(target)
    text, cache = ask(target, prompt, head)
    cache.crop(-20)
    kept = int(cache.get_seq_length())
    other, cache = ask(target, follow_up(text[:, :kept]), past_key_values=cache, max_new_tokens=14)
    assert cache.get_seq_length() == text.shape[1] - 1
    assert known_positions(cache, head) == list(range(kept))
    assert_same_text(generate(target, other), generate(target, other, head, past_key_values=cache))


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_copies_of_a_cache_go_their_own_ways(num_tokens, tiny_target, random_head, prompt, drafts_of):
    """A prompt is read once and continued several times."""
    target = tiny_target("llama")
    head = random_head(target)
    text, cache = ask(target, prompt, head, max_new_tokens=num_tokens)
    num_cached = int(cache.get_seq_length())
    for seed in (9, 10, 9):
        question = follow_up(text[:, :num_cached], seed)
        _, fresh = drafts_of(generate, target, question, head)
        copied = copy.deepcopy(cache)
        got, drafts = drafts_of(generate, target, question, head, past_key_values=copied)
        assert_same_text(generate(target, question), got)
        assert_same_drafts(fresh, drafts)
        assert copied.get_seq_length() > cache.get_seq_length() == num_cached
        assert known_positions(cache, head) == list(range(num_cached))


def test_another_head_starts_from_the_new_tokens(tiny_target, random_head, prompt):
    target = tiny_target("llama")
    head, other = random_head(target), random_head(target, num_hidden_layers=1)
    text, cache = ask(target, prompt, head)
    assert known_positions(cache, head)
    assert not known_positions(cache, other)
    num_cached, text = int(cache.get_seq_length()), follow_up(text)
    plain = generate(target, text)
    got, cache = ask(target, text, other, past_key_values=cache)
    assert_same_text(plain, got)
    assert known_positions(cache, other) == list(range(num_cached, got.shape[1] - 1))
    assert not known_positions(cache, head)


def test_a_head_of_another_precision_starts_from_the_new_tokens(tiny_target, random_head, prompt):
    target = tiny_target("llama")
    head = random_head(target)
    text, cache = ask(target, prompt, head)
    head.to(torch.bfloat16)
    assert not known_positions(cache, head)
    text = follow_up(text)
    assert_same_text(generate(target, text), generate(target, text, head, past_key_values=cache))


def test_a_pickled_cache_leaves_the_head_s_part_behind(tiny_target, random_head, prompt, request):
    if request.config.getoption("--pretend-cuda"):
        pytest.skip("torch loads pickled tensors by a CUDA runtime, which is not there")
    target = tiny_target("llama")
    head = random_head(target)
    text, cache = ask(target, prompt, head)
    restored = pickle.loads(pickle.dumps(cache))
    assert not known_positions(restored, head)
    text = follow_up(text)
    assert_same_text(generate(target, text), generate(target, text, head, past_key_values=restored))


def test_a_cache_repeated_for_a_batch_is_not_taken_for_one_sequence(tiny_target, random_head, prompt):
    target = tiny_target("llama")
    head = random_head(target)
    _, cache = ask(target, prompt, head)
    cache.batch_repeat_interleave(2)
    assert stored_context(cache, head) is None


def test_head_and_cache_do_not_keep_each_other_alive(tiny_target, random_head, prompt):
    target = tiny_target("llama")
    head = random_head(target)
    _, cache = ask(target, prompt, head)
    context = weakref.ref(stored_context(cache, head).layers[0][0].untyped_storage())
    is_head_alive = weakref.ref(head)
    del head
    gc.collect()
    assert is_head_alive() is None
    del cache
    gc.collect()
    assert context() is None


@pytest.mark.any_release
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "static"])
def test_whatever_is_done_to_a_cache_the_text_is_the_plain_one(kind, seed, tiny_target, random_head, prompt):
    """Turns with one of two heads or none, in any order, from caches that were cropped or copied in between."""
    target = tiny_target("llama" if kind == "static" else kind)
    heads = [None, random_head(target), random_head(target, num_hidden_layers=1)]
    generator = torch.Generator().manual_seed(seed)

    def pick(most):
        return int(torch.randint(most, (), generator=generator))

    text, cache = prompt, DynamicCache(config=target.config)
    if kind == "static":
        cache = StaticCache(config=target.config, max_cache_len=400)
    for turn in range(8):
        if pick(2):
            cache = copy.deepcopy(cache)
        if kind == "llama" and turn and pick(2):
            cache.crop(-1 - pick(10))
            text = text[:, : int(cache.get_seq_length())]
        text = follow_up(text, seed=turn, length=1 + pick(9))
        settings = dict(max_new_tokens=1 + pick(12), do_sample=bool(pick(2)))
        settings["attention_mask"] = torch.ones_like(text)  # else a padding token in the text would be masked
        plain, head = generate(target, text, **settings), heads[pick(3)]
        text, cache = ask(target, text, head, past_key_values=cache, **settings)
        assert_same_text(plain, text)
        if head is not None and kind != "gemma3_text":
            assert known_positions(cache, head)[-1] == int(cache.get_seq_length()) - 1


class ReaderLeft(RuntimeError):
    pass


class LeavingReader:
    """A streamer that raises at its `limit`-th token."""

    def __init__(self, limit):
        self.limit, self.ids = limit, []

    def put(self, value):
        self.ids += value.flatten().tolist()
        if len(self.ids) >= self.limit:
            raise ReaderLeft

    def end(self):
        raise AssertionError("the generation was not ended")


@pytest.mark.any_release
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("kind", ["llama", "mistral-sliding", "gemma3_text", "static"])
def test_a_generation_that_broke_off_can_be_gone_on_from(kind, num_tokens, tiny_target, noisy_head, prompt):
    target = tiny_target("llama" if kind == "static" else kind)
    plain = generate(target, prompt)
    head = noisy_head(target, plain)
    cache = DynamicCache(config=target.config)
    if kind == "static":
        cache = StaticCache(config=target.config, max_cache_len=120)
    reader = LeavingReader(prompt.shape[1] + num_tokens)
    with pytest.raises(ReaderLeft):
        generate(target, prompt, head, streamer=reader, past_key_values=cache)
    text = torch.tensor([reader.ids])
    assert text.shape[1] == prompt.shape[1] + num_tokens
    assert cache.get_seq_length() < text.shape[1]
    assert num_tokens == 1 or not any(isinstance(layer, GrowingLayer) for layer in cache.layers)
    text = follow_up(text)
    assert_same_text(generate(target, text), generate(target, text, head, past_key_values=cache))


# --- marks -----------------------------------------------------------------------------------------------------------


def marks(numbers, num_cached):
    return CacheMarks(torch.tensor(numbers, dtype=torch.float32)[None, :, None].expand(1, -1, 4), num_cached)


@pytest.mark.parametrize(
    ("mine", "other", "expected"),
    [
        (([1, 2, 3], 3), ([1, 2, 3], 3), 3),
        (([1, 2, 3], 3), ([1, 2], 2), 2),
        (([1, 2], 2), ([1, 2, 3, 4], 4), 2),
        (([1, 2, 3], 3), ([1, 9, 3], 3), 1),
        (([9, 2, 3], 3), ([1, 2, 3], 3), 0),
        (([7, 8, 9], 10), ([8, 9, 1], 11), 10),  # windows of three rows
        (([7, 8, 9], 10), ([8, 5, 1], 11), 9),
        (([7, 8, 9], 10), ([6, 5, 1], 11), 0),  # what lies before the windows cannot be the same either
        (([7, 8, 9], 10), ([1, 2, 3], 20), 10),  # no row to judge by
    ],
)
def test_marks_tell_how_many_tokens_two_caches_share(mine, other, expected):
    assert marks(*mine).num_common(marks(*other)) == expected
    assert marks(*other).num_common(marks(*mine)) == expected


# --- caches that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["object", "name"])
def test_a_quantized_cache_is_refused(way, tiny_target, random_head, prompt):
    target = tiny_target("llama")
    try:
        cache = QuantizedCache("fp8", target.config)
    except ValueError:
        pytest.skip("this release of transformers has quantized caches with optimum-quanto or hqq only")
    asked = dict(past_key_values=cache)
    if way == "name":
        asked = dict(cache_implementation="quantized", cache_config={"backend": "fp8"})
    with pytest.raises(ValueError, match=r"supported with `(QuantizedCache|cache_implementation)`.*leave `cache_impl"):
        generate(target, prompt, random_head(target), **asked)
