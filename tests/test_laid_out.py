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
import safetensors.torch
import torch
from reference import assert_same_text
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_jetflow import JetFlowHead
from hf_jetflow.decoding.draft_weights import draft_weights
from hf_jetflow.laid_out import IS_X86, LaidOutWeights, TensorFingerprint
from hf_jetflow.target.target import Target


PROMPT = torch.tensor([[5, 9, 33, 71, 9, 33]])

x86_only = pytest.mark.skipif(not IS_X86, reason="weights are laid out on x86 processors only")


class CountProducts(TorchDispatchMode):
    """Counts the products that read a laid-out weight."""

    def __init__(self):
        super().__init__()
        self.weights = []  # of these products

    @property
    def num_laid_out(self):
        return len(self.weights)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mkldnn._linear_pointwise" in str(func):
            self.weights.append(args[1])
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
    layer = nn.Linear(48, 80, bias=bias).to(dtype)
    inputs = ROWS[rows]().to(dtype)
    with torch.no_grad():
        expected = layer(inputs)
        with laid_out(layer).in_use():
            result = layer(inputs)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1.6e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_are_read_inside_in_use_only_and_by_their_own_thread(dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no kernels for bfloat16")
    layer, other = nn.Linear(48, 80).to(dtype), nn.Linear(48, 80).to(dtype)
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
    for layer in (nn.Linear(8, 8).half(), nn.Linear(8, 8).double(), nn.Linear(8, 8, device="meta")):
        with laid_out(layer).in_use(), CountProducts() as products, torch.no_grad():
            layer(torch.randn(3, 8, dtype=layer.weight.dtype, device=layer.weight.device))
        assert products.num_laid_out == 0


def test_a_processor_without_kernels_for_bfloat16_drafts_all_the_same():
    """As one with AVX2 only, which torch and oneDNN are told to take this one for."""
    lines = [
        "import torch",
        "from torch import nn",
        "from hf_jetflow.laid_out import LaidOutWeights",
        "for dtype in (torch.bfloat16, torch.float32):",
        "    layer, weights = nn.Linear(48, 80).to(dtype), LaidOutWeights()",
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
    layers, rows = (nn.Linear(48, 80), nn.Linear(80, 48)), torch.randn(3, 48)
    contexts = [laid_out(*layers).in_use(), torch.autocast("cpu", torch.bfloat16)]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for context in contexts if is_inside else contexts[::-1]:
            stack.enter_context(context)
        assert layers[1](layers[0](rows)).dtype == torch.bfloat16


def by_optimizer(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.AdamW([layer.weight]).step()


def by_fused_optimizer(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.AdamW([layer.weight], fused=True).step()


def by_data(layer):
    layer.weight.data.add_(1)


def by_one_row_of_data(layer):
    layer.weight.data[1] = 3.0


def by_one_value_of_data(layer):
    layer.weight.data[-1, -1] += 0.5


def by_swapping_rows(layer):
    layer.weight.data[[1, 40]] = layer.weight.data[[40, 1]]


def by_swapping_columns(layer):
    layer.weight.data[:, [1, 2]] = layer.weight.data[:, [2, 1]]


def by_new_data(layer):
    layer.weight.data = torch.randn_like(layer.weight)


def in_place(layer):
    layer.weight.mul_(2)


def through_numpy(layer):
    layer.weight.detach().numpy()[3] = 1


def by_load_state_dict(layer):
    layer.load_state_dict({"weight": torch.randn_like(layer.weight)})


def by_safetensors_into_a_view(layer):
    layer.weight.data[5:9].copy_(safetensors.torch.load(safetensors.torch.save({"rows": torch.ones(4, 48)}))["rows"])


def by_vector_to_parameters(layer):
    nn.utils.vector_to_parameters(torch.randn(layer.weight.numel()), [layer.weight])


def by_a_new_parameter(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


CHANGES = [
    by_optimizer,
    by_fused_optimizer,
    by_data,
    by_one_row_of_data,
    by_one_value_of_data,
    by_swapping_rows,
    by_swapping_columns,
    by_new_data,
    in_place,
    through_numpy,
    by_load_state_dict,
    by_safetensors_into_a_view,
    by_vector_to_parameters,
    by_a_new_parameter,
]


def plain_weight(num_rows):
    return torch.randn(num_rows, 48)


def transposed_weight(num_rows):
    return torch.randn(48, num_rows).T


def weight_within_a_file(num_rows):
    """A view that starts between two words of memory, as tensors of one file do."""
    return torch.randn(num_rows * 48 + 1)[1:].view(num_rows, 48)


@x86_only
@pytest.mark.parametrize("make_weight", [plain_weight, transposed_weight, weight_within_a_file])
@pytest.mark.parametrize("num_rows", [80, 1000])
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_has_changed_is_laid_out_again(change, num_rows, make_weight):
    layer = nn.Linear(48, num_rows, bias=False)
    layer.weight = nn.Parameter(make_weight(num_rows))
    weights = laid_out(layer)
    copy_before = weights._copies[layer]
    weights.refresh([layer])
    assert weights._copies[layer] is copy_before  # nothing is done twice
    with torch.set_grad_enabled("optimizer" in change.__name__):
        change(layer)
    weights.refresh([layer])
    inputs = torch.randn(3, 48)
    with torch.no_grad(), weights.in_use():
        torch.testing.assert_close(layer(inputs), inputs @ layer.weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("size", [1, 7, 4093, 50_001])
def test_a_fingerprint_sees_every_single_value(size, dtype):
    tensor = torch.randint(2, (size,)).to(dtype)
    fingerprint = TensorFingerprint.of(tensor)
    assert fingerprint.matches(tensor)
    assert not fingerprint.matches(tensor.clone())  # another address: a view of the old one would go stale
    for index in {0, size // 2, size - 1}:
        tensor[index] = 1 - tensor[index].int()
        assert not fingerprint.matches(tensor)
        tensor[index] = 1 - tensor[index].int()
        assert fingerprint.matches(tensor)


def test_a_fingerprint_matches_a_tensor_of_nan():
    tensor = torch.full((9000,), torch.nan)
    assert TensorFingerprint.of(tensor).matches(tensor)


@x86_only
def test_weights_changed_makes_everything_again(random_head):
    from conftest import build_target

    target = copy.deepcopy(build_target("llama"))
    head = random_head(target, draft_vocab_size=200)
    view = Target(target, head.config)
    weights = draft_weights(head, view)
    projection, copies = weights.projection, weights._laid_out._copies
    assert draft_weights(head, view).projection is projection
    head.weights_changed()
    again = draft_weights(head, view)
    assert again.projection is not projection
    assert again._laid_out._copies[head.fc] is not copies[head.fc]


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
        num_layers = sum(isinstance(module, nn.Linear) for module in head.modules())
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


def test_nothing_is_retained_of_a_head_or_target_that_is_gone(random_head):
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
