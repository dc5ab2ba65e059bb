"""Targets whose rounds read laid-out weights: the same text, never stale weights, and nothing left behind."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from conftest import build_target
from reference import assert_same_text
from test_laid_out import CountProducts, x86_only
from torch import nn

from hf_jetflow.decoding.session import MIN_LAID_OUT
from hf_jetflow.errors import JetFlowError
from hf_jetflow.laid_out import IS_X86
from hf_jetflow.target import laid_out
from hf_jetflow.target.laid_out import laid_out_target


PROMPT = torch.tensor([[5, 9, 33, 71, 9, 33]])
CALL = dict(attention_mask=torch.ones_like(PROMPT), max_new_tokens=24, do_sample=False)


@pytest.fixture
def pair(random_head):
    """A target of its own, and a head whose own layers are no linear layers of the target."""
    target = copy.deepcopy(build_target("llama"))
    head = random_head(target)
    head.generation_config.node_budget = 8
    return target, head


def linear_layers(target):
    return [module for module in target.modules() if type(module) is nn.Linear]


def read_copies(target, head, **call):
    """The text, and how often a linear layer of the target read a laid-out copy in a round, on average."""
    copies = {id(weight) for weight in laid_out_copies(target)}
    with CountProducts() as products:
        text = target.generate(PROMPT, assistant_model=head, **{**CALL, **call})
    copies |= {id(weight) for weight in laid_out_copies(target)}
    return text, sum(id(weight) in copies for weight in products.weights) / head.last_stats.num_rounds


def laid_out_copies(target):
    return laid_out._STORED[target][1]._copies.values() if target in laid_out._STORED else []


@x86_only
@pytest.mark.parametrize("budget", [1, 8, "auto"])
def test_every_round_reads_copies_of_all_linear_layers(pair, budget):
    target, head = pair
    plain = target.generate(PROMPT, **CALL)
    head.generation_config.node_budget = budget
    text, num_read = read_copies(target, head)
    assert_same_text(text, plain)
    assert num_read == len(linear_layers(target))
    assert not [layer for layer in linear_layers(target) if "forward" in vars(layer)]


@x86_only
def test_who_wants_no_copies_has_none(pair, monkeypatch):
    target, head = pair
    for wish, is_large, is_made in [
        (None, False, True), (False, False, False), (None, True, False), (True, True, True), (False, True, False)
    ]:  # fmt: skip
        monkeypatch.setattr(laid_out, "MAX_UNASKED_BYTES", 1000 if is_large else 2**31)
        head.generation_config.lay_out_target = wish
        assert (read_copies(target, head)[1] > 0) == is_made, (wish, is_large)
        assert (target in laid_out._STORED) == is_made


@x86_only
def test_a_text_that_can_grow_little_makes_none(pair):
    target, head = pair
    assert read_copies(target, head, max_new_tokens=MIN_LAID_OUT)[1] == 0  # the prefill yields the first one
    assert read_copies(target, head, max_new_tokens=MIN_LAID_OUT + 1)[1] > 0


def test_a_wish_that_is_none_is_refused(pair):
    target, head = pair
    head.generation_config.lay_out_target = "always"
    with pytest.raises(JetFlowError, match="`lay_out_target` is 'always', but must be True, False or None"):
        target.generate(PROMPT, assistant_model=head, **CALL)
    del head.generation_config.lay_out_target
    head.generation_config.layout_target = True
    with pytest.raises(JetFlowError, match="did you mean `lay_out_target`"):
        target.generate(PROMPT, assistant_model=head, **CALL)


@pytest.mark.parametrize("change", ["data", "in place", "a new parameter", "a new layer"])
def test_a_target_that_has_changed_writes_its_new_text(pair, change):
    target, head = pair
    before = target.generate(PROMPT, assistant_model=head, **CALL)
    layer = target.model.layers[0].mlp
    with torch.no_grad():
        if change == "data":
            layer.down_proj.weight.data.mul_(-40)
        elif change == "in place":
            layer.down_proj.weight.mul_(-40)
        elif change == "a new parameter":
            layer.down_proj.weight = nn.Parameter(layer.down_proj.weight * -40)
        else:
            new = copy.deepcopy(layer.down_proj)
            new.weight.mul_(-40)
            layer.down_proj = new
    plain = target.generate(PROMPT, **CALL)
    assert not torch.equal(plain, before), "the change must show in the text"
    assert_same_text(target.generate(PROMPT, assistant_model=head, **CALL), plain)


@x86_only
def test_copies_last_until_weights_are_said_to_have_changed(pair):
    target, head = pair
    target.generate(PROMPT, assistant_model=head, **CALL)
    first = laid_out._STORED[target][1]
    target.generate(PROMPT, assistant_model=head, **CALL)
    assert laid_out._STORED[target][1] is first
    head.weights_changed()
    target.generate(PROMPT, assistant_model=head, **CALL)
    assert laid_out._STORED[target][1] is not first


def test_an_error_in_a_round_leaves_no_layer_behind(pair, monkeypatch):
    target, head = pair

    def fail(*_args):
        assert not IS_X86 or "forward" in vars(target.lm_head)
        raise RuntimeError("in the target")

    target.model.layers[2].mlp.act_fn.register_forward_hook(lambda *_: fail() if len(rounds) else None)
    rounds = []
    head.round_observers.append(rounds.append)
    with pytest.raises(RuntimeError, match="in the target"):
        target.generate(PROMPT, assistant_model=head, **CALL)
    assert not [layer for layer in linear_layers(target) if "forward" in vars(layer)]


@x86_only
def test_layers_with_a_forward_of_their_own_are_left_alone(pair):
    """As those are whose weights accelerate brings in, and those of other libraries' subclasses."""
    target, head = pair

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    hooked, layer = target.model.layers[1].mlp.up_proj, target.model.layers[3].mlp
    hooked.forward = own = lambda input: 3 * nn.Linear.forward(hooked, input)
    doubled = Doubled(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    doubled.weight, layer.up_proj = layer.up_proj.weight, doubled
    plain = target.generate(PROMPT, **CALL)
    text, num_read = read_copies(target, head)
    assert_same_text(text, plain)
    assert num_read == len(linear_layers(target)) - 1  # `Doubled` is none of these
    assert hooked.forward is own


def test_a_layer_that_the_user_has_compiled_stays_right(pair):
    target, head = pair
    target.model.layers[1].compile(backend="eager")
    plain = target.generate(PROMPT, **CALL)
    assert_same_text(target.generate(PROMPT, assistant_model=head, **CALL), plain)


def test_a_layer_can_be_compiled_while_its_copy_is_in_use(pair):
    layer = pair[0].lm_head
    rows, compiled = torch.randn(2, layer.in_features), torch.compile(layer, backend="eager", fullgraph=True)
    with laid_out_target(pair[0], None).in_use(), torch.no_grad():
        torch.testing.assert_close(compiled(rows), rows @ layer.weight.T)


@x86_only
def test_another_thread_reads_the_layers_own_weights(pair):
    target, _ = pair
    layer, rows, seen = target.lm_head, torch.randn(2, target.lm_head.in_features), []

    def product():
        with CountProducts() as products, torch.no_grad():
            layer(rows)
        seen.append(products.num_laid_out)

    with laid_out_target(target, None).in_use():
        product()
        thread = threading.Thread(target=product)
        thread.start()
        thread.join()
    assert seen == [1, 0]


@x86_only
def test_bfloat16_products_are_equal_to_the_last_bit(pair):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no kernels for bfloat16")
    target, _ = pair
    target.bfloat16()
    for num_rows in (1, 2, 8, 33):
        ids = torch.randint(3, 250, (1, num_rows))
        with torch.no_grad():
            expected = target(ids).logits
            with laid_out_target(target, None).in_use():
                assert torch.equal(target(ids).logits, expected)


@x86_only
def test_copies_go_with_their_target(random_head):
    target = copy.deepcopy(build_target("llama"))
    target.generate(PROMPT, assistant_model=random_head(target), **CALL)
    weights = weakref.ref(laid_out._STORED[target][1])
    assert weights() is not None
    del target
    gc.collect()
    assert weights() is None
