"""Drafted tokens stay in front of the borders where tables of positions end or rotary frequencies change."""

import copy

import pytest
import torch
from reference import assert_same_text
from transformers import AutoConfig, AutoModelForCausalLM

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.target.position_limits import PositionLimits, position_limits


BORDER = 40
SIZES = dict(
    vocab_size=257, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0, bos_token_id=1
)
FACTORS = dict(short_factor=[1.0] * 8, long_factor=[4.0] * 8, original_max_position_embeddings=BORDER)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, factor=4.0, **FACTORS)
TARGETS = {
    "dynamic": ("llama", dict(max_position_embeddings=BORDER, rope=dict(rope_type="dynamic", factor=2.0))),
    "longrope": ("llama", dict(max_position_embeddings=4 * BORDER, rope=LONGROPE)),
    "phi3": ("phi3", dict(max_position_embeddings=4 * BORDER, original_max_position_embeddings=BORDER, rope=LONGROPE)),
}
TABLES = {
    "opt": dict(ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=BORDER),
    "gpt_neo": dict(max_position_embeddings=BORDER, attention_types=[[["global", "local"], 2]], num_heads=4),
    "gpt2": dict(n_positions=BORDER),
    "gptj": dict(n_positions=BORDER, rotary_dim=8),
}


def make_pair(family, own):
    """A target with sharp scores, so that other frequencies mean another text, and a head that drafts at random."""
    own = dict(own)
    if (rope := own.pop("rope", None)) is not None:
        own |= dict(rope_parameters=dict(rope_theta=1e4) | rope, intermediate_size=96, num_key_value_heads=2)
    torch.manual_seed(1)
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **own)).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    config = JetFlowConfig.for_target(target.config, num_hidden_layers=1, block_size=8, mask_token_id=0)
    return target, JetFlowHead(config).eval()


def both_texts(target, head, ids, **settings):
    """The plain text and the drafted one; of copies, as some layers remember the longest text that they have seen."""
    texts = []
    for assistant in ({}, {"assistant_model": head}):
        torch.manual_seed(3)
        texts.append(
            copy.deepcopy(target).generate(ids, eos_token_id=None, **{"do_sample": False} | settings | assistant)
        )
    return texts


def prompt(length, batch=1):
    return torch.randint(3, 257, (batch, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("node_budget", [4, 32, "auto"])
@pytest.mark.parametrize("length", [30, BORDER - 1, BORDER, BORDER + 1, BORDER + 10])
@pytest.mark.parametrize("name", TARGETS)
def test_frequencies_change_where_plain_decoding_changes_them(name, length, node_budget, do_sample):
    target, head = make_pair(*TARGETS[name])
    head.generation_config.node_budget = node_budget
    assert_same_text(*both_texts(target, head, prompt(length), max_new_tokens=24, do_sample=do_sample))


@pytest.mark.parametrize(("name", "is_drafted"), [("dynamic", True), ("longrope", True), ("phi3", False)])
def test_a_text_that_crosses_the_border_is_drafted_on_its_near_side(name, is_drafted):
    target, head = make_pair(*TARGETS[name])
    both_texts(target, head, prompt(20), max_new_tokens=40)
    assert (head.last_stats.num_drafted > 0) == is_drafted
    both_texts(target, head, prompt(20), max_new_tokens=BORDER - 20)
    assert head.last_stats.num_drafted > 0


def test_beyond_the_border_of_longrope_drafting_goes_on():
    target, head = make_pair(*TARGETS["phi3"])
    both_texts(target, head, prompt(BORDER + 5), max_new_tokens=20)
    assert head.last_stats.num_drafted > 0


@pytest.mark.parametrize("max_new_tokens", [10, 24], ids=["before the border", "across"])
@pytest.mark.parametrize("name", TARGETS)
def test_a_padded_batch_is_that_of_plain_decoding(name, max_new_tokens):
    target, head = make_pair(*TARGETS[name])
    mask = torch.ones(3, 28, dtype=torch.long)
    mask[0, :9] = 0
    settings = dict(attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=0)
    assert_same_text(*both_texts(target, head, prompt(28, 3), **settings))
    assert (head.last_stats.num_drafted > 0) == (max_new_tokens == 10)


@pytest.mark.parametrize("width", [None, 1], ids=["trees", "chains"])
@pytest.mark.parametrize("family", TABLES)
def test_no_drafted_token_is_looked_up_behind_a_table(family, width):
    target, head = make_pair(family, TABLES[family])
    head.generation_config.width = width

    def ends_with_the_table(ids, scores, **_):
        return torch.full((len(ids),), ids.shape[1] >= BORDER)

    settings = dict(max_new_tokens=100, stopping_criteria=[ends_with_the_table])
    plain, drafted = both_texts(target, head, prompt(30), **settings)
    assert plain.shape[1] == BORDER
    assert_same_text(plain, drafted)
    assert head.last_stats.num_drafted > 0


def test_the_depth_ends_at_the_border():
    limits = PositionLimits(end=39)
    assert [limits.max_depth(anchor) for anchor in (0, 30, 38, 39, 50)] == [39, 9, 1, 0, 0]
    limits = PositionLimits(switch=40)
    assert [limits.max_depth(anchor) for anchor in (30, 39, 40, 50)] == [9, 0, None, None]
    assert PositionLimits().max_depth(5) is None


def test_ordinary_targets_have_no_borders(tiny_target):
    assert position_limits(tiny_target("llama")) == PositionLimits()
