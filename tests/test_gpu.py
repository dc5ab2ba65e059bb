"""On a CUDA device: the plain text in float32, with a growing, a static and a compiled cache; attention behind a long
prefix. `pytest -m gpu`."""

import copy

import pytest
import torch
from reference import assert_same_text
from test_split_attention import tree_case
from torch.nn.functional import scaled_dot_product_attention

from hf_jetflow import JetFlowHead
from hf_jetflow.target.attention import grouped_sdpa
from hf_jetflow.target.split_attention import MIN_PREFIX, can_split


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CACHES = {
    "growing": {},
    "static": dict(cache_implementation="static", disable_compile=True),
    "compiled": dict(cache_implementation="static"),  # CUDA graphs, by transformers' own default
}


@pytest.fixture
def pair(target, random_head):
    """Target and head on the device."""
    torch.backends.cuda.matmul.allow_tf32 = False
    head = random_head(target, branch_correction="path")
    return copy.deepcopy(target).cuda(), head.cuda()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("node_budget", [8, 64, "auto"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_text_is_the_plain_one(cache, node_budget, do_sample, pair, prompt):
    target, head = pair
    head.generation_config.node_budget = node_budget

    def generate(assistant: JetFlowHead | None = None, **kwargs) -> torch.Tensor:
        torch.manual_seed(5)
        return target.generate(
            prompt.cuda(), max_new_tokens=60, do_sample=do_sample, assistant_model=assistant, **kwargs
        )

    plain = generate()
    for _ in range(2):
        assert_same_text(plain, generate(head, **CACHES[cache]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads"), [(32, 8), (8, 8)])
def test_attention_behind_a_long_prefix_is_that_of_a_masked_kernel(heads, key_heads, dtype):
    query, key, value, mask = (each.cuda() for each in tree_case(heads, key_heads, MIN_PREFIX, 64, dtype))
    masked = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    mask._jetflow_nodes = mask[..., -64:]
    assert can_split(query.reshape(1, key_heads, -1, 16), key, value, 64)
    split, _ = grouped_sdpa(torch.nn.Module(), query, key, value, mask)
    torch.testing.assert_close(split, masked.transpose(1, 2), atol=2e-2, rtol=2e-2)
