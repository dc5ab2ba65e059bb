"""SDPA that repeats no keys and values, against transformers' own function."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_jetflow.target import attention
from hf_jetflow.target.attention import NAME, grouped_attention, grouped_sdpa


def states(heads: int, key_heads: int, rows: int = 5, keys: int = 12, batch: int = 1, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, rows, heads, 8, generator=generator).transpose(1, 2)
    key, value = (torch.randn(batch, key_heads, 2 * keys, 8, generator=generator)[:, :, :keys] for _ in range(2))
    mask = torch.rand(batch, 1, rows, keys, generator=generator) < 0.6
    mask[..., 0] = True
    return query, key, value, mask


def both(heads: int, key_heads: int, query, key, value, mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    return tuple(f(module, query, key, value, mask, **kwargs)[0] for f in (grouped_sdpa, sdpa_attention_forward))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("heads", "key_heads"), [(6, 6), (6, 2), (4, 1)], ids=["multi-head", "grouped", "multi-query"]
)
@pytest.mark.parametrize("is_bool", [True, False], ids=["boolean mask", "added mask"])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_the_result_is_that_of_transformers(batch, heads, key_heads, is_bool, scaling):
    query, key, value, mask = states(heads, key_heads, batch=batch)
    if not is_bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    mine, theirs = both(heads, key_heads, query, key, value, mask, scaling=scaling)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", ["no mask", "a mask per head", "one row"])
def test_other_calls_go_to_transformers(monkeypatch, case):
    query, key, value, mask = states(6, 2, rows=1 if case == "one row" else 5)
    mask = {"no mask": None, "a mask per head": mask.expand(-1, 6, -1, -1)}.get(case, mask)
    called = []

    def theirs_called(*args, **kwargs):
        called.append(case)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", theirs_called)
    mine, theirs = both(6, 2, query, key, value, mask)
    assert torch.equal(mine, theirs)
    assert called == [case]


def test_a_mask_is_repeated_once_for_all_layers():
    query, key, value, mask = states(6, 2)
    both(6, 2, query, key, value, mask)
    first = mask._jetflow_repeated[1]
    both(6, 2, query, key, value, mask)
    assert mask._jetflow_repeated[1] is first
    mine, theirs = both(6, 1, query, key[:, :1], value[:, :1], mask)  # a layer with other groups
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def stop_inside(target) -> None:
    config = target.config
    with grouped_attention(target):
        assert config._attn_implementation == NAME
        with grouped_attention(target):  # another thread's verify
            assert config._attn_implementation == NAME
        assert config._attn_implementation == NAME
        raise RuntimeError("stop")


def test_the_target_attends_so_inside_only_and_also_after_an_error(tiny_target):
    target = tiny_target("llama")
    with pytest.raises(RuntimeError, match="stop"):
        stop_inside(target)
    assert target.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_forward_inside_is_that_outside_with_and_without_a_mask(tiny_target):
    model = tiny_target("llama")
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    tree_mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    for mask in (None, padding, tree_mask):
        outside = model(ids, attention_mask=mask).logits
        with grouped_attention(model):
            inside = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(inside, outside, atol=1e-5, rtol=1e-5)


def test_other_attention_is_left_alone(tiny_target, monkeypatch):
    target = tiny_target("llama")
    monkeypatch.setattr(target.config, "_attn_implementation", "eager")
    with grouped_attention(target):
        assert target.config._attn_implementation == "eager"


def test_models_that_compare_the_name_themselves_are_left_alone():
    target = AutoModelForCausalLM.from_config(FalconConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4))
    assert target.config._attn_implementation == "sdpa"
    with grouped_attention(target):
        assert target.config._attn_implementation == "sdpa"
