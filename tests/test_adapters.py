"""Batches whose sequences have adapters of their own, as peft's `adapter_names` gives them."""

from functools import partial

import pytest
import torch
from test_batch import PAD, prompts, small_head, small_target
from torch import nn

from hf_jetflow.target.adapters import AdapterNames


NAMES = ["a", "b", "__base__", "a", "b"]


class NamedShift(nn.Module):
    """Stands for peft's layers: shifts each sequence's rows by its adapter; refuses lists of another length."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(7)
        self.shifts = {name: torch.randn(layer.out_features, generator=generator) for name in ("a", "b")}

    def forward(self, states, adapter_names=None):
        output = self.layer(states)
        if adapter_names is None:
            return output
        if len(adapter_names) != len(states):
            raise ValueError("length of `adapter_names` should be the same as the number of inputs")
        zero = torch.zeros(output.shape[-1])
        return output + torch.stack([self.shifts.get(name, zero) for name in adapter_names])[:, None]


def add_names(module, args, kwargs, adapter_names):
    return args, kwargs | {"adapter_names": adapter_names}


@pytest.fixture
def target():
    """A target whose query projections take names by hooks, as inside peft's `generate`."""
    model, projections = small_target("llama"), []
    for layer in model.model.layers:
        projections.append(layer.self_attn.q_proj)
        layer.self_attn.q_proj = named = NamedShift(projections[-1])
        named.register_forward_pre_hook(partial(add_names, adapter_names=NAMES), with_kwargs=True)
    yield model
    for layer, projection in zip(model.model.layers, projections, strict=True):
        layer.self_attn.q_proj = projection


@pytest.mark.parametrize("is_returned", [False, True], ids=["text", "cache"])
@pytest.mark.parametrize("eos", [[4], [4, 5, 6, 7], list(range(3, 20))], ids=["rare", "some", "many"])
def test_a_sequence_that_leaves_the_batch_takes_the_name_of_its_adapter_along(eos, is_returned, target):
    settings = dict(eos_token_id=eos, pad_token_id=PAD, max_new_tokens=40, do_sample=False)
    settings |= dict(return_dict_in_generate=True)
    plain = target.generate(**prompts(), **settings)
    for hook in (h for m in target.modules() for h in m._forward_pre_hooks.values()):
        assert hook.keywords["adapter_names"] is NAMES
    if not is_returned:
        settings["return_dict_in_generate"] = False
    drafted = target.generate(**prompts(), assistant_model=small_head(), **settings)
    assert (drafted.sequences if is_returned else drafted).tolist() == plain.sequences.tolist()
    assert small_head().last_stats.num_accepted > 0
    if is_returned:  # the sequences that had ended were read to the end, each with its own adapter
        for expected, got in zip(plain.past_key_values.layers, drafted.past_key_values.layers, strict=True):
            torch.testing.assert_close(got.values, expected.values, atol=1e-3, rtol=1e-3)
    assert NAMES == ["a", "b", "__base__", "a", "b"], "the caller's own list"


def test_models_without_names_are_left_alone():
    AdapterNames(small_target("llama")).select([1, 0])
