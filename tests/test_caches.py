"""The head's cache row by row, and commits in the target's cache against a fresh forward on the committed ids."""

import pytest
import torch
from helpers import NUM_TAPS, as_batch, random_parents
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import LinearAttentionAndSlidingWindowAttentionLayer

from hf_jetflow import JetFlowConfig
from hf_jetflow.head.cache import GrowingHeadCache
from hf_jetflow.target.adapters import AdapterNames
from hf_jetflow.target.caches import check_target_cache, commit_path
from hf_jetflow.target.prefilled import PrefilledTarget
from hf_jetflow.target.slots import BatchSlots
from hf_jetflow.target.step_inputs import StepInputs
from hf_jetflow.target.target import Target
from hf_jetflow.trees.tree import DraftTree, ancestor_mask


HEADS, DIM = 2, 3


def rows(start: int, stop: int, layer: int = 0) -> torch.Tensor:
    """Keys (1, heads, rows, dim) that tell row and layer."""
    numbers = torch.arange(start, stop, dtype=torch.float32) + 10_000 * layer
    return numbers[None, None, :, None].expand(1, HEADS, -1, DIM)


@pytest.mark.parametrize("num_rounds", [1, 2, 40])
def test_the_head_s_cache_returns_every_context_row_and_the_newest_block(num_rounds):
    cache = GrowingHeadCache(1)
    length = 0
    for _ in range(num_rounds):  # 40 rounds of 9 rows outgrow the first buffer twice
        keys = torch.cat([rows(length, length + 9), rows(-4, 0)], dim=2)
        got_keys, got_values = cache.extend(0, keys, keys + 0.5, num_context=9)
        length += 9
        expected = torch.cat([rows(0, length), rows(-4, 0)], dim=2)
        assert torch.equal(got_keys, expected)
        assert torch.equal(got_values, expected + 0.5)


def test_block_rows_are_overwritten_by_the_next_round():
    cache = GrowingHeadCache(1)
    cache.extend(0, torch.cat([rows(0, 3), rows(50, 54)], dim=2), rows(0, 7), num_context=3)
    keys, _ = cache.extend(0, torch.cat([rows(3, 4), rows(60, 64)], dim=2), rows(0, 5), num_context=1)
    assert torch.equal(keys, torch.cat([rows(0, 4), rows(60, 64)], dim=2))


def test_a_round_without_new_context_keeps_what_is_there():
    cache = GrowingHeadCache(1)
    cache.extend(0, rows(0, 5), rows(0, 5), num_context=3)
    keys, _ = cache.extend(0, rows(60, 62), rows(60, 62), num_context=0)
    assert torch.equal(keys, torch.cat([rows(0, 3), rows(60, 62)], dim=2))


def test_a_context_longer_than_the_first_buffer_fits_at_once():
    keys, _ = GrowingHeadCache(1).extend(0, rows(0, 700), rows(0, 700), num_context=700)
    assert torch.equal(keys, rows(0, 700))


def test_layers_are_extended_one_after_another_without_mixing():
    cache = GrowingHeadCache(3)
    for length in (0, 300, 600):
        for layer in range(3):
            keys, _ = cache.extend(layer, rows(length, length + 300, layer), rows(0, 300), num_context=300)
            assert torch.equal(keys, rows(0, length + 300, layer))


def test_positions_of_the_context_accumulate():
    cache = GrowingHeadCache(1)
    assert cache.extend_positions(torch.tensor([[2, 3]])).tolist() == [[2, 3]]
    assert cache.extend_positions(torch.tensor([[7]])).tolist() == [[2, 3, 7]]


def random_tree(anchor: int, num_nodes: int, vocab: int, generator: torch.Generator) -> DraftTree:
    parents = torch.tensor(random_parents(num_nodes, generator))
    tokens = torch.randint(3, vocab, (num_nodes,), generator=generator)
    tokens[0] = anchor
    depths = ancestor_mask(parents, num_nodes).sum(dim=1) - 1
    return as_batch(DraftTree(tokens, parents, depths, torch.zeros(num_nodes), int(depths.max())))


def path_to(tree: DraftTree, node: int) -> list[int]:
    return tree.ancestor_mask[0, node].nonzero()[:, 0].tolist()


def prefilled(model, ids: torch.Tensor) -> PrefilledTarget:
    """A target whose cache holds all of `ids` but the last, as after a prefill."""
    target = Target(model, JetFlowConfig.for_target(model.config, num_hidden_layers=NUM_TAPS, mask_token_id=0))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    forward_kwargs = {"output_hidden_states": True}
    slots = BatchSlots(1, AdapterNames(model))
    slots.fill(ids.shape[1] - 1)
    steps = StepInputs(position_ids=torch.zeros(1, 1))
    return PrefilledTarget(target, cache, slots, torch.tensor([0]), step_inputs=steps, forward_kwargs=forward_kwargs)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
@pytest.mark.parametrize("num_prompt", [3, 12], ids=["prompt within the window", "prompt longer than the window"])
@torch.no_grad()
def test_after_a_commit_the_target_continues_as_on_the_committed_ids(tiny_target, family, num_prompt):
    model = tiny_target(family)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 200, (1, num_prompt), generator=generator)
    context = prefilled(model, ids)
    for num_nodes in (6, 1, 14, 9, 2, 11):
        tree = random_tree(int(ids[0, -1]), num_nodes, 200, generator)
        states = context.verify(tree)
        fresh = model(input_ids=ids, use_cache=False).logits[:, -1]
        torch.testing.assert_close(states.logits[:, 0], fresh, atol=2e-4, rtol=2e-4)
        node = int(torch.randint(num_nodes, (1,), generator=generator))
        path = path_to(tree, node)
        ids = torch.cat([ids, tree.tokens[:, path[1:]], torch.randint(3, 200, (1, 1), generator=generator)], dim=1)
        context.strategy.commit(tree, [path])
        assert context.cache.get_seq_length() == ids.shape[1] - 1
        assert int(context.positions) == ids.shape[1] - 1


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
@torch.no_grad()
def test_every_node_is_verified_as_if_its_branch_stood_alone(tiny_target, family):
    model = tiny_target(family)
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(3, 200, (1, 11), generator=generator)
    context = prefilled(model, ids)
    tree = random_tree(int(ids[0, -1]), 12, 200, generator)
    states = context.verify(tree)
    for node in range(12):
        branch = torch.cat([ids, tree.tokens[:, path_to(tree, node)[1:]]], dim=1)
        outputs = model(input_ids=branch, use_cache=False, output_hidden_states=True)
        torch.testing.assert_close(states.logits[0, node], outputs.logits[0, -1], atol=2e-4, rtol=2e-4)
        features = torch.cat(
            [outputs.hidden_states[index][0, -1] for index in context.target.head_config.hidden_state_indices]
        )
        torch.testing.assert_close(states.features[0, node], features, atol=2e-4, rtol=2e-4)
        assert int(states.position_ids[0, node]) == branch.shape[1] - 1


def test_a_commit_moves_the_accepted_rows_only():
    cache = DynamicCache()
    cache.update(rows(0, 10), rows(0, 10) + 0.5, 0)  # 6 rows of prefix, 4 nodes
    commit_path(cache, [0, 3], num_rows=4)
    expected = torch.cat([rows(0, 7), rows(9, 10)], dim=2)
    assert torch.equal(cache.layers[0].keys, expected)
    assert torch.equal(cache.layers[0].values, expected + 0.5)


@pytest.mark.parametrize("path", [[], [0], [0, 1], [0, 1, 2, 3], [0, 1, 3]], ids=str)
def test_nodes_that_lie_where_they_belong_are_not_moved(path, monkeypatch):
    moved = []
    original = torch.Tensor.index_copy_
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda *call: moved.append(call[2].tolist()) or original(*call))
    cache = DynamicCache()
    cache.update(rows(0, 10), rows(0, 10), 0)
    commit_path(cache, path, num_rows=4)
    assert cache.layers[0].keys[0, 0, :, 0].tolist() == [*range(6), *(6 + node for node in path)]
    assert moved == ([[8]] * 2 if path == [0, 1, 3] else [])


@torch.no_grad()
def test_rows_that_have_left_the_window_are_forgotten(tiny_target):
    model = tiny_target("gemma3_text")
    generator = torch.Generator().manual_seed(9)
    context = prefilled(model, torch.randint(3, 200, (1, 20), generator=generator))
    tree = random_tree(5, 8, 200, generator)
    context.verify(tree)
    context.strategy.commit(tree, [path_to(tree, 7)])
    window = model.config.sliding_window
    lengths = {layer.keys.shape[2] for layer in context.cache.layers}
    assert lengths == {window - 1, context.cache.get_seq_length()}


def test_a_missing_cache_is_refused():
    with pytest.raises(ValueError, match=r"runs without a cache.*leave `use_cache` at True"):
        check_target_cache(None)


def test_the_static_cache_of_a_sliding_target_is_refused_by_name(tiny_target):
    cache = StaticCache(config=tiny_target("gemma3_text").config, max_cache_len=32)
    with pytest.raises(ValueError, match="static cache of a sliding-window target"):
        check_target_cache(cache)


def test_a_cache_of_another_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="`EncoderDecoderCache` yet; leave `cache_implementation` unset"):
        check_target_cache(EncoderDecoderCache(DynamicCache(), DynamicCache()))


def test_an_offloaded_cache_is_refused(tiny_target):
    cache = DynamicCache(config=tiny_target("llama").config, offloading=True)
    with pytest.raises(ValueError, match="an offloaded cache yet"):
        check_target_cache(cache)


def test_a_cache_with_layers_that_cannot_roll_back_is_refused_by_name():
    cache = DynamicCache()
    cache.layers.append(LinearAttentionAndSlidingWindowAttentionLayer(sliding_window=4))
    with pytest.raises(ValueError, match=r"LinearAttentionAndSliding.*cannot roll back.*generate without"):
        check_target_cache(cache)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
def test_the_dynamic_cache_of_a_target_passes(tiny_target, family):
    cache = DynamicCache(config=tiny_target(family).config)
    assert check_target_cache(cache) is cache
