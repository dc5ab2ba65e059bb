"""On a CUDA device: the plain text in float32, with a growing, a static and a compiled cache. `pytest -m gpu`."""

import copy

import pytest
import torch
from reference import assert_same_text

from hf_jetflow import JetFlowHead


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
