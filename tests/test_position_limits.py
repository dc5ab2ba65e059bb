"""Position tables that end, and rotary embeddings that depend on the longest position of a forward."""

import copy
import functools

import pytest
import torch
import transformers
from conftest import build_noisy, build_random, build_target
from helpers import block_inputs, tiny_head
from reference import assert_same_text
from transformers import AutoConfig, AutoModelForCausalLM, GitConfig, GitForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.head.cache import UNSEEN_POSITION
from hf_jetflow.target.position_limits import PositionLimits, position_limits


LOSES_TEXT = transformers.__version__ < "5.24"
BORDER = 24
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    long_factor=[2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    factor=4.0,
    original_max_position_embeddings=BORDER,
)
DYNAMIC = dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)
PHI = dict(original_max_position_embeddings=BORDER, rope_parameters=LONGROPE)  # starts a new cache at the border
ROTATED = {
    "llama, longrope": ("llama", dict(rope_parameters=LONGROPE)),
    "phi3, longrope": ("phi3", dict(**PHI, sliding_window=None)),
    "phi3, longrope and a window": ("phi3", dict(**PHI, sliding_window=9)),
    "phimoe, longrope": (
        "phimoe",
        dict(
            rope_parameters=dict(**LONGROPE, short_mscale=1.0, long_mscale=1.3),
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
    ),
    "phi3, one rotation": (
        "phi3",
        dict(PHI, rope_parameters=dict(rope_type="default", rope_theta=10000.0), sliding_window=None),
    ),
    "llama, dynamic": ("llama", dict(max_position_embeddings=BORDER, rope_parameters=DYNAMIC)),
    "gemma3_text, dynamic in some layers": (
        "gemma3_text",
        dict(
            max_position_embeddings=BORDER,
            rope_parameters=dict(
                full_attention=DYNAMIC, sliding_attention=dict(rope_type="default", rope_theta=10000.0)
            ),
        ),
    ),
}
LENGTHS = {"below": (9, 10), "to": (9, 15), "at": (BORDER, 14), "across": (14, 24), "beyond": (30, 14)}
TABLE = 40
SIZES = dict(vocab_size=67, pad_token_id=0, bos_token_id=1, eos_token_id=2)
USUAL = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
DECODER = dict(
    d_model=32,
    num_hidden_layers=4,
    decoder_layers=4,
    num_attention_heads=4,
    decoder_attention_heads=4,
    decoder_ffn_dim=48,
    is_decoder=True,
)
TABLED = {
    "opt": dict(**USUAL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=TABLE),
    "biogpt": dict(**USUAL, intermediate_size=48, max_position_embeddings=TABLE),
    "gpt_neo": dict(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=TABLE,
    ),
    "gpt_bigcode": dict(**USUAL, n_positions=TABLE),
    "gpt2": dict(**USUAL, n_positions=TABLE),
    "gptj": dict(**USUAL, n_positions=TABLE, rotary_dim=4),
    "codegen": dict(**USUAL, n_positions=TABLE, rotary_dim=4),
    "ctrl": dict(**USUAL, n_positions=TABLE, dff=48),
    "bert": dict(**USUAL, intermediate_size=48, is_decoder=True, max_position_embeddings=TABLE),
    "mbart": dict(**DECODER, is_encoder_decoder=False, max_position_embeddings=TABLE),
    "whisper": dict(**DECODER, is_encoder_decoder=False, max_target_positions=TABLE, decoder_start_token_id=1),
}


@functools.cache
def rotated(name: str):
    """The target, untouched: dynamic RoPE remembers the longest text, so a test generates with copies."""
    family, settings = ROTATED[name]
    return build_target.__wrapped__(family, **settings)


@functools.cache
def tabled(name: str):
    torch.manual_seed(1)
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **TABLED[name])).eval()
    with torch.no_grad():
        for part, parameter in target.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3 if "embed" in part else 10)
    target.generation_config.eos_token_id = None
    return target


def prompt(length: int, batch: int = 1, highest: int = 64) -> torch.Tensor:
    return torch.randint(3, highest, (batch, length), generator=torch.Generator().manual_seed(length))


def padded(*lengths: int) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded on the left."""
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return dict(input_ids=prompt(max(lengths), len(lengths)) * mask, attention_mask=mask)


def generate(target, input_ids, head=None, **kwargs):
    torch.manual_seed(7)
    settings = dict(do_sample=False, return_dict_in_generate=True)
    return copy.deepcopy(target).generate(input_ids, assistant_model=head, **{**settings, **kwargs})


def stops_at(length: int):
    def criterion(input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= length)

    criterion.is_row_wise = True
    return [criterion]


def forgets(target) -> bool:
    """Early releases of transformers lose the text when such a target starts a new cache: it is decoded plainly."""
    return LOSES_TEXT and target.config.model_type.startswith("phi")


needs_new_caches = pytest.mark.skipif(
    LOSES_TEXT, reason="this release of transformers loses the text when it starts a new cache"
)


def assert_same_cache(plain, drafted) -> None:
    for expected, got in zip(plain.past_key_values.layers, drafted.past_key_values.layers, strict=True):
        torch.testing.assert_close(got.keys, expected.keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got.values, expected.values, atol=1e-3, rtol=1e-3)
        assert got.get_seq_length() == expected.get_seq_length()


@pytest.mark.parametrize("where", LENGTHS)
@pytest.mark.parametrize("name", ROTATED)
def test_drafts_never_change_the_rotation(name, where):
    """With any budget across the border, with one elsewhere."""
    length, num_new = LENGTHS[where]
    target = rotated(name)
    plain = generate(target, prompt(length), max_new_tokens=num_new)
    for node_budget in (1, 4, 32, "auto") if where == "across" else (32,):
        head = build_noisy(target, plain.sequences)
        head.generation_config.node_budget = node_budget
        drafted = generate(target, prompt(length), head, max_new_tokens=num_new)
        assert_same_text(plain.sequences, drafted.sequences)
        assert_same_cache(plain, drafted)
        is_plain = node_budget == 1 or ("dynamic" in name and where in ("at", "beyond"))
        is_plain |= forgets(target) and where in ("at", "across")
        assert is_plain or head.last_stats.num_accepted


@pytest.mark.parametrize("name", ROTATED)
def test_chains_and_sampled_texts_cross_the_border_as_plain_ones(name):
    target = rotated(name)
    for settings in (dict(do_sample=False), dict(do_sample=True, temperature=0.7)):
        plain = generate(target, prompt(14), max_new_tokens=24, **settings).sequences
        head = build_noisy(target, plain)
        head.generation_config.width = 1
        assert_same_text(plain, generate(target, prompt(14), head, max_new_tokens=24, **settings).sequences)
        assert head.last_stats.num_accepted or forgets(target)


@pytest.mark.parametrize("num_prompt", [9, 20])
@pytest.mark.parametrize("name", ROTATED)
def test_a_padded_prompt_crosses_the_border_where_plain_decoding_does(name, num_prompt):
    """By its positions for the rotation, by its length with padding for a new cache."""
    target, inputs = rotated(name), padded(num_prompt + 4, num_prompt)
    inputs = {key: value[1:] for key, value in inputs.items()}
    plain = generate(target, **inputs, max_new_tokens=24).sequences
    for head in (build_noisy(target, plain), build_noisy(target, plain[:, 4:])):
        assert_same_text(plain, generate(target, **inputs, head=head, max_new_tokens=24).sequences)


@pytest.mark.parametrize("name", ["llama, longrope", "phi3, longrope", "llama, dynamic"])
def test_a_batch_drafts_while_no_text_can_cross_the_border(name):
    target, inputs = rotated(name), padded(12, 7, 3)
    head = build_random(target)
    for num_new, is_drafted in ((BORDER - 12, True), (BORDER - 11, True), (BORDER - 10, False), (30, False)):
        plain = generate(target, **inputs, max_new_tokens=num_new)
        drafted = generate(target, **inputs, head=head, max_new_tokens=num_new)
        assert torch.equal(plain.sequences, drafted.sequences)
        assert bool(head.last_stats.num_drafted) == is_drafted
        if is_drafted:
            assert_same_cache(plain, drafted)
        else:
            assert f"beyond {BORDER} tokens" in head.last_stats.policy["plain"]


def test_a_batch_of_embeddings_counts_them_as_text():
    target, ids = rotated("llama, longrope"), prompt(20, batch=2)
    embeds = target.get_input_embeddings()(ids).detach()
    head = build_random(target)
    for num_new, is_drafted in ((BORDER - 19, True), (BORDER - 18, False)):
        texts = [generate(target, None, given, inputs_embeds=embeds, max_new_tokens=num_new) for given in (None, head)]
        assert torch.equal(texts[0].sequences, texts[1].sequences)
        assert bool(head.last_stats.num_drafted) == is_drafted


@pytest.mark.parametrize("name", ["llama, longrope", "phi3, longrope", "llama, dynamic"])
def test_a_static_cache_crosses_the_border(name):
    target = rotated(name)
    settings = dict(max_new_tokens=24, cache_implementation="static", disable_compile=True)
    plain = generate(target, prompt(14), **settings).sequences
    head = build_noisy(target, plain)
    assert_same_text(plain, generate(target, prompt(14), head, **settings).sequences)
    assert head.last_stats.num_accepted or forgets(target)


@needs_new_caches
def test_hidden_states_and_attentions_show_the_text_that_is_read_again():
    target = build_target.__wrapped__("phi3", **PHI, sliding_window=None, attn_implementation="eager")
    settings = dict(max_new_tokens=24, output_hidden_states=True, output_attentions=True)
    plain = generate(target, prompt(14), **settings)
    drafted = generate(target, prompt(14), build_noisy(target, plain.sequences), **settings)
    assert BORDER + 1 in {step[0].shape[1] for step in plain.hidden_states[1:]}, "nothing is read again"
    for name in ("hidden_states", "attentions"):
        for expected, got in zip(getattr(plain, name), getattr(drafted, name), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@needs_new_caches
def test_drafts_are_right_again_behind_a_new_cache():
    """The head then hears the states that were read again."""
    target = rotated("phi3, longrope")
    plain = generate(target, prompt(14), max_new_tokens=40).sequences
    shown = []

    class Listening(JetFlowHead):
        def forward(self, *args, context_position_ids, **kwargs):
            shown.append(context_position_ids[0].tolist())
            return super().forward(*args, context_position_ids=context_position_ids, **kwargs)

    head = Listening(
        JetFlowConfig.for_target(target.config, num_hidden_layers=1, block_size=8, mask_token_id=0)
    ).eval()
    assert_same_text(plain, generate(target, prompt(14), head, max_new_tokens=40).sequences)
    assert list(range(BORDER + 1)) in shown


def test_a_second_turn_across_the_border_goes_on_as_plain_decoding():
    target = rotated("phi3, longrope")
    texts = []
    for kinds in ("plain plain", "head head", "plain head", "head plain"):
        ids, cache = prompt(9), None
        for kind in kinds.split():
            head = build_noisy(target, texts[0]) if kind == "head" else None
            output = generate(target, ids, head, past_key_values=cache, max_new_tokens=10)
            ids, cache = torch.cat([output.sequences, prompt(8)], dim=1), output.past_key_values
        texts.append(output.sequences)
        assert_same_text(texts[0], texts[-1])


def test_plain_decoding_beyond_the_border_is_said(caplog):
    target = build_target.__wrapped__(
        "llama", max_position_embeddings=BORDER + 1, rope_parameters=DYNAMIC, num_hidden_layers=3
    )
    with caplog.at_level("WARNING", logger="transformers"):
        generate(target, prompt(20), build_random(target, num_hidden_layers=1), max_new_tokens=9)
    assert f"from position {BORDER + 1} on" in caplog.text


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_context_rows_that_no_block_sees_leave_the_rotation_of_the_head_alone(rope):
    rope = {name: factors[:4] if isinstance(factors, list) else factors for name, factors in rope.items()}
    head = tiny_head(rope_parameters=rope, max_position_embeddings=64)
    inputs = block_inputs(5)
    expected = head(**inputs)
    inputs["features"] = torch.nn.functional.pad(inputs["features"], (0, 0, 0, 1))
    inputs["context_position_ids"] = torch.nn.functional.pad(
        inputs["context_position_ids"], (0, 1), value=UNSEEN_POSITION
    )
    torch.testing.assert_close(head(**inputs), expected)


@pytest.mark.parametrize("name", TABLED)
def test_drafts_end_with_the_position_table(name):
    target = tabled(name)
    settings = dict(max_new_tokens=100, stopping_criteria=stops_at(TABLE))
    plain = generate(target, prompt(22), **settings).sequences
    assert plain.shape[1] == TABLE
    for node_budget, width in ((1, None), (4, None), (32, None), (32, 1), ("auto", None)):
        head = build_noisy(target, plain)
        head.generation_config.node_budget, head.generation_config.width = node_budget, width
        assert_same_text(plain, generate(target, prompt(22), head, **settings).sequences)
        assert node_budget == 1 or head.last_stats.num_accepted


@pytest.mark.parametrize("name", TABLED)
def test_a_text_that_goes_beyond_the_table_fails_as_in_plain_decoding(name):
    target, errors = tabled(name), []
    for head in (None, build_random(target)):
        with pytest.raises((IndexError, RuntimeError)) as error:
            generate(target, prompt(30), head, max_new_tokens=100)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", TABLED)
def test_a_padded_batch_uses_the_whole_table(name):
    target, inputs = tabled(name), padded(30, 24, 11)
    for settings in (dict(max_length=TABLE), dict(max_length=TABLE, do_sample=True)):
        plain = generate(target, **inputs, **settings)
        head = build_noisy(target, plain.sequences[:1])
        drafted = generate(target, **inputs, head=head, **settings)
        assert torch.equal(plain.sequences, drafted.sequences)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_cache_of_a_batch_that_ends_with_the_table_is_returned_whole(name):
    """Sequences that ended earlier are read to its end, none beyond."""
    target, inputs = tabled(name), padded(30, 30, 30)
    plain = generate(target, **inputs, max_length=TABLE)
    texts = plain.sequences[:, 30:].tolist()
    eos = next(token for text in texts for token in text[:-2] if any(token not in other for other in texts))
    settings = dict(max_length=TABLE, eos_token_id=eos, pad_token_id=0)
    plain = generate(target, **inputs, **settings)
    drafted = generate(target, **inputs, head=build_random(target), **settings)
    assert torch.equal(plain.sequences, drafted.sequences)
    assert_same_cache(plain, drafted)


def test_continuations_by_ngrams_end_with_the_table():
    """They go deeper than the head drafts."""
    target = tabled("gpt2")
    ids = torch.cat([prompt(8)] * 4, dim=1)
    settings = dict(max_new_tokens=100, stopping_criteria=stops_at(TABLE))
    plain = generate(target, ids, **settings).sequences
    head = build_noisy(target, torch.cat([ids, prompt(8)], dim=1), ngram_weights=[1.0, 2.0, 3.0])
    assert_same_text(plain, generate(target, ids, head, **settings).sequences)


def test_a_static_cache_ends_with_the_table():
    target = tabled("gpt2")
    settings = dict(max_new_tokens=100, stopping_criteria=stops_at(TABLE), cache_implementation="static")
    settings["disable_compile"] = True
    plain = generate(target, prompt(22), **settings).sequences
    head = build_noisy(target, plain)
    assert_same_text(plain, generate(target, prompt(22), head, **settings).sequences)
    assert head.last_stats.num_accepted


def test_a_table_that_was_cut_counts_more_than_the_configuration():
    target = copy.deepcopy(tabled("gpt2"))
    target.transformer.wpe = torch.nn.Embedding.from_pretrained(target.transformer.wpe.weight[:35].detach())
    settings = dict(max_new_tokens=100, stopping_criteria=stops_at(35))
    plain = generate(target, prompt(22), **settings).sequences
    assert_same_text(plain, generate(target, prompt(22), build_noisy(target, plain), **settings).sequences)


def test_the_depth_ends_in_front_of_the_next_border():
    limits = PositionLimits(borders=(8, 20), plain_from=20)
    assert [limits.max_depth(position) for position in (0, 6, 7, 8, 19, 20, 21)] == [7, 1, 0, 11, 0, 0, 0]
    assert PositionLimits(borders=(8,)).max_depth(8) is None


def test_an_ordinary_target_is_limited_by_its_configured_length_only():
    config = LlamaConfig(**SIZES, **USUAL, intermediate_size=32, max_position_embeddings=77)
    assert position_limits(LlamaForCausalLM(config)) == PositionLimits(borders=(77,))


def test_positions_of_an_image_are_no_positions_of_the_text():
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = GitConfig(
        **SIZES, **USUAL, intermediate_size=32, max_position_embeddings=77, vision_config=dict(vision, patch_size=14)
    )
    assert position_limits(GitForCausalLM(config)) == PositionLimits(borders=(77,), batch_end=77)
