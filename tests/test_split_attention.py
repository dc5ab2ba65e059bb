"""Attention of a tree in two parts, prefix and nodes. On the CPU, by the code that a GPU runs, too."""

import math

import pytest
import torch
from conftest import make_prompt
from reference import assert_same_text
from torch.nn.functional import scaled_dot_product_attention

from hf_jetflow.head.masks import additive_mask
from hf_jetflow.target import attention, split_attention
from hf_jetflow.target.split_attention import MIN_PREFIX, can_split, split_sdpa
from hf_jetflow.trees.tree import ancestor_mask


TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def tree_case(heads: int, key_heads: int, prefix: int, nodes: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, keys, values, and the boolean mask of a random tree behind a prefix, (1, 1, nodes, prefix + nodes)."""
    generator = torch.Generator().manual_seed(prefix + nodes)
    query = torch.randn(1, nodes, heads, 16, generator=generator).transpose(1, 2)
    # As in a growing cache, the rows are part of a larger buffer.
    key, value = (torch.randn(1, key_heads, 2 * (prefix + nodes), 16, generator=generator) for _ in range(2))
    parents = [-1] + [int(torch.randint(node, (), generator=generator)) for node in range(1, nodes)]
    node_mask = ancestor_mask(torch.tensor([parents]), nodes)
    mask = torch.cat([torch.ones(1, nodes, prefix, dtype=torch.bool), node_mask], dim=-1)[:, None]
    states = (each[:, :, : prefix + nodes] for each in (query, key, value))
    return *(3 * each.to(dtype) for each in states), mask


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)], ids=["multi-head", "grouped", "multi-query"]
)
@pytest.mark.parametrize(("prefix", "nodes"), [(1, 1), (1, 9), (40, 1), (40, 2), (40, 64), (1100, 17)])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_two_parts_give_what_one_masked_kernel_gives(dtype, heads, key_heads, prefix, nodes, scaling):
    query, key, value, mask = tree_case(heads, key_heads, prefix, nodes, dtype)
    groups = heads // key_heads
    mask_dtype = torch.promote_types(dtype, torch.float32)
    node_mask = additive_mask(mask[..., prefix:], mask_dtype, unseen=-math.inf).repeat(1, 1, groups, 1)
    split = split_sdpa(query.reshape(1, key_heads, groups * nodes, 16), key, value, node_mask, scaling)
    whole = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    torch.testing.assert_close(split.reshape(whole.shape), whole, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_a_part_with_almost_all_the_weight_gives_no_nan():
    query, key, value, mask = tree_case(2, 2, 20, 5, torch.float32)
    node_mask = additive_mask(mask[..., 20:], torch.float32, unseen=-math.inf)
    for part in (slice(0, 20), slice(20, 25)):
        large = key.clone()
        large[:, :, part] *= 1000
        whole = scaled_dot_product_attention(query, large, value, attn_mask=mask)
        torch.testing.assert_close(split_sdpa(query, large, value, node_mask, None), whole, atol=1e-4, rtol=1e-4)


def test_only_a_long_prefix_is_split(monkeypatch):
    query, key, value, _ = tree_case(2, 2, 20, 5, torch.float32)
    assert not can_split(query, key, value, 5)
    for num_cached, is_split in ((20, True), (21, False)):
        monkeypatch.setattr(split_attention, "MIN_PREFIX", num_cached)
        assert can_split(query, key, value, 5) == is_split
    monkeypatch.setattr(split_attention, "MIN_PREFIX", 0)
    assert not can_split(query, key, value, 25)  # no prefix
    assert not can_split(query, key, value[..., :8], 5)  # the kernel takes one width


def test_the_kernel_of_a_gpu_returns_the_log_sum_exp_of_each_row():
    query, key = (torch.empty(1, 2, rows, 64, dtype=torch.bfloat16, device="meta") for rows in (24, 300))
    output, log_sum = split_attention._unmasked(query, key, key, 0.125)
    assert (output.shape, output.dtype) == (query.shape, torch.bfloat16)
    assert (log_sum.shape, log_sum.dtype) == ((1, 2, 24), torch.float32)


@pytest.fixture
def split_calls(monkeypatch):
    """Cached tokens at each call of `split_sdpa`."""
    known: list[int] = []

    def counted(query, key, value, node_mask, scaling):
        known.append(key.shape[2] - node_mask.shape[-1])
        return split_sdpa(query, key, value, node_mask, scaling)

    monkeypatch.setattr(attention, "split_sdpa", counted)
    return known


def generate(target, input_ids, head=None, **kwargs):
    torch.manual_seed(5)
    settings = dict(max_new_tokens=33, do_sample=False, assistant_model=head)
    return target.generate(input_ids, **{**settings, **kwargs})


LAYERS = {"llama": 5, "multi-head": 5, "gemma3_text": 2, "qwen3": 5}  # those with full attention


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("threshold", [0, 30], ids=["from the first round", "from the middle of the text"])
@pytest.mark.parametrize("family", LAYERS)
def test_the_text_is_the_plain_one(family, threshold, do_sample, tiny_target, noisy_head, split_calls, monkeypatch):
    target = tiny_target("llama", num_key_value_heads=4) if family == "multi-head" else tiny_target(family)
    prompt = make_prompt(20)
    head = noisy_head(target, generate(target, prompt))
    head.generation_config.node_budget = 16
    plain = generate(target, prompt, do_sample=do_sample)
    monkeypatch.setattr(split_attention, "MIN_PREFIX", threshold)
    assert_same_text(plain, generate(target, prompt, head, do_sample=do_sample))
    assert min(split_calls) >= threshold
    rounds = head.last_stats.num_rounds
    if threshold:
        assert 0 < len(split_calls) < LAYERS[family] * rounds
    else:
        assert len(split_calls) >= LAYERS[family] * (rounds - 1)  # a lone root needs no mask


@pytest.mark.parametrize("num_prompt", range(28, 33))
def test_the_text_is_the_plain_one_around_the_threshold(num_prompt, target, noisy_head, split_calls, monkeypatch):
    prompt = make_prompt(num_prompt)
    plain = generate(target, prompt)
    head = noisy_head(target, plain)
    monkeypatch.setattr(split_attention, "MIN_PREFIX", 30)
    assert_same_text(plain, generate(target, prompt, head))
    assert split_calls


def test_the_text_is_the_plain_one_behind_a_prompt_of_that_length(tiny_target, random_head, split_calls):
    target = tiny_target("llama", num_hidden_layers=4, max_position_embeddings=MIN_PREFIX + 100)
    prompt = make_prompt(MIN_PREFIX - 8)
    settings = dict(max_new_tokens=24, prefill_chunk_size=1024)
    plain = generate(target, prompt, **settings)
    assert_same_text(plain, generate(target, prompt, random_head(target), **settings))
    assert min(split_calls) == MIN_PREFIX


@pytest.mark.parametrize("case", ["padding", "batch", "static cache"])
def test_a_prefix_that_needs_a_mask_is_not_split(case, target, random_head, split_calls, monkeypatch):
    prompt, kwargs = make_prompt(20), {}
    if case == "padding":
        kwargs["attention_mask"] = torch.ones_like(prompt)
        kwargs["attention_mask"][:, :3] = 0
    elif case == "batch":
        prompt = torch.cat([prompt, prompt.flip(1)])
    else:
        kwargs |= dict(cache_implementation="static", disable_compile=True)
    head = random_head(target)
    plain = generate(target, prompt, **kwargs)
    monkeypatch.setattr(split_attention, "MIN_PREFIX", 0)
    assert torch.equal(plain, generate(target, prompt, head, **kwargs))
    assert not split_calls
