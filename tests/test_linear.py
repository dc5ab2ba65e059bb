"""Weights laid out for the processor's kernels: the same products, and never those of weights that have changed."""

import contextlib
import copy
import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from reference import assert_same_text
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_jetflow import JetFlowHead
from hf_jetflow.decoding.draft_weights import draft_weights
from hf_jetflow.head.linear import IS_X86, DraftLinear, LaidOutWeights
from hf_jetflow.target.target import Target


PROMPT = torch.tensor([[5, 9, 33, 71, 9, 33]])

x86_only = pytest.mark.skipif(not IS_X86, reason="weights are laid out on x86 processors only")


class CountProducts(TorchDispatchMode):
    """Counts the products that read a weight laid out."""

    num_laid_out = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_laid_out += "mkldnn._linear_pointwise" in str(func)
        return func(*args, **(kwargs or {}))


def laid_out(*layers):
    weights = LaidOutWeights()
    weights.refresh(layers)
    return weights


def assert_used(layer, weights, is_used):
    with CountProducts() as products, torch.no_grad(), weights.in_use():
        layer(torch.randn(3, layer.in_features, dtype=layer.weight.dtype))
    assert products.num_laid_out == (is_used and IS_X86)


ROWS = {
    "rows": lambda: torch.randn(7, 48),
    "a batch": lambda: torch.randn(3, 5, 48),
    "part of wider rows": lambda: torch.randn(2, 5, 96)[..., :48],
    "transposed": lambda: torch.randn(2, 48, 5).transpose(1, 2),
    "no rows": lambda: torch.randn(2, 0, 48),
    "many rows": lambda: torch.randn(300, 48),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_the_products_are_the_same(rows, bias, dtype):
    layer = DraftLinear(48, 80, bias=bias).to(dtype)
    inputs = ROWS[rows]().to(dtype)
    with torch.no_grad():
        expected = layer(inputs)
        with laid_out(layer).in_use():
            result = layer(inputs)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1.6e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_are_read_inside_in_use_only_and_by_their_own_thread(dtype):
    layer, other = DraftLinear(48, 80).to(dtype), DraftLinear(48, 80).to(dtype)
    weights = laid_out(layer)
    assert_used(layer, weights, True)
    assert_used(other, weights, False)
    with weights.in_use():
        thread = threading.Thread(target=assert_used, args=(layer, LaidOutWeights(), False))
        thread.start()
        thread.join()
        with LaidOutWeights().in_use():  # one inside the other
            pass
        with CountProducts() as products, torch.no_grad():
            layer(torch.randn(3, 48, dtype=dtype))
    assert products.num_laid_out == IS_X86
    with CountProducts() as products:
        layer(torch.randn(3, 48, dtype=dtype))
    assert products.num_laid_out == 0


def test_weights_of_other_types_and_places_are_left_to_torch():
    for layer in (DraftLinear(8, 8).half(), DraftLinear(8, 8).double(), DraftLinear(8, 8, device="meta")):
        with laid_out(layer).in_use(), CountProducts() as products, torch.no_grad():
            layer(torch.randn(3, 8, dtype=layer.weight.dtype, device=layer.weight.device))
        assert products.num_laid_out == 0


def test_a_processor_without_kernels_for_bfloat16_drafts_all_the_same():
    """As one with AVX2 only, which torch and oneDNN are told to take this one for."""
    lines = [
        "import torch",
        "from hf_jetflow.head.linear import DraftLinear, LaidOutWeights",
        "for dtype in (torch.bfloat16, torch.float32):",
        "    layer, weights = DraftLinear(48, 80).to(dtype), LaidOutWeights()",
        "    weights.refresh([layer])",
        "    rows = torch.randn(3, 48, dtype=dtype)",
        "    with torch.no_grad(), weights.in_use():",
        "        torch.testing.assert_close(layer(rows), torch.nn.functional.linear(rows, layer.weight, layer.bias))",
    ]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, check=True)


@pytest.mark.parametrize("is_inside", [True, False], ids=["begun inside", "begun outside"])
def test_under_autocast_torch_chooses_the_types(is_inside):
    """It begins inside where a trainer has wrapped the head's forward."""
    layers, rows = (DraftLinear(48, 80), DraftLinear(80, 48)), torch.randn(3, 48)
    contexts = [laid_out(*layers).in_use(), torch.autocast("cpu", torch.bfloat16)]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for context in contexts if is_inside else contexts[::-1]:
            stack.enter_context(context)
        assert layers[1](layers[0](rows)).dtype == torch.bfloat16


def by_optimizer(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.AdamW([layer.weight]).step()


def behind_torchs_back(layer):
    layer.weight.data.add_(1)


def by_load_state_dict(layer):
    layer.load_state_dict({"weight": torch.randn(80, 48)})


def by_a_new_parameter(layer):
    layer.weight = nn.Parameter(torch.randn(80, 48))


@pytest.mark.parametrize("change", [by_optimizer, behind_torchs_back, by_load_state_dict, by_a_new_parameter])
def test_a_weight_that_has_changed_is_laid_out_again(change):
    layer = DraftLinear(48, 80, bias=False)
    weights = laid_out(layer)
    kept = weights._kept.copy()
    weights.refresh([layer])
    assert weights._kept == kept  # nothing is done twice
    change(layer)
    weights.refresh([layer])
    inputs = torch.randn(3, 48)
    with torch.no_grad(), weights.in_use():
        torch.testing.assert_close(layer(inputs), inputs @ layer.weight.T)


@x86_only
def test_generate_drafts_with_them_and_a_trained_head_with_new_ones(tiny_target, random_head):
    target = tiny_target("llama")
    head = random_head(target, branch_correction="path", draft_vocab_size=200)
    settings = dict(attention_mask=torch.ones_like(PROMPT), max_new_tokens=24, do_sample=False)
    plain = target.generate(PROMPT, **settings)
    for _ in range(2):
        with CountProducts() as products:
            text = target.generate(PROMPT, assistant_model=head, **settings)
        assert_same_text(text, plain)
        num_layers = sum(isinstance(module, DraftLinear) for module in head.modules())
        assert products.num_laid_out >= num_layers
        with torch.no_grad():  # as if trained in between
            for parameter in head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


@x86_only
def test_the_projection_follows_the_targets_output_embedding_and_the_draft_vocabulary(random_head):
    from conftest import build_target

    target = copy.deepcopy(build_target("llama"))
    head = random_head(target, draft_vocab_size=200)
    view, rows = Target(target, head.config), torch.randn(4, 64)

    def assert_current():
        weights = draft_weights(head, view)
        with torch.no_grad(), weights.in_use():
            expected = rows @ target.get_output_embeddings().weight[head.d2t].T
            torch.testing.assert_close(weights.projection(rows), expected)
        return weights.projection

    first = assert_current()
    assert assert_current() is first
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(2)
    second = assert_current()
    assert second is not first
    head.d2t.add_(57)
    assert assert_current() is not second


def test_nothing_is_kept_of_a_head_or_target_that_is_gone(random_head):
    from conftest import build_target

    target = copy.deepcopy(build_target("llama"))
    head = random_head(target, draft_vocab_size=200)
    weights = weakref.ref(draft_weights(head, Target(target, head.config)))
    alive = weakref.ref(head)
    assert weights() is not None
    del head
    gc.collect()
    assert alive() is None
    assert weights() is None


def test_a_head_that_has_drafted_is_copied_and_saved(tiny_target, random_head, tmp_path):
    target = tiny_target("llama")
    head = random_head(target, branch_correction="path")
    target.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=12, assistant_model=head)
    twin = copy.deepcopy(head)
    head.save_pretrained(tmp_path)
    loaded = JetFlowHead.from_pretrained(tmp_path)
    for name, tensor in head.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor)
        assert torch.equal(loaded.state_dict()[name], tensor)
