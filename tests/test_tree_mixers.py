"""Rules of recurrent layers over a tree, node by node against a step from the parent's state."""

import pytest
import torch
from torch.nn.functional import conv1d, normalize
from transformers.models.bamba.modeling_bamba import mamba2_selective_state_update
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from hf_jetflow.target import tree_mixers
from hf_jetflow.target.tree_mixers import (
    gated_delta_rule,
    path_windows,
    state_space_rule,
    tree_convolution,
    windows_of,
)
from hf_jetflow.trees.tree import ancestor_mask


BATCH, GROUPS, HEADS, KEY_DIM, VALUE_DIM = 2, 2, 3, 8, 6
RULES = ["delta", "delta by channel", "state space"]


def random_parents(num_nodes: int, reach: int = 8) -> torch.Tensor:
    """Parents (batch, nodes) of another tree for each sequence; a reach of 1 makes chains."""
    rows = [[-1] + [int(torch.randint(max(0, i - reach), i, ())) for i in range(1, num_nodes)] for _ in range(BATCH)]
    return torch.tensor(rows)


def inputs_of(rule: str, num_nodes: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    def normal(*shape):
        return torch.randn(BATCH, GROUPS, *shape, dtype=dtype)

    channels = KEY_DIM if rule == "delta by channel" else 1
    inputs = dict(
        queries=normal(1, num_nodes, KEY_DIM) / KEY_DIM,
        keys=normalize(normal(1, num_nodes, KEY_DIM), dim=-1),
        log_decays=-normal(HEADS, num_nodes, channels).abs(),
        state=normal(HEADS, KEY_DIM, VALUE_DIM),
    )
    values = normal(HEADS, num_nodes, VALUE_DIM)
    if rule == "state space":
        return inputs | dict(updates=values)
    return inputs | dict(values=values, betas=torch.rand(BATCH, GROUPS, HEADS, num_nodes, dtype=dtype))


def run(rule: str, inputs: dict[str, torch.Tensor], parents: torch.Tensor):
    function = state_space_rule if rule == "state space" else gated_delta_rule
    return function(**inputs, ancestors=ancestor_mask(parents, parents.shape[1]))


def step(inputs: dict[str, torch.Tensor], node: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and state of one node of one sequence, written down as in the papers."""
    query, key = inputs["queries"][..., node, :, None], inputs["keys"][..., node, :, None]
    state = inputs["log_decays"][..., node, :, None].exp() * state
    if "updates" in inputs:
        update = inputs["updates"][..., node, None, :]
    else:
        recalled = (key * state).sum(-2, keepdim=True)
        update = inputs["betas"][..., node, None, None] * (inputs["values"][..., node, None, :] - recalled)
    state = state + key * update
    return (query * state).sum(-2), state


def assert_every_node_is_a_step(rule, inputs, parents, tolerance):
    outputs, recurrence = run(rule, inputs, parents)
    for row, row_parents in enumerate(parents.tolist()):
        own = {name: values[row] for name, values in inputs.items()}
        states = {-1: own["state"]}
        for node, parent in enumerate(row_parents):
            expected, states[node] = step(own, node, states[parent])
            torch.testing.assert_close(outputs[row, ..., node, :], expected, atol=tolerance, rtol=tolerance)
        for node in states.keys() - {-1}:
            state = inputs["state"].clone()
            recurrence.advance(state, torch.tensor([node] * BATCH))
            torch.testing.assert_close(state[row], states[node], atol=tolerance, rtol=tolerance)


PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 2e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(("num_nodes", "reach"), [(1, 1), (2, 1), (17, 17), (40, 1), (64, 8)])
@pytest.mark.parametrize("rule", RULES)
def test_every_node_continues_its_parent(rule, num_nodes, reach, dtype, tolerance):
    torch.manual_seed(num_nodes)
    parents = random_parents(num_nodes, reach)
    assert_every_node_is_a_step(rule, inputs_of(rule, num_nodes, dtype), parents, tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_large_trees_are_read_in_blocks_with_the_same_result(rule, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tree_mixers, "PAIR_ELEMENTS", 2**19)
    assert_every_node_is_a_step(rule, inputs_of(rule, 256, torch.float64), random_parents(256), 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("decay", [0.0, -1e-6, -30.0, -300.0, -float("inf")])
@pytest.mark.parametrize("rule", RULES)
def test_decays_of_any_strength(rule, decay, dtype, tolerance):
    torch.manual_seed(1)
    inputs = inputs_of(rule, 48, dtype)
    inputs["log_decays"][..., ::3, :] = decay  # between steps of usual strength
    assert_every_node_is_a_step(rule, inputs, random_parents(48, 4), tolerance)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("rule", ["delta", "delta by channel"])
def test_betas_at_their_limits(rule, beta):
    torch.manual_seed(2)
    inputs = inputs_of(rule, 32, torch.float64)
    inputs["betas"][..., ::2] = beta
    assert_every_node_is_a_step(rule, inputs, random_parents(32), 1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_chains_agree_with_the_single_steps_of_transformers(rule):
    torch.manual_seed(3)
    num_nodes, parents = 24, random_parents(24, 1)
    inputs = inputs_of(rule, num_nodes, torch.float32)
    outputs, recurrence = run(rule, inputs, parents)
    state, got = inputs["state"].flatten(1, 2), inputs["state"].clone()

    def by_node(name, num_heads):
        return inputs[name].expand(-1, -1, num_heads, *[-1] * (inputs[name].ndim - 3)).flatten(1, 2).transpose(1, 2)

    if rule == "state space":
        state = state.transpose(-1, -2).clone()
        for node in range(num_nodes):
            steps = dict(
                hidden_states=by_node("updates", HEADS)[:, node],
                dt=torch.ones(BATCH, GROUPS * HEADS, VALUE_DIM),
                A=inputs["log_decays"][0, :, :, node].reshape(-1, 1, 1).expand(-1, VALUE_DIM, KEY_DIM),
                B=by_node("keys", 1)[:, node],
                C=by_node("queries", 1)[:, node],
            )
            expected = mamba2_selective_state_update(
                state[:1], **{n: t if n == "A" else t[:1] for n, t in steps.items()}
            )
            torch.testing.assert_close(outputs[:1, ..., node, :].flatten(1, 2), expected, atol=1e-5, rtol=1e-5)
        expected_state = state.transpose(-1, -2)
    else:
        single = recurrent_kimi_delta_attention if rule == "delta by channel" else torch_recurrent_gated_delta_rule
        decays = by_node("log_decays", HEADS)
        expected, expected_state = single(
            by_node("queries", HEADS) * KEY_DIM**0.5,  # scaled inside
            by_node("keys", HEADS),
            by_node("values", HEADS),
            g=decays if rule == "delta by channel" else decays[..., 0],
            beta=inputs["betas"].flatten(1, 2).transpose(1, 2),
            initial_state=state.clone(),
            output_final_state=True,
        )
        torch.testing.assert_close(outputs.flatten(1, 2).transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
    recurrence.advance(got, torch.tensor([num_nodes - 1] * BATCH))
    torch.testing.assert_close(got.flatten(1, 2)[:1], expected_state[:1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolutions_run_along_the_paths(kernel, with_bias):
    torch.manual_seed(4)
    channels, num_nodes, width = 5, 24, 4
    parents = random_parents(num_nodes, 6)
    inputs = torch.randn(BATCH, width + num_nodes, channels, dtype=torch.float64)
    weight = torch.randn(channels, kernel, dtype=torch.float64)
    bias = torch.randn(channels, dtype=torch.float64) if with_bias else None
    windows = path_windows(parents, width)
    outputs = tree_convolution(inputs, windows, weight, bias)
    for row in range(BATCH):
        for node in range(num_nodes):
            path, ancestor = [], node
            while ancestor >= 0:
                path.insert(0, ancestor + width)
                ancestor = int(parents[row, ancestor])
            along = inputs[row, [*range(width), *path]]
            expected = conv1d(along.T[None], weight[:, None], bias, groups=channels)[0, :, -1]
            torch.testing.assert_close(outputs[row, node], expected, atol=1e-12, rtol=1e-12)
            newest = windows_of(inputs, windows[:, node])[row]
            assert torch.equal(newest, along[-width:]), "the state after a node: its newest inputs"
