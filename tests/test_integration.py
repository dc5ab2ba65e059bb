"""The door: both ways into the loop, what passes by it untouched, what is refused and how, and the statistics."""

import copy
import inspect
import threading
from pathlib import Path

import pytest
import support_matrix
import torch
from conftest import build_target
from reference import assert_same_text
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, GenerationMixin, T5Config
from transformers import T5ForConditionalGeneration as T5

import hf_jetflow
from hf_jetflow import GenerationStats, JetFlowCandidateGenerator, JetFlowConfig, JetFlowHead
from hf_jetflow.errors import JetFlowError
from hf_jetflow.target.prefilled import TargetStates
from hf_jetflow.target.target import Target


NUM_TOKENS = 33
WRAPPED = ("_assisted_decoding", "_validate_generation_mode")


def generate(target, input_ids, **kwargs):
    return target.generate(input_ids, **(dict(max_new_tokens=NUM_TOKENS, do_sample=False) | kwargs))


@pytest.fixture
def plain(target, prompt):
    return generate(target, prompt)


@pytest.fixture
def disabled():
    """Our dispatch is out while the test runs."""
    hf_jetflow.disable()
    yield
    hf_jetflow.enable()


# --- the two ways in -------------------------------------------------------------------------------------------------


def test_the_head_is_passed_as_assistant_model(target, echo_head, plain, prompt):
    head = echo_head(target, plain)
    assert_same_text(plain, target.generate(prompt, assistant_model=head, max_new_tokens=NUM_TOKENS))
    assert head.last_stats.num_rounds == 4, "the call did not reach our loop"


def test_a_generation_config_object_is_followed(target, echo_head, plain, prompt):
    head = echo_head(target, plain)
    config = GenerationConfig(max_new_tokens=7, do_sample=False)
    assert_same_text(plain[:, :19], target.generate(prompt, config, assistant_model=head))


def test_a_call_without_any_input_starts_from_the_bos_token(target, head):
    assert_same_text(generate(target, None), generate(target, None, assistant_model=head))


@pytest.mark.parametrize("do_sample", [False, True])
def test_custom_generate_gives_the_same_text_as_assistant_model(do_sample, target, head, prompt):
    texts = []
    for way in (dict(), dict(assistant_model=head), dict(custom_generate=head.custom_generate)):
        torch.manual_seed(5)
        texts.append(generate(target, prompt, do_sample=do_sample, **way))
    assert_same_text(texts[0], texts[1])
    assert_same_text(texts[0], texts[2])


def test_custom_generate_works_without_the_dispatch(disabled, target, echo_head, plain, prompt):
    head = echo_head(target, plain)
    assert_same_text(plain, generate(target, prompt, custom_generate=head.custom_generate))
    assert head.last_stats.num_rounds == 4


def test_custom_generate_returns_the_same_object_as_assistant_model(target, head, prompt):
    settings = dict(return_dict_in_generate=True, output_scores=True, repetition_penalty=1.2)
    one = generate(target, prompt, assistant_model=head, **settings)
    other = generate(target, prompt, custom_generate=head.custom_generate, **settings)
    assert type(one) is type(other)
    assert_same_text(one.sequences, other.sequences)
    assert all(torch.equal(a, b) for a, b in zip(one.scores, other.scores, strict=True))


class Recorder:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append((tuple(value.shape), value.tolist()))

    def end(self):
        self.events.append("end")


def test_custom_generate_streams_to_its_token_streamer(target, head, prompt):
    expected, got = Recorder(), Recorder()
    generate(target, prompt, streamer=expected)
    generate(target, prompt, custom_generate=head.custom_generate, token_streamer=got)
    assert got.events == expected.events


def test_the_head_works_inside_inference_mode(target, echo_head, plain, prompt):
    with torch.inference_mode():
        assert_same_text(plain, generate(target, prompt, assistant_model=echo_head(target, plain)))


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_a_cache_made_in_inference_mode_can_be_continued_outside(family, tiny_target, random_head, prompt):
    target = tiny_target(family)
    head = random_head(target)
    with torch.inference_mode():
        first = generate(target, prompt, assistant_model=head, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, prompt], dim=1)
    expected = generate(target, ids)
    assert_same_text(expected, generate(target, ids, assistant_model=head, past_key_values=first.past_key_values))


def test_targets_and_heads_keep_no_gradients_or_hooks(target, head, prompt):
    before = len(target._forward_hooks)
    generate(target, prompt, assistant_model=head)
    assert len(target._forward_hooks) == before
    assert all(parameter.grad is None for parameter in [*target.parameters(), *head.parameters()])


def run_in_threads(*calls):
    """Runs the calls at the same time and returns their results in order."""
    results = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index, call):
        barrier.wait()
        results[index] = call()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("second_family", ["llama", "qwen3"])
def test_two_threads_with_heads_of_their_own_do_not_meet(second_family, tiny_target, target, echo_head, prompt):
    other = tiny_target(second_family)
    long = torch.randint(3, 257, (1, 60))
    plain = [generate(target, long), generate(other, prompt)]
    heads = [echo_head(target, plain[0]), echo_head(other, plain[1])]
    drafted = run_in_threads(
        lambda: [generate(target, long, assistant_model=heads[0]) for _ in range(5)],
        lambda: [generate(other, prompt, assistant_model=heads[1]) for _ in range(5)],
    )
    for expected, texts, head in zip(plain, drafted, heads, strict=True):
        assert texts is not None, "a thread died"
        for text in texts:
            assert_same_text(expected, text)
        assert head.last_stats.tokens_per_round == head.config.block_size


def test_another_thread_can_use_the_target_while_it_reads_the_prompt(target, head, plain, prompt, monkeypatch):
    target, other_texts = copy.deepcopy(target), []
    features, _ = shown_states(head, monkeypatch)

    def interrupt(*_):
        handle.remove()
        run_in_threads(lambda: other_texts.append(generate(target, prompt)))

    handle = target.register_forward_pre_hook(interrupt)
    long = torch.randint(3, 257, (1, 30))
    text = generate(target, long, assistant_model=head)
    assert other_texts, "the other thread's plain decoding died: it met our capture of the prompt's states"
    assert_same_text(plain, other_texts[0])
    assert_same_text(generate(target, long), text)
    assert features[0].shape[1] == 30, "the head was shown states of the other thread's text"


# --- what passes by untouched ----------------------------------------------------------------------------------------


def test_enable_and_disable_can_be_repeated_and_undo_each_other():
    installed = [getattr(GenerationMixin, name) for name in WRAPPED]
    hf_jetflow.enable()
    assert [getattr(GenerationMixin, name) for name in WRAPPED] == installed, "a second `enable` wraps again"
    hf_jetflow.disable()
    originals = [getattr(GenerationMixin, name) for name in WRAPPED]
    hf_jetflow.disable()
    try:
        assert [getattr(GenerationMixin, name) for name in WRAPPED] == originals
        assert all(function.__module__ == "transformers.generation.utils" for function in originals)
        assert not any(hasattr(function, "__wrapped__") for function in originals), "our wrap is still there"
    finally:
        hf_jetflow.enable()
    for name, original in zip(WRAPPED, originals, strict=True):
        wrap = getattr(GenerationMixin, name)
        assert wrap is not original
        assert inspect.signature(wrap) == inspect.signature(original), "`generate` reads the signature"


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("way", ["assistant model", "prompt lookup", "early exit"])
def test_ordinary_assisted_generation_is_the_same_with_and_without_our_dispatch(
    way, do_sample, tiny_target, target, prompt, monkeypatch
):
    assistant = copy.deepcopy(tiny_target("llama", num_hidden_layers=2))
    num_calls = []
    monkeypatch.setattr(assistant, "forward", lambda *args, **kwargs: num_calls.append(1) or forward(*args, **kwargs))
    forward = type(assistant).forward.__get__(assistant)
    settings = {
        "assistant model": dict(assistant_model=assistant),
        "prompt lookup": dict(prompt_lookup_num_tokens=3),
        "early exit": dict(assistant_early_exit=2),
    }[way]

    def run():
        num_calls.clear()
        torch.manual_seed(5)
        return generate(target, prompt.repeat(1, 2), do_sample=do_sample, **settings), len(num_calls)

    text, calls = run()
    hf_jetflow.disable()
    try:
        expected, expected_calls = run()
    finally:
        hf_jetflow.enable()
    assert_same_text(expected, text)
    assert calls == expected_calls
    assert (calls > 0) == (way == "assistant model")


# --- refusals --------------------------------------------------------------------------------------------------------


BOTH_WAYS = pytest.mark.parametrize("way", ["assistant_model", "custom_generate"])


def refuse(target, head, way, message, input_ids, **kwargs):
    door = dict(assistant_model=head) if way == "assistant_model" else dict(custom_generate=head.custom_generate)
    with pytest.raises(ValueError, match=message):
        generate(target, input_ids, **door, **kwargs)


@pytest.mark.parametrize(
    ("assistant", "message"),
    [
        ("org/head", r"is 'org/head', but must be a loaded .*JetFlowHead.from_pretrained\('org/head', dtype=target"),
        (Path("folder"), r"is 'folder', but must be a loaded .*JetFlowHead.from_pretrained\('folder', dtype=target"),
        (JetFlowConfig(), r"is `JetFlowConfig`, but .*JetFlowHead.from_pretrained\(SOURCE, "),
        (JetFlowHead, r"is `JetFlowHead`, but .*JetFlowHead.from_pretrained\(SOURCE, "),
        ({"weight": torch.ones(1)}, r"is `dict`, but .*JetFlowHead.from_pretrained\(SOURCE, "),
    ],
    ids=["name", "path", "config", "class", "weights"],
)
def test_what_is_no_model_is_refused(assistant, message, target, prompt):
    with pytest.raises(JetFlowError, match=message):
        generate(target, prompt, assistant_model=assistant)


@BOTH_WAYS
@pytest.mark.parametrize("do_sample", [False, True])
def test_beams_are_refused(do_sample, way, target, head, prompt):
    message = "draft heads work with greedy search and sampling only; set `num_beams=1`"
    refuse(target, head, way, message, prompt, num_beams=2, do_sample=do_sample)


@BOTH_WAYS
def test_a_call_without_cache_is_refused(way, target, head, prompt):
    refuse(target, head, way, "leave `use_cache` at True", prompt, use_cache=False)


@BOTH_WAYS
def test_attentions_out_of_a_static_cache_are_refused(way, target, head, prompt):
    target = copy.deepcopy(target)
    target.set_attn_implementation("eager")
    asked = dict(output_attentions=True, return_dict_in_generate=True)
    refuse(target, head, way, "`output_attentions` is not supported", prompt, cache_implementation="static", **asked)


@BOTH_WAYS
def test_an_offloaded_cache_is_refused(way, target, head, prompt):
    named = r"not supported with `cache_implementation` 'offloaded' yet"
    refuse(target, head, way, named, prompt, cache_implementation="offloaded")
    given = dict(past_key_values=DynamicCache(config=target.config, offloading=True))
    refuse(target, head, way, "not supported with an offloaded cache yet", prompt, **given)


def test_decoding_in_step_with_other_processes_is_refused(target, head, prompt):
    refuse(target, head, "assistant_model", "`synced_gpus`", prompt, synced_gpus=True)


@BOTH_WAYS
@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_without_tree_masks_is_refused(attention, way, target, head, prompt):
    target = copy.deepcopy(target)
    target.config._attn_implementation_internal = attention
    refuse(target, head, way, f"'{attention}' takes no tree masks; load the target with `attn_implementation", prompt)


@BOTH_WAYS
def test_an_encoder_decoder_target_is_refused(way, head, prompt):
    config = T5Config(vocab_size=257, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    refuse(T5(config).eval(), head, way, "`t5` is an encoder-decoder model; draft heads need a decoder-only", prompt)


def test_a_config_for_an_encoder_decoder_target_is_refused():
    with pytest.raises(ValueError, match="`t5` is an encoder-decoder model"):
        JetFlowConfig.for_target(T5Config())


@BOTH_WAYS
@pytest.mark.parametrize("name", ["jamba", "recurrent_gemma", "minimax", "deepseek_v32"])
def test_a_target_that_cannot_verify_a_draft_is_refused(name, way, random_head, prompt):
    message = {
        "jamba": "mamba layers of `jamba` read several rows at once from an empty state only",
        "recurrent_gemma": "recurrent state outside of its cache",
        "minimax": "makes one of its own",
        "deepseek_v32": "attention' layers, which draft heads do not know",
    }
    target = support_matrix.build(name)
    refuse(target, random_head(target), way, f"{message[name]}.*without `assistant_model`", prompt % 67)


@BOTH_WAYS
def test_a_target_without_attention_is_refused(way, head, prompt):
    config = AutoConfig.for_model("mamba", vocab_size=257, hidden_size=64, state_size=8, num_hidden_layers=5)
    message = "`mamba` has recurrent layers only"
    refuse(AutoModelForCausalLM.from_config(config).eval(), head, way, message, prompt)


def test_a_target_with_bidirectional_attention_is_refused_until_it_is_a_decoder(prompt):
    sizes = dict(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = AutoConfig.for_model("roformer", **sizes, is_decoder=True, eos_token_id=None)
    target = AutoModelForCausalLM.from_config(config).eval()
    head = JetFlowHead(JetFlowConfig.for_target(config, num_hidden_layers=1, block_size=4, mask_token_id=0)).eval()
    assert_same_text(generate(target, prompt), generate(target, prompt, assistant_model=head))
    target.config.is_decoder = False
    refuse(target, head, "assistant_model", "the attention of this `roformer` is bidirectional", prompt)


def test_a_config_for_a_target_without_attention_is_refused():
    with pytest.raises(ValueError, match="`mamba` has no attention heads"):
        JetFlowConfig.for_target(AutoConfig.for_model("mamba"))


@BOTH_WAYS
@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (dict(hidden_size=32), "hidden size 64, but this target has 32; this head was made for llama, load that one"),
        (dict(vocab_size=300), "vocabulary size 257, but this target has 300"),
        (dict(num_hidden_layers=4), "number of layers 5, but this target has 4"),
    ],
)
def test_a_head_made_for_another_target_is_refused(difference, message, way, tiny_target, head, prompt):
    refuse(tiny_target("llama", **difference), head, way, message, prompt)


@pytest.mark.parametrize(
    ("head_config", "new_size", "advice"),
    [
        ({}, 200, "vocab_size = 200"),
        ({}, 300, "vocab_size = 300"),
        (dict(mask_token_id=220), 200, "resize_token_embeddings"),  # the row of MASK is gone
        (dict(draft_vocab_size=40), 300, "vocab_size = 300"),
        (dict(draft_vocab_size=40), 200, "resize_token_embeddings"),  # and that of a drafted token, 250
        (dict(own_lm_head=True), 300, "resize_token_embeddings"),  # the head scores tokens by rows of its own
        (dict(own_lm_head=True, draft_vocab_size=40), 300, "vocab_size = 300"),
        (dict(own_embedding=True, own_lm_head=True), 300, "resize_token_embeddings"),
    ],
)
def test_advice_for_resized_embeddings_works(head_config, new_size, advice, random_head, prompt):
    target = copy.deepcopy(build_target("llama"))
    head, num_tokens = random_head(target, **head_config), target.config.vocab_size
    if head.draft_token_ids is not None:
        head.draft_token_ids.copy_(torch.arange(211, 251))
    target.resize_token_embeddings(new_size)
    refuse(target, head, "assistant_model", advice, prompt.clamp_max(150))
    if "vocab_size" in advice:
        head.config.vocab_size = new_size
    else:
        target.resize_token_embeddings(num_tokens)
    assert_drafted_text(target, head, prompt.clamp_max(150))


def assert_drafted_text(target, head, prompt):
    plain = generate(target, prompt)
    assert_same_text(generate(target, prompt, assistant_model=head), plain)
    assert head.last_stats.num_drafted > 0


def test_the_name_of_the_right_target_is_given_where_it_is_known(tiny_target, target, random_head, prompt):
    head = random_head(target, target_name="org/model")
    message = "this head was made for org/model, load that one"
    refuse(tiny_target("llama", num_hidden_layers=4), head, "assistant_model", message, prompt)


def test_a_head_whose_rows_do_not_fit_the_embeddings_is_refused(target, random_head, prompt):
    head = random_head(target, hidden_size=32, target_hidden_size=64)
    message = "embedding width 32, but this target has 64"
    refuse(target, head, "assistant_model", message, prompt)


@BOTH_WAYS
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("node_budget", 0, "`node_budget` is 0, but must be 'auto' or an integer of at least 1"),
        ("node_budget", -3, "`node_budget` is -3, but must be 'auto' or an integer of at least 1"),
        ("node_budget", True, "`node_budget` is True, but must be 'auto' or an integer of at least 1"),
        ("node_budget", 1.5, "`node_budget` is 1.5, but must be 'auto' or an integer of at least 1"),
        ("node_budget", None, "`node_budget` is None, but must be 'auto' or an integer of at least 1"),
        ("node_budget", "many", "`node_budget` is 'many', but must be 'auto' or an integer of at least 1"),
        ("max_depth", 0, r"`max_depth` is 0, but this head drafts 1 \.\. 7 levels"),
        ("max_depth", 8, r"`max_depth` is 8, but this head drafts 1 \.\. 7 levels"),
        ("max_depth", True, r"`max_depth` is True, but this head drafts 1 \.\. 7 levels"),
        ("max_depth", 2.0, r"`max_depth` is 2.0, but this head drafts 1 \.\. 7 levels"),
        ("width", 0, "`width` is 0, but must be an integer of at least 1"),
        ("width", 1.5, "`width` is 1.5, but must be an integer of at least 1"),
    ],
)
def test_a_limit_out_of_range_is_refused(setting, value, message, way, target, head, prompt):
    setattr(head.generation_config, setting, value)
    refuse(target, head, way, message, prompt)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_of_the_echo_head(target, echo_head, plain, prompt):
    head = echo_head(target, plain)
    head.generation_config.width = 1
    generate(target, prompt, assistant_model=head)
    stats = head.last_stats
    assert isinstance(stats, GenerationStats)
    assert (stats.num_rounds, stats.num_new_tokens) == (4, NUM_TOKENS)
    assert (stats.num_drafted, stats.num_accepted) == (28, 28)
    assert stats.tokens_per_round == 8.0
    assert stats.acceptance_by_depth == [1.0] * 7


def test_statistics_of_the_wrong_head(target, wrong_head, plain, prompt):
    head = wrong_head(target, plain)
    head.generation_config.node_budget = 20
    generate(target, prompt, assistant_model=head)
    stats = head.last_stats
    assert (stats.num_rounds, stats.num_new_tokens, stats.num_accepted) == (NUM_TOKENS - 1, NUM_TOKENS, 0)
    assert stats.tokens_per_round == 1.0
    assert set(stats.acceptance_by_depth) == {0.0}
    assert len(stats.acceptance_by_depth) >= 7, "n-grams may have gone on where the block ends"
    assert stats.num_drafted == 19 * (stats.num_rounds - 1), "every round but the last one has room for a draft"


def test_statistics_of_one_node_are_those_of_plain_decoding(target, head, prompt):
    head.generation_config.node_budget = 1
    generate(target, prompt, assistant_model=head)
    stats = head.last_stats
    assert (stats.num_rounds, stats.num_drafted, stats.num_accepted) == (NUM_TOKENS - 1, 0, 0)
    assert (stats.tokens_per_round, stats.acceptance_by_depth) == (1.0, [])


def test_statistics_count_the_tokens_emitted_when_an_eos_token_cuts_the_path(target, echo_head, plain, prompt):
    tokens = plain[0, 12:].tolist()
    index = next(i for i in range(10, 15) if tokens.index(tokens[i]) == i)
    head = echo_head(target, plain)
    text = generate(target, prompt, assistant_model=head, eos_token_id=tokens[index])
    stats = head.last_stats
    assert text.shape[1] - 12 == index + 1
    assert stats.num_new_tokens == index + 1, "tokens behind the EOS token are counted"
    assert stats.num_accepted + stats.num_rounds + 1 == index + 1


def test_statistics_of_the_noisy_head_add_up(target, noisy_head, plain, prompt):
    head = noisy_head(target, plain)
    generate(target, prompt, assistant_model=head)
    stats = head.last_stats
    assert stats.num_new_tokens == NUM_TOKENS == 1 + stats.num_rounds + stats.num_accepted
    assert sum(stats.accepted_by_depth) == stats.num_accepted
    assert stats.accepted_by_depth == sorted(stats.accepted_by_depth, reverse=True)
    assert all(0 <= share <= 1 for share in stats.acceptance_by_depth)


def test_statistics_start_anew_with_every_call(target, echo_head, plain, prompt):
    head = echo_head(target, plain)
    assert head.last_stats is None
    generate(target, prompt, assistant_model=head)
    first = head.last_stats
    generate(target, prompt, assistant_model=head, max_new_tokens=1)
    assert (first.num_rounds, head.last_stats.num_rounds, head.last_stats.num_new_tokens) == (4, 0, 1)
    assert head.last_stats.tokens_per_round == 1.0


def test_statistics_hold_the_seconds_of_every_step(target, head, prompt):
    generate(target, prompt, assistant_model=head)
    seconds = head.last_stats.seconds_by_step
    assert list(seconds) == ["prefill", "draft", "tree", "verify", "walk", "commit"]
    assert all(value > 0 for value in seconds.values())


# --- what the head is shown ------------------------------------------------------------------------------------------


def shown_states(head, monkeypatch):
    """Lists, while the test runs, of the features and of their positions that reach the head."""
    features, position_ids = [], []
    forward = head.forward

    def record(**kwargs):
        features.append(kwargs["features"])
        position_ids.append(kwargs["context_position_ids"])
        return forward(**kwargs)

    monkeypatch.setattr(head, "forward", record)
    return features, position_ids


@pytest.mark.parametrize("indices", [[1, 3], [0, 5], [5]])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gpt_neox", "gpt_oss"])
def test_the_head_is_shown_the_tapped_states_of_every_committed_token(
    indices, family, tiny_target, noisy_head, prompt, monkeypatch
):
    target = tiny_target(family)
    plain = generate(target, prompt)
    head = noisy_head(target, plain, hidden_state_indices=indices)
    features, position_ids = shown_states(head, monkeypatch)
    generate(target, prompt, assistant_model=head)
    got = torch.cat(features, dim=1)
    assert torch.cat(position_ids, dim=1).tolist() == [list(range(got.shape[1]))]
    assert got.shape[1] > 30
    with torch.no_grad():
        states = target(plain, output_hidden_states=True, use_cache=False).hidden_states
    expected = torch.cat([states[index] for index in indices], dim=-1)[:, : got.shape[1]]
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("indices", [[1, 3], [0, 5], [5]])
def test_training_and_decoding_show_the_head_the_same_states(indices, target, plain, random_head):
    head = random_head(target, hidden_state_indices=indices)
    features, last_states = Target(target, head.config).states(plain)
    with torch.no_grad():
        states = target(plain, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(features, torch.cat([states[index] for index in indices], dim=-1))
    torch.testing.assert_close(last_states, states[-1])


def test_padding_is_not_shown_to_the_head(target, head, prompt, monkeypatch):
    features, position_ids = shown_states(head, monkeypatch)
    input_ids = torch.cat([prompt.new_zeros(1, 4), prompt], dim=1)
    mask = (torch.arange(16) >= 4).long()[None]
    generate(target, input_ids, attention_mask=mask, assistant_model=head, max_new_tokens=3)
    assert position_ids[0].tolist() == [list(range(12))]
    with torch.no_grad():
        states = target(prompt, output_hidden_states=True, use_cache=False).hidden_states
    expected = torch.cat([states[index] for index in head.config.hidden_state_indices], dim=-1)
    torch.testing.assert_close(features[0], expected, atol=1e-3, rtol=1e-3)


def test_a_prompt_read_in_chunks_is_shown_whole_to_the_head(target, head, prompt, monkeypatch):
    features, position_ids = shown_states(head, monkeypatch)
    generate(target, prompt, assistant_model=head, prefill_chunk_size=5, max_new_tokens=3)
    with torch.no_grad():
        states = target(prompt, output_hidden_states=True, use_cache=False).hidden_states
    expected = torch.cat([states[index] for index in head.config.hidden_state_indices], dim=-1)
    assert position_ids[0].tolist() == [list(range(12))]
    torch.testing.assert_close(features[0], expected, atol=1e-3, rtol=1e-3)


# --- the candidate generator -----------------------------------------------------------------------------------------


def observe_all(generator, target, input_ids):
    """Shows the generator the states of every token but the newest one."""
    features, _ = Target(target, generator.head.config).states(input_ids[:, :-1])
    position_ids = torch.arange(input_ids.shape[1] - 1)[None]
    generator.observe(TargetStates(torch.empty(1, 0, 257), (features,), position_ids))


def test_the_candidate_generator_returns_the_chain_behind_the_text(target, echo_head, plain):
    head = echo_head(target, plain)
    generator = JetFlowCandidateGenerator(head, Target(target, head.config))
    input_ids = plain[:, :20]
    observe_all(generator, target, input_ids)
    candidates, logits = generator.get_candidates(input_ids)
    assert candidates.tolist() == plain[:, :27].tolist()
    assert logits is None


def test_the_candidate_generator_drafts_the_best_token_of_every_depth(target, random_head, plain):
    head = random_head(target, ngram_weights=[])
    generator = JetFlowCandidateGenerator(head, Target(target, head.config))
    observe_all(generator, target, plain[:, :20])
    chain, _ = generator.get_candidates(plain[:, :20])
    again, _ = generator.get_candidates(plain[:, :20])
    assert again.tolist() == chain.tolist(), "asking twice with nothing observed in between drafted something else"
    other = JetFlowCandidateGenerator(head, Target(target, head.config))
    observe_all(other, target, plain[:, :20])
    best = other.propose(plain[:, :20], torch.tensor([19]), 7, width=5).candidates
    assert chain[0, 20:].tolist() == best.tokens[0, :, 0].tolist()
    assert best.tokens.shape == best.logprobs.shape == (1, 7, 5)


def test_the_candidate_generator_says_what_to_do_before_anything_was_observed(target, head, plain):
    generator = JetFlowCandidateGenerator(head, Target(target, head.config))
    with pytest.raises(ValueError, match="call `observe`"):
        generator.get_candidates(plain[:, :20])


def test_the_package_exports_its_public_names():
    assert all(hasattr(hf_jetflow, name) for name in hf_jetflow.__all__)
    assert issubclass(JetFlowHead, hf_jetflow.JetFlowHead)
