"""Batches: every sequence gets the text of plain batched decoding, and is drafted for as if it were alone."""

import functools

import pytest
import torch
from conftest import FAMILIES, build_target
from test_exact_sampling import PROCESSORS, WARPERS, BoostNeighbors
from tokenizers import Tokenizer, decoders, models
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, SynthIDTextWatermarkingConfig, TextStreamer

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.decoding.drafter import JetFlowCandidateGenerator


VOCAB = 61  # small, so that a random head's trees hold the target's choice now and then
NUM_TOKENS = 24
PAD = 0


@functools.cache
def small_target(family: str = "llama", **overrides):
    return build_target(family, vocab_size=VOCAB, **overrides)


@functools.cache
def small_head(family: str = "llama") -> JetFlowHead:
    torch.manual_seed(3)
    config = JetFlowConfig.for_target(small_target(family).config, num_hidden_layers=2, block_size=6)
    head = JetFlowHead(config).eval()
    head.generation_config.node_budget = 24
    return head


def prompts(lengths=(12, 5, 9, 12, 3)) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return dict(input_ids=ids.masked_fill(mask == 0, PAD), attention_mask=mask)


def generate(target, head=None, inputs=None, **kwargs):
    """Greedy if not told otherwise; from one seed, and with the state that the random generator is left in."""
    torch.manual_seed(11)
    kwargs = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": PAD, **kwargs}
    output = target.generate(**(inputs or prompts()), assistant_model=head, **kwargs)
    return output, torch.rand(1).item()


def assert_same_batch(target, head, inputs=None, **kwargs) -> torch.Tensor:
    plain, plain_state = generate(target, None, inputs, **kwargs)
    drafted, state = generate(target, head, inputs, **kwargs)
    assert drafted.tolist() == plain.tolist()
    assert state == plain_state, "the random generator was left in another state than by plain decoding"
    return drafted


# --- identity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_prompts_of_mixed_lengths_gets_the_plain_text(family):
    head = small_head(family)
    assert_same_batch(small_target(family), head, max_new_tokens=40)
    assert head.last_stats.num_accepted > 10


@pytest.mark.any_release
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text", "gpt_neox"])
def test_every_sequence_is_drafted_for_as_if_it_were_alone(family, monkeypatch):
    target, head, inputs = small_target(family), small_head(family), prompts()
    # With all 5 levels n-grams would continue trees of a sequence alone, but not those of a batch.
    monkeypatch.setattr(head.generation_config, "max_depth", 4)
    drafts, propose = [], JetFlowCandidateGenerator.propose

    def recorded_propose(self, newest_ids, positions, max_depth, width, noise):
        draft = propose(self, newest_ids, positions, max_depth, width, noise)
        if max_depth == 4:  # less near the end, where a sequence alone may draft less than one in a batch
            anchors = zip(newest_ids[:, -1].tolist(), positions.tolist(), strict=True)
            drafts.extend(zip(anchors, draft.candidates.logprobs.sort().values, strict=True))
        return draft

    monkeypatch.setattr(JetFlowCandidateGenerator, "propose", recorded_propose)
    batch, _ = generate(target, head)
    in_batch = list(drafts)
    for index in range(len(inputs["input_ids"])):
        drafts.clear()
        keep = inputs["attention_mask"][index] == 1
        output, _ = generate(target, head, dict(input_ids=inputs["input_ids"][index : index + 1, keep]))
        assert output[0].tolist() == batch[index, (~keep).sum() :].tolist()
        assert len(drafts) > 5
        shared = 0
        for anchor, logprobs in drafts:
            if others := [other for known, other in in_batch if known == anchor]:
                assert any(torch.allclose(other, logprobs, atol=1e-4) for other in others)
                shared += 1
        assert shared == len(drafts)


@pytest.mark.parametrize("name", WARPERS)
def test_sampling_draws_what_plain_batched_sampling_draws(name):
    assert_same_batch(small_target(), small_head(), do_sample=True, **WARPERS[name])


ROW_WISE = [name for name in PROCESSORS if name != "guidance_scale"]
SMALLER = {
    "bad_words_ids": dict(bad_words_ids=[[token] for token in range(3, 30)] + [[40, 41], [50, 51]]),
    "sequence_bias": dict(sequence_bias=[[[token], -5.0] for token in range(3, 30)] + [[[40, 41], 5.0]]),
    "suppress_tokens": dict(suppress_tokens=list(range(0, VOCAB, 2))),
    "begin_suppress_tokens": dict(begin_suppress_tokens=list(range(0, VOCAB, 2))),
    "min_new_tokens": dict(min_new_tokens=12, eos_token_id=list(range(3, 50))),
    "prefix_allowed_tokens_fn": dict(prefix_allowed_tokens_fn=lambda index, ids: list(range(3 + index, 40 + index))),
}


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", ROW_WISE)
def test_processors_see_each_sequence_as_in_plain_decoding(name, do_sample):
    head = small_head()
    assert_same_batch(small_target(), head, do_sample=do_sample, **(SMALLER | {}).get(name, PROCESSORS[name]))
    assert head.last_stats.num_accepted > 0, head.last_stats.policy


def test_a_watermark_that_remembers_its_contexts_is_the_plain_one():
    config = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 7, 11], context_history_size=16)
    head = small_head()
    assert_same_batch(small_target(), head, do_sample=True, watermarking_config=config)
    assert head.last_stats.num_accepted > 0


def test_a_penalty_leaves_the_padding_of_each_prompt_out():
    # Plain decoding hands the number of padding tokens of every sequence to the processor.
    assert_same_batch(small_target(), small_head(), do_sample=True, repetition_penalty=1.7, temperature=0.5)


@pytest.mark.parametrize("settings", [dict(), dict(do_sample=True)], ids=["greedy", "sampling"])
def test_eager_attention_takes_batches(settings):
    assert_same_batch(small_target(attn_implementation="eager"), small_head(), **settings)
    # Sequences of one length, a root alone at last: here the target makes the mask itself, by the cache's length.
    one_length = dict(input_ids=prompts()["input_ids"][3:4].repeat(3, 1))
    assert_same_batch(small_target(attn_implementation="eager"), small_head(), one_length, **settings)


def test_the_auto_policy_takes_batches():
    head = small_head()
    head.generation_config.node_budget = "auto"
    try:
        for size in (5, 2, 3):
            assert_same_batch(small_target(), head, prompts((12, 5, 9, 12, 3)[:size]), eos_token_id=list(range(3, 9)))
    finally:
        head.generation_config.node_budget = 24


def test_prompts_without_padding_and_of_one_token():
    assert_same_batch(small_target(), small_head(), dict(input_ids=prompts()["input_ids"][3:4].repeat(3, 1)))
    assert_same_batch(small_target(), small_head(), dict(input_ids=torch.tensor([[5], [6]])), max_new_tokens=1)
    assert_same_batch(small_target(), small_head(), dict(input_ids=torch.tensor([[5], [6]])), max_new_tokens=2)


def test_prompts_given_as_embeddings_and_in_chunks():
    target, inputs = small_target(), prompts()
    embeds = target.get_input_embeddings()(inputs["input_ids"]).detach()
    given = dict(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert_same_batch(target, small_head(), given)
    assert_same_batch(target, small_head(), prefill_chunk_size=4)


def test_the_other_door_takes_batches():
    plain, _ = generate(small_target(), None)
    drafted, _ = generate(small_target(), None, custom_generate=small_head().custom_generate)
    assert drafted.tolist() == plain.tolist()


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("eos", [[4], [4, 5, 6, 7], list(range(3, 40))], ids=["rare", "some", "at once"])
def test_sequences_that_end_early_are_padded_as_in_plain_decoding(eos, do_sample):
    lengths = assert_same_batch(small_target(), small_head(), do_sample=do_sample, eos_token_id=eos, max_new_tokens=40)
    assert lengths.shape[1] <= 52


def test_sequences_that_have_ended_take_part_in_no_further_forward(monkeypatch):
    target, head = small_target(), small_head()
    texts = generate(target)[0][:, 12:].tolist()
    eos = next(  # ends some sequences long before the others
        token
        for token in range(3, VOCAB)
        if any(token in text[:9] for text in texts) and any(token not in text for text in texts)
    )
    seen, forward = [], target.forward

    @functools.wraps(forward)  # `generate` reads the signature
    def counting(*args, **kwargs):
        seen.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(target, "forward", counting)
    output, _ = generate(target, head, eos_token_id=eos)
    num_ended = sum(eos in text[:9] for text in output[:, 12:].tolist())
    assert 0 < num_ended < 5
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 5
    assert seen[-1] <= 5 - num_ended


def test_stop_strings_end_each_sequence_on_its_own():
    letters = {letter: place for place, letter in enumerate("abcdef")}
    words = {f".{token}": token for token in range(len(letters), VOCAB)}
    backend = Tokenizer(models.BPE(vocab=letters | words, merges=[]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    plain, _ = generate(small_target())
    settings = dict(stop_strings=[f".{int(plain[1, 20])}"], tokenizer=tokenizer)
    stopped = assert_same_batch(small_target(), small_head(), eos_token_id=2, **settings)
    assert stopped.tolist() != plain.tolist()
    assert small_head().last_stats.num_accepted > 0
    # Without an EOS token plain decoding goes on with a sequence that has stopped, until all have.
    assert_same_batch(small_target(), small_head(), **settings)
    assert "plain" not in small_head().last_stats.policy


@pytest.mark.parametrize("settings", [dict(), dict(eos_token_id=[4, 5, 6])], ids=["full length", "early ends"])
def test_several_return_sequences(settings):
    settings = dict(do_sample=True, num_return_sequences=3, **settings)
    assert_same_batch(small_target(), small_head(), **settings)
    one = dict(input_ids=prompts()["input_ids"][:1])
    texts = assert_same_batch(small_target(), small_head(), one, **settings)
    assert len({tuple(text) for text in texts.tolist()}) == 3


# --- what is handed out ----------------------------------------------------------------------------------------------


class Collector:
    """A streamer that takes batches."""

    def __init__(self):
        self.parts, self.is_over = [], False

    def put(self, ids):
        self.parts.append(ids.tolist())

    def end(self):
        self.is_over = True


def test_a_streamer_for_batches_gets_what_plain_decoding_puts():
    collectors = []
    for head in (None, small_head()):
        collectors.append(Collector())
        generate(small_target(), head, streamer=collectors[-1], eos_token_id=[4, 5, 6])
    assert collectors[1].parts == collectors[0].parts
    assert collectors[1].is_over


def test_a_text_streamer_refuses_batches_as_it_does_without_a_head():
    with pytest.raises(ValueError, match="only supports batch size 1"):
        generate(small_target(), small_head(), streamer=TextStreamer(None))


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
@pytest.mark.parametrize("eos", [None, [4, 5, 6, 7]], ids=["full length", "early ends"])
def test_the_returned_cache_is_the_one_of_plain_decoding(family, eos):
    settings = dict(return_dict_in_generate=True, eos_token_id=eos, max_new_tokens=40)
    plain, _ = generate(small_target(family), None, **settings)
    drafted, _ = generate(small_target(family), small_head(family), **settings)
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    for expected, got in zip(plain.past_key_values.layers, drafted.past_key_values.layers, strict=True):
        assert type(got) is type(expected)
        assert got.get_seq_length() == expected.get_seq_length()
        torch.testing.assert_close(got.keys, expected.keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got.values, expected.values, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_a_second_turn_with_the_returned_cache(family):
    target, head, inputs = small_target(family), small_head(family), prompts()
    first, _ = generate(target, head, return_dict_in_generate=True, eos_token_id=[4, 5, 6, 7], max_new_tokens=40)
    more = torch.randint(3, VOCAB, (5, 4), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([first.sequences, more], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(5, ids.shape[1] - 12, dtype=torch.long)], dim=1)
    plain, _ = generate(target, None, dict(input_ids=ids, attention_mask=mask))
    given = dict(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values)
    drafted, _ = generate(target, head, given)
    assert drafted.tolist() == plain.tolist()
    assert first.past_key_values.get_seq_length() == drafted.shape[1] - 1


# --- where the sequences must step together --------------------------------------------------------------------------


def test_a_processor_that_may_look_at_the_whole_batch_is_given_it(caplog):
    head = small_head()

    def settings():
        return dict(logits_processor=LogitsProcessorList([BoostNeighbors()]))

    plain, _ = generate(small_target(), None, **settings())
    drafted, _ = generate(small_target(), head, **settings())
    assert drafted.tolist() == plain.tolist()
    assert "BoostNeighbors may look at the whole batch" in head.last_stats.policy["plain"]


def test_a_processor_that_is_said_to_be_row_wise_is_believed():
    class Boost:
        is_row_wise = True

        def __call__(self, input_ids, scores):
            half = torch.full((len(scores), 2), 0.5, device=scores.device)
            return scores.index_add(1, input_ids[0, -2:] % VOCAB, half)

    head = small_head()
    inputs = prompts((6, 6))
    alone = [
        generate(
            small_target(), None, dict(input_ids=inputs["input_ids"][index : index + 1]), logits_processor=[Boost()]
        )[0]
        for index in range(2)
    ]
    drafted, _ = generate(small_target(), head, inputs, logits_processor=[Boost()])
    assert drafted.tolist() == torch.cat(alone).tolist()
    assert head.last_stats.num_accepted > 0


@pytest.mark.parametrize("name", ["output_scores", "output_logits", "output_hidden_states"])
def test_what_is_returned_for_every_step_is_that_of_plain_decoding(name):
    settings = dict(return_dict_in_generate=True, eos_token_id=[4, 5, 6], **{name: True})
    plain, _ = generate(small_target(), None, **settings)
    drafted, _ = generate(small_target(), small_head(), **settings)
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    assert name in small_head().last_stats.policy["plain"]
    assert plain.keys() == drafted.keys()


def test_a_static_cache_is_decoded_in_step():
    assert_same_batch(small_target(), small_head(), cache_implementation="static", disable_compile=True)
    assert "static cache" in small_head().last_stats.policy["plain"]


def test_guidance_is_decoded_in_step():
    assert_same_batch(small_target(), small_head(), **PROCESSORS["guidance_scale"])
    assert "UnbatchedClassifierFreeGuidance" in small_head().last_stats.policy["plain"]


# --- the noise -------------------------------------------------------------------------------------------------------
