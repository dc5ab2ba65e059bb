"""Heads that compute NaN or infinity: their drafts are lost, the text stays plain decoding's."""

import math
from pathlib import Path

import pytest
import torch
from conftest import make_prompt
from reference import assert_same_text

from hf_jetflow import JetFlowHead
from hf_jetflow.trees.tree import Candidates, build_tree


SHIPPED = Path(__file__).resolve().parents[1] / "examples" / "heads" / "smollm2-135m-instruct"
CALLS = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True, temperature=0.8),
    "static cache": dict(do_sample=False, cache_implementation="static"),
}


def full_of(value):
    def spoil(head):
        for parameter in head.parameters():
            parameter.fill_(value)

    return spoil


def infinite_in_one_layer(head):
    head.layers[1].mlp.down_proj.weight.fill_(math.inf)


def nan_from_the_fourth_position_on(head):
    forward = head.forward

    def late(position_ids, **inputs):
        rows = forward(position_ids=position_ids, **inputs)
        return rows.masked_fill((position_ids > position_ids[:, :1] + 3)[..., None], math.nan)

    head.forward = late


def nan_in_the_branch_correction(head):
    head.branch_correction.down_proj.weight.fill_(math.nan)


def infinite_in_the_branch_correction(head):
    head.branch_correction.down_proj.weight[::2] = math.inf


def overflow_of_float16(head):
    head.layers[0].mlp.down_proj.weight.mul_(1e6)
    head.half()


SPOILERS = {
    "NaN everywhere": full_of(math.nan),
    "infinity everywhere": full_of(math.inf),
    "infinity in one layer": infinite_in_one_layer,
    "NaN at depth 4": nan_from_the_fourth_position_on,
    "NaN in the correction": nan_in_the_branch_correction,
    "infinity in the correction": infinite_in_the_branch_correction,
    "overflow of float16": overflow_of_float16,
}


@pytest.fixture
def spoiled_head(random_head):
    def build(name, target, **config):
        head = random_head(target, branch_correction="path", **config)
        with torch.no_grad():
            SPOILERS[name](head)
        return head

    return build


def text(target, ids, head=None, **settings):
    torch.manual_seed(7)
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=16, **settings)
    return target.generate(ids, assistant_model=head, **settings)


@pytest.mark.parametrize(("call", "num_sequences"), [*((call, 1) for call in CALLS), ("greedy", 3), ("sampled", 3)])
@pytest.mark.parametrize("name", SPOILERS)
def test_the_text_is_plain_decoding_s(name, call, num_sequences, tiny_target, spoiled_head):
    target, head = tiny_target("llama"), spoiled_head(name, tiny_target("llama"))
    ids = make_prompt(12 * num_sequences).view(num_sequences, 12)
    plain = text(target, ids, **CALLS[call])
    for node_budget in ("auto", 16):
        head.generation_config.node_budget = node_budget
        drafted = text(target, ids, head, **CALLS[call])
        for row in range(num_sequences):
            assert_same_text(plain[row : row + 1], drafted[row : row + 1])


@pytest.mark.parametrize(
    "config", [dict(ngram_weights=[]), dict(draft_vocab_size=200), dict(is_causal=False)], ids=str
)
@pytest.mark.parametrize("name", ["NaN everywhere", "infinity in one layer"])
def test_heads_of_other_kinds_are_no_different(name, config, tiny_target, spoiled_head, prompt):
    target = tiny_target("llama")
    head = spoiled_head(name, target, **config)
    assert_same_text(text(target, prompt, do_sample=False), text(target, prompt, head, do_sample=False))


def test_a_spoiled_correction_leaves_the_drafts_of_the_block(tiny_target, noisy_head, prompt):
    target = tiny_target("llama")
    continuation = text(target, prompt, do_sample=False)
    head = noisy_head(target, continuation, branch_correction="path", ngram_weights=[])
    text(target, prompt, head, do_sample=False)
    before = head.last_stats.tokens_per_round
    with torch.no_grad():
        nan_in_the_branch_correction(head)
    text(target, prompt, head, do_sample=False)
    assert head.last_stats.tokens_per_round == before > 1


def test_it_is_said_once(tiny_target, spoiled_head, prompt, monkeypatch):
    from hf_jetflow.decoding import ranking

    said = []
    monkeypatch.setattr(ranking.logger, "warning_once", said.append)
    target = tiny_target("llama")
    text(target, prompt, spoiled_head("NaN everywhere", target), do_sample=False)
    assert len(said) == 1
    assert "NaN" in said[0]
    assert "bfloat16 or float32" in said[0]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("has_scorer", [False, True])
@pytest.mark.parametrize("num_finite", [0, 1])
def test_a_tree_over_scores_that_are_not_finite_is_a_tree(num_finite, has_scorer, value):
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(2, 5, 6, generator=generator).log_softmax(-1).sort(descending=True).values
    logprobs[:, num_finite:] = value
    candidates = Candidates(torch.randint(50, (2, 5, 6), generator=generator), logprobs)

    def scorer(depth, parents, tokens):
        return logprobs[..., depth, :].unsqueeze(-2).expand(*tokens.shape, -1)

    tree = build_tree(torch.tensor([[1], [2]]), candidates, 16, scorer if has_scorer else None)
    assert not tree.logprobs.isnan().any()
    for parents, depths in zip(tree.parents.tolist(), tree.depths.tolist(), strict=True):
        assert parents[0] == -1
        assert all(0 <= parent < node for node, parent in enumerate(parents[1:], start=1))
        assert all(depths[node] == depths[parent] + 1 for node, parent in enumerate(parents[1:], start=1))


def fused(head, features):
    with torch.no_grad():
        return head._fuse(features.to(head.dtype)).float()


@pytest.mark.parametrize("largest", [1.0, 3e3, 6e4])
def test_taps_of_any_size_fuse_in_float16(largest, tiny_target, random_head):
    head = random_head(tiny_target("llama"))
    with torch.no_grad():
        head.fc.weight.mul_(10)
    features = torch.randn(1, 9, head.fc.in_features)
    features[..., ::7] = largest
    features[:, 4] = 0
    exact = fused(head, features)
    half = fused(head.half(), features)
    assert half.isfinite().all()
    torch.testing.assert_close(half, exact, atol=5e-3, rtol=5e-3)


def test_the_shipped_head_fuses_massive_taps_in_float16():
    """A few channels of SmolLM2's residual stream are thousands of times larger than the others."""
    exact, half = (JetFlowHead.from_pretrained(SHIPPED, dtype=dtype) for dtype in (torch.float32, torch.float16))
    features = torch.randn(1, 6, exact.fc.in_features)
    features[..., torch.randint(exact.fc.in_features, (8,))] = 2e4
    torch.testing.assert_close(fused(half, features), fused(exact, features), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_fuse_as_they_are(dtype, tiny_target, random_head):
    head = random_head(tiny_target("llama")).to(dtype)
    features = torch.randn(1, 9, head.fc.in_features, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(head._fuse(features), head.hidden_norm(head.fc(features)))
