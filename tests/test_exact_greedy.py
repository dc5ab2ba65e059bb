"""Greedy decoding with any head gives, token for token, the text of plain decoding."""

import copy

import pytest
import torch
from conftest import FAMILIES
from reference import assert_same_text, decode_slowly
from torch import nn
from transformers import DynamicCache

from hf_jetflow import JetFlowHead


SLIDING = ["mistral-sliding", "gemma2", "gemma3_text", "gpt_oss"]
KINDS = ["random", "echo", "wrong", "noisy", "parent", "path"]
OTHER_BUDGETS = [1, 2, 7, 256]  # than the default of `generate` below
NUM_TOKENS = 33  # the prefill's token and four whole blocks


def generate(target, input_ids, head=None, node_budget=64, **kwargs):
    """Greedy text of 33 new tokens, unless the call says otherwise."""
    if isinstance(head, JetFlowHead):
        head.generation_config.node_budget = node_budget
        kwargs["assistant_model"] = head
    if "max_length" not in kwargs:
        kwargs.setdefault("max_new_tokens", NUM_TOKENS)
    return target.generate(input_ids, do_sample=False, **kwargs)


@pytest.fixture(scope="module")
def plain_text(tiny_target):
    """`plain_text(family, input_ids)`: plain greedy output, computed once per family and prompt."""
    known = {}

    def decode(family, input_ids):
        key = (family, tuple(input_ids[0].tolist()))
        if key not in known:
            known[key] = generate(tiny_target(family), input_ids)
        return known[key]

    return decode


def test_the_text_equals_decoding_without_cache_and_generate(family, tiny_target, noisy_head, plain_text, prompt):
    target = tiny_target(family)
    slow = decode_slowly(target, prompt, NUM_TOKENS)
    head = noisy_head(target, plain_text(family, prompt))
    assert_same_text(slow, generate(target, prompt, head))


@pytest.mark.parametrize(
    ("family", "node_budget"),
    [(family, 64) for family in FAMILIES]
    + [(family, budget) for family in ("llama", "mistral-sliding", "gemma3_text") for budget in OTHER_BUDGETS],
)
def test_every_family_and_node_budget_gives_the_plain_text(
    family, node_budget, tiny_target, noisy_head, plain_text, prompt
):
    target, plain = tiny_target(family), plain_text(family, prompt)
    head = noisy_head(target, plain)
    assert_same_text(plain, generate(target, prompt, head, node_budget))
    if node_budget == 64:
        assert 0 < head.last_stats.num_accepted < head.last_stats.num_rounds * (head.config.block_size - 1), (
            "the noisy head should be right now and then, or this test follows no branch of the tree"
        )


@pytest.mark.any_release
@pytest.mark.parametrize(
    ("family", "kind", "node_budget"),
    [(family, kind, 64) for family in ("qwen3", "mistral-sliding") for kind in KINDS if kind != "noisy"]
    + [("mistral-sliding", kind, budget) for kind in ("random", "path") for budget in OTHER_BUDGETS],
)
def test_every_head_gives_the_plain_text(kind, node_budget, family, tiny_target, head_of_kind, plain_text, prompt):
    target, plain = tiny_target(family), plain_text(family, prompt)
    head = head_of_kind(kind, target, plain)
    assert_same_text(plain, generate(target, prompt, head, node_budget))


@pytest.mark.any_release
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_chain_gives_the_plain_text(kind, family, tiny_target, head_of_kind, plain_text, prompt):
    target, plain = tiny_target(family), plain_text(family, prompt)
    head = head_of_kind(kind, target, plain)
    head.generation_config.width = 1
    assert_same_text(plain, generate(target, prompt, head))


@pytest.mark.parametrize("max_depth", [1, 3])
def test_a_lower_depth_limit_gives_the_plain_text(max_depth, tiny_target, echo_head, plain_text, prompt):
    target, plain = tiny_target("llama"), plain_text("llama", prompt)
    head = echo_head(target, plain)
    head.generation_config.max_depth = max_depth
    assert_same_text(plain, generate(target, prompt, head))
    assert head.last_stats.tokens_per_round == max_depth + 1


@pytest.mark.parametrize("node_budget", [8, 64])
def test_every_draft_of_the_echo_head_is_accepted(family, node_budget, tiny_target, echo_head, plain_text, prompt):
    target, plain = tiny_target(family), plain_text(family, prompt)
    head = echo_head(target, plain)
    assert_same_text(plain, generate(target, prompt, head, node_budget))
    assert head.last_stats.tokens_per_round == head.config.block_size, "a right draft was rejected"


def test_no_draft_of_the_wrong_head_is_accepted(tiny_target, wrong_head, plain_text, prompt):
    target, plain = tiny_target("llama"), plain_text("llama", prompt)
    head = wrong_head(target, plain)
    assert_same_text(plain, generate(target, prompt, head))
    assert head.last_stats.num_accepted == 0


@pytest.mark.parametrize("kind", ["echo", "noisy"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_implementations_give_the_plain_text(
    kind, family, attention, tiny_target, head_of_kind, plain_text, prompt
):
    target = tiny_target(family, attn_implementation=attention)
    assert target.config._attn_implementation == attention
    plain = plain_text(family, prompt)
    assert_same_text(plain, generate(target, prompt, head_of_kind(kind, target, plain)))


HEAD_LAYOUTS = {
    "bidirectional": dict(is_causal=False),
    "last layer bidirectional": dict(is_causal=[True, False]),
    "sliding layer": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=5),
    "all sliding, one not causal": dict(
        layer_types=["sliding_attention"] * 2, sliding_window=5, is_causal=[False, True]
    ),
    "learned mask embedding": dict(mask_token_id=None),
    "draft vocabulary": dict(draft_vocab_size=100),
    "one tapped layer": dict(hidden_state_indices=[3]),
    "embedding output tapped": dict(hidden_state_indices=[0, 5]),
    "attention biases": dict(attention_bias=True),
    "few candidates to correct": dict(branch_correction="path", branch_candidates=3),
    "more candidates to correct than tokens": dict(branch_correction="parent", branch_candidates=1000),
}


@pytest.mark.any_release
@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
def test_every_layout_of_the_head_gives_the_plain_text(layout, tiny_target, random_head, plain_text, prompt):
    target = tiny_target("mistral-sliding")
    head = random_head(target, **HEAD_LAYOUTS[layout])
    assert_same_text(plain_text("mistral-sliding", prompt), generate(target, prompt, head))


def test_a_head_with_eager_attention_gives_the_plain_text(tiny_target, random_head, plain_text, prompt):
    target = tiny_target("llama")
    head = random_head(target, is_causal=[True, False])
    head.set_attn_implementation("eager")
    assert_same_text(plain_text("llama", prompt), generate(target, prompt, head))


def test_a_draft_vocabulary_drafts_target_ids(tiny_target, echo_head, plain_text, prompt):
    target, plain = tiny_target("llama"), plain_text("llama", prompt)
    token_ids = plain[0].unique()
    head = echo_head(target, plain, draft_vocab_size=len(token_ids))
    head.d2t.copy_(token_ids)
    assert_same_text(plain, generate(target, prompt, head))
    assert head.last_stats.tokens_per_round == head.config.block_size, "drafted ids are not those of the target"


def test_tokens_outside_the_draft_vocabulary_are_still_written(tiny_target, echo_head, plain_text, prompt):
    target, plain = tiny_target("llama"), plain_text("llama", prompt)
    token_ids = plain[0, 12:].unique()[::2]
    head = echo_head(target, plain, draft_vocab_size=len(token_ids))
    head.d2t.copy_(token_ids)
    assert_same_text(plain, generate(target, prompt, head))


@pytest.mark.parametrize("kind", ["random", "echo"])
def test_a_bf16_head_on_an_fp32_target_gives_the_plain_text(kind, tiny_target, head_of_kind, plain_text, prompt):
    target, plain = tiny_target("llama"), plain_text("llama", prompt)
    head = head_of_kind(kind, target, plain).to(torch.bfloat16)
    assert_same_text(plain, generate(target, prompt, head))


@pytest.mark.parametrize("kind", ["parent", "path"])
def test_a_corrected_draft_vocabulary_gives_the_plain_text(kind, tiny_target, corrected_head, plain_text, prompt):
    target, plain = tiny_target("llama"), plain_text("llama", prompt)
    token_ids = plain[0].unique()
    head = corrected_head(kind, target, plain, draft_vocab_size=len(token_ids))
    head.d2t.copy_(token_ids)
    assert_same_text(plain, generate(target, prompt, head))
    assert head.last_stats.num_accepted


def test_a_target_with_tied_embeddings_gives_the_plain_text(tiny_target, noisy_head, prompt):
    target = tiny_target("llama", tie_word_embeddings=True)
    plain = generate(target, prompt)
    assert_same_text(plain, generate(target, prompt, noisy_head(target, plain)))


def test_an_output_layer_with_a_bias_is_asked_as_a_module(tiny_target, echo_head, plain_text, prompt):
    target = tiny_target("phi")
    assert target.get_output_embeddings().bias is not None
    plain = generate(target, prompt)
    head = echo_head(target, plain)
    assert_same_text(plain, generate(target, prompt, head))
    assert head.last_stats.tokens_per_round == head.config.block_size


@pytest.mark.parametrize("kind", ["parent", "path"])
def test_an_output_layer_with_a_bias_corrects_as_one_without(kind, tiny_target, corrected_head, prompt):
    target = copy.deepcopy(tiny_target("llama"))
    plain = generate(target, prompt)
    head = corrected_head(kind, target, plain)
    assert_same_text(plain, generate(target, prompt, head))
    as_matrix = head.last_stats
    output = target.get_output_embeddings()
    with_bias = nn.Linear(output.in_features, output.out_features)
    with_bias.weight = output.weight
    nn.init.zeros_(with_bias.bias)
    target.set_output_embeddings(with_bias)
    assert_same_text(plain, generate(target, prompt, head))
    assert head.last_stats.accepted_by_depth == as_matrix.accepted_by_depth


def left_padded(prompt, num_pads):
    input_ids = torch.cat([prompt.new_zeros(1, num_pads), prompt], dim=1)
    return input_ids, (torch.arange(input_ids.shape[1]) >= num_pads).long()[None]


@pytest.mark.parametrize("kind", ["random", "echo", "noisy"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral-sliding", "gemma3_text"])
def test_a_left_padded_prompt_gives_the_plain_text(kind, family, tiny_target, head_of_kind, prompt):
    target = tiny_target(family)
    input_ids, attention_mask = left_padded(prompt, 5)
    plain = generate(target, input_ids, attention_mask=attention_mask)
    head = head_of_kind(kind, target, plain[:, 5:])
    assert_same_text(plain, generate(target, input_ids, head, attention_mask=attention_mask))
    if kind == "echo":
        assert head.last_stats.tokens_per_round == head.config.block_size, "positions count the padding"


def test_a_left_padded_prompt_gives_the_plain_text_with_eager_attention(tiny_target, noisy_head, prompt):
    target = tiny_target("gemma3_text", attn_implementation="eager")
    input_ids, attention_mask = left_padded(prompt, 5)
    plain = generate(target, input_ids, attention_mask=attention_mask)
    head = noisy_head(target, plain[:, 5:])
    assert_same_text(plain, generate(target, input_ids, head, attention_mask=attention_mask))


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_a_prompt_with_masked_tokens_inside_gives_the_plain_text(family, tiny_target, noisy_head, plain_text, prompt):
    target = tiny_target(family)
    attention_mask = torch.ones_like(prompt)
    attention_mask[0, [4, 5, 9]] = 0
    plain = generate(target, prompt, attention_mask=attention_mask)
    assert not torch.equal(plain, plain_text(family, prompt)), "the mask does not matter, so this test shows nothing"
    assert_same_text(plain, generate(target, prompt, noisy_head(target, plain), attention_mask=attention_mask))


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_positions_of_the_caller_are_continued(family, tiny_target, echo_head, prompt):
    target = tiny_target(family)
    position_ids = torch.arange(12)[None] * 2 + 7
    plain = generate(target, prompt, position_ids=position_ids)
    shifted = torch.cat([plain.new_zeros(1, 30 - 12), plain], dim=1)  # the continuation starts at position 30
    head = echo_head(target, shifted)
    assert_same_text(plain, generate(target, prompt, head, position_ids=position_ids))
    assert head.last_stats.tokens_per_round == head.config.block_size, "positions are counted from 0"


@pytest.mark.parametrize("kind", ["random", "echo"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_prompt_given_as_embeddings_gives_the_plain_text(
    kind, family, tiny_target, head_of_kind, plain_text, prompt
):
    target = tiny_target(family)
    embeds = target.get_input_embeddings()(prompt).detach()
    plain = generate(target, None, inputs_embeds=embeds)
    head = head_of_kind(kind, target, plain_text(family, prompt))
    assert_same_text(plain, generate(target, None, head, inputs_embeds=embeds))
    assert_same_text(plain_text(family, prompt)[:, prompt.shape[1] :], plain)


def test_a_prompt_given_as_ids_and_embeddings_gives_the_plain_text(tiny_target, random_head, prompt):
    target = tiny_target("llama")
    embeds = target.get_input_embeddings()(prompt).detach()
    plain = generate(target, prompt, inputs_embeds=embeds)
    assert_same_text(plain, generate(target, prompt, random_head(target), inputs_embeds=embeds))


@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_a_prompt_read_in_chunks_gives_the_plain_text(chunk_size, family, tiny_target, echo_head, plain_text, prompt):
    target, plain = tiny_target(family), plain_text(family, prompt)
    assert_same_text(plain, generate(target, prompt, prefill_chunk_size=chunk_size))
    head = echo_head(target, plain)
    assert_same_text(plain, generate(target, prompt, head, prefill_chunk_size=chunk_size))


@pytest.mark.parametrize("kind", ["wrong", "echo"])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 9, 10])
def test_the_length_limit_is_never_passed(kind, num_tokens, tiny_target, head_of_kind, plain_text, prompt):
    target, plain = tiny_target("llama"), plain_text("llama", prompt)
    head = head_of_kind(kind, target, plain)
    by_length = generate(target, prompt, head, max_length=12 + num_tokens)
    assert_same_text(plain[:, : 12 + num_tokens], by_length)
    assert_same_text(plain[:, : 12 + num_tokens], generate(target, prompt, head, max_new_tokens=num_tokens))


def test_the_last_position_of_the_target_can_be_reached(tiny_target, echo_head, prompt):
    target = tiny_target("llama", max_position_embeddings=32)
    plain = generate(target, prompt, max_length=32)
    assert_same_text(plain, generate(target, prompt, echo_head(target, plain), max_length=32))


@pytest.mark.parametrize("kind", ["random", "echo"])
def test_min_new_tokens_holds_the_end_back_as_in_plain_decoding(kind, tiny_target, head_of_kind, plain_text, prompt):
    target, free = tiny_target("llama"), plain_text("llama", prompt)
    limits = dict(eos_token_id=int(free[0, 15]), min_new_tokens=9)
    plain = generate(target, prompt, **limits)
    assert plain.shape[1] > 12 + 8
    assert_same_text(plain, generate(target, prompt, head_of_kind(kind, target, plain), **limits))


@pytest.mark.parametrize(
    ("kind", "prompt_length"), [("echo", 9), *(("noisy", length) for length in (3, 8, 9, 10, 30))]
)
@pytest.mark.parametrize("family", SLIDING)
def test_a_window_that_is_full_or_fills_up_gives_the_plain_text(
    kind, prompt_length, family, tiny_target, head_of_kind, plain_text
):
    target = tiny_target(family)
    input_ids = torch.randint(3, 257, (1, prompt_length))
    plain = plain_text(family, input_ids)
    assert_same_text(plain, generate(target, input_ids, head_of_kind(kind, target, plain)))


@pytest.mark.parametrize("kind", ["echo", "noisy"])
@pytest.mark.parametrize("prompt_length", [3, 12])
@pytest.mark.parametrize("family", SLIDING)
def test_a_tree_deeper_than_the_window_gives_the_plain_text(
    kind, prompt_length, family, tiny_target, head_of_kind, plain_text
):
    target = tiny_target(family)
    input_ids = torch.randint(3, 257, (1, prompt_length))
    plain = plain_text(family, input_ids)
    head = head_of_kind(kind, target, plain, block_size=16)
    assert_same_text(plain, generate(target, input_ids, head))
    if kind == "echo":
        assert head.last_stats.num_rounds == 2, "a right draft was rejected"


def take_turns(target, prompt, heads, cache=None, **kwargs):
    """Two chat turns that share a cache; returns both texts and the length of the cache after each."""
    texts, lengths = [], []
    ids, new_ids = prompt, torch.randint(3, 257, (1, 6), generator=torch.Generator().manual_seed(9))
    for head in heads:
        outputs = generate(
            target, ids, head, past_key_values=cache, return_dict_in_generate=True, max_new_tokens=20, **kwargs
        )
        cache = outputs.past_key_values
        texts.append(outputs.sequences)
        lengths.append(cache.get_seq_length())
        ids = torch.cat([outputs.sequences, new_ids], dim=1)
    return texts, lengths


@pytest.mark.parametrize("kind", ["echo", "noisy", "path"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
def test_a_second_chat_turn_on_the_returned_cache_gives_the_plain_text(
    kind, family, tiny_target, head_of_kind, prompt
):
    target = tiny_target(family)
    plain, _ = take_turns(target, prompt, [None, None])
    head = head_of_kind(kind, target, plain[-1])
    texts, lengths = take_turns(target, prompt, [head, head])
    for expected, got, length in zip(plain, texts, lengths, strict=True):
        assert_same_text(expected, got)
        assert length == got.shape[1] - 1, "the cache must hold every token but the newest one"


@pytest.mark.parametrize("turns", ["head then plain", "plain then head"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_plain_decoding_and_the_head_can_take_turns_on_one_cache(turns, family, tiny_target, echo_head, prompt):
    target = tiny_target(family)
    plain, _ = take_turns(target, prompt, [None, None])
    head = echo_head(target, plain[-1])
    texts, _ = take_turns(target, prompt, [head if turn == "head" else None for turn in turns.split(" then ")])
    for expected, got in zip(plain, texts, strict=True):
        assert_same_text(expected, got)


@pytest.mark.parametrize("kind", ["echo", "noisy"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_a_cache_of_the_caller_without_windows_gives_the_plain_text(kind, family, tiny_target, head_of_kind, prompt):
    target = tiny_target(family)
    plain, _ = take_turns(target, prompt, [None, None])
    head = head_of_kind(kind, target, plain[-1])
    texts, _ = take_turns(target, prompt, [head, head], cache=DynamicCache())
    for expected, got in zip(plain, texts, strict=True):
        assert_same_text(expected, got)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_second_turn_may_pass_only_the_new_tokens(family, tiny_target, noisy_head, prompt):
    target = tiny_target(family)
    texts, reference = [], None
    for kind in ("plain", "head"):
        head = noisy_head(target, reference) if kind == "head" else None
        first = generate(target, prompt, head, return_dict_in_generate=True)
        length = first.sequences.shape[1] + 5
        # The newest token of the first turn is not in its cache, so it is new to the second.
        new_ids = torch.cat([first.sequences[:, -1:], prompt[:, :5]], dim=1)
        mask = torch.ones(1, length, dtype=torch.long)
        texts.append(generate(target, new_ids, head, attention_mask=mask, past_key_values=first.past_key_values))
        reference = torch.cat([first.sequences[:, :-1], texts[0]], dim=1)
    assert_same_text(*texts)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
@pytest.mark.parametrize("next_turn", ["plain", "head"])
def test_a_turn_of_one_token_leaves_a_usable_cache(next_turn, family, tiny_target, echo_head, plain_text, prompt):
    target = tiny_target(family)
    first = generate(target, prompt, echo_head(target, prompt), max_new_tokens=1, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 12
    ids = torch.cat([first.sequences, prompt[:, :6]], dim=1)
    plain = plain_text(family, ids)
    head = echo_head(target, plain) if next_turn == "head" else None
    assert_same_text(plain, generate(target, ids, head, past_key_values=first.past_key_values))


def test_a_second_turn_behind_padding_gives_the_plain_text(tiny_target, echo_head, prompt):
    target = tiny_target("llama")
    input_ids, attention_mask = left_padded(prompt, 5)
    texts = []
    for _ in range(2):
        head = echo_head(target, texts[-1][:, 5:]) if texts else None
        first = generate(target, input_ids, head, attention_mask=attention_mask, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, prompt[:, :4]], dim=1)
        mask = torch.cat([attention_mask, attention_mask.new_ones(1, ids.shape[1] - 17)], dim=1)
        texts.append(generate(target, ids, head, attention_mask=mask, past_key_values=first.past_key_values))
    assert_same_text(*texts)


@pytest.mark.parametrize("kind", ["echo", "wrong", "noisy"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
def test_the_returned_cache_is_the_one_of_plain_decoding(kind, family, tiny_target, head_of_kind, prompt):
    target = tiny_target(family)
    plain = generate(target, prompt, return_dict_in_generate=True)
    head = head_of_kind(kind, target, plain.sequences)
    drafted = generate(target, prompt, head, return_dict_in_generate=True)
    for expected, got in zip(plain.past_key_values.layers, drafted.past_key_values.layers, strict=True):
        assert expected.get_seq_length() == got.get_seq_length()
        torch.testing.assert_close(got.keys, expected.keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got.values, expected.values, atol=1e-3, rtol=1e-3)


class OtherLinear(nn.Linear):
    """Not a plain linear layer, as far as its type tells: a stand-in for a quantized output embedding."""


def test_an_output_embedding_of_another_class_is_asked_as_a_module(tiny_target, echo_head, plain_text, prompt):
    plain = plain_text("llama", prompt)
    target = copy.deepcopy(tiny_target("llama"))
    module = OtherLinear(64, 257, bias=False)
    module.weight = target.get_output_embeddings().weight
    target.set_output_embeddings(module)
    head = echo_head(target, plain)
    assert_same_text(plain, generate(target, prompt, head))
    assert head.last_stats.tokens_per_round == head.config.block_size
