"""Layers with room to grow hold what ordinary ones hold, whatever is committed, cropped or replaced in between."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_jetflow.target.caches import commit_path
from hf_jetflow.target.growing_cache import MAX_LAYERS, GrowingLayer, grow_layers, settle_layers


HEADS, DIM = 2, 3


def rows(start: int, stop: int, layer: int = 0, heads: int = HEADS) -> torch.Tensor:
    """Keys (1, heads, rows, dim) that tell row and layer."""
    numbers = torch.arange(start, stop, dtype=torch.float32) + 10_000 * layer
    return numbers[None, None, :, None].expand(1, heads, -1, DIM)


def cache_of(layers: list[DynamicLayer]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = layers
    return cache


def grown_cache() -> DynamicCache:
    """Three layers of ten rows with room to grow."""
    cache = DynamicCache()
    for layer in range(3):
        cache.update(rows(0, 10, layer), rows(0, 10, layer), layer)
    grow_layers(cache)
    return cache


def num_buffers(layers: list[GrowingLayer]) -> int:
    return len({id(layer.shared_buffers[0]) for layer in layers})


def test_a_growing_layer_holds_what_an_ordinary_one_holds():
    generator = torch.Generator().manual_seed(3)
    layers = [DynamicLayer(), GrowingLayer()]
    for step in range(60):  # 60 steps outgrow the first buffer
        new = torch.randn(2, HEADS, int(torch.randint(1, 20, (1,), generator=generator)), DIM, generator=generator)
        removed = int(torch.randint(0, 8, (1,), generator=generator))
        for layer in layers:
            layer.update(new, new + 0.5)
            layer.crop(-min(removed, layer.get_seq_length()))
            if step == 20:
                layer.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(layers[0].keys, layers[1].keys)
        assert torch.equal(layers[0].values, layers[1].values)
    assert layers[1].get_seq_length() > 300
    for layer in layers:
        layer.reset()
        layer.update(new, new)
    assert torch.equal(layers[0].keys, layers[1].keys)


def test_a_growing_layer_leaves_its_rows_where_they_are():
    layer = GrowingLayer()
    layer.update(rows(0, 10), rows(0, 10))
    address = layer.keys.data_ptr()
    for start in range(10, 200, 10):
        layer.update(rows(start, start + 10), rows(start, start + 10))
    assert layer.keys.data_ptr() == address
    assert torch.equal(layer.keys, rows(0, 200))


def test_a_cache_grows_and_settles_with_the_rows_of_the_caller_untouched():
    cache = DynamicCache()
    for layer in range(2):
        cache.update(rows(0, 10, layer), rows(0, 10, layer), layer)
    held = cache.layers[0].keys
    grow_layers(cache)
    assert {type(layer) for layer in cache.layers} == {GrowingLayer}
    cache.update(rows(10, 14), rows(10, 14), 0)
    settle_layers(cache)
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}
    assert torch.equal(held, rows(0, 10))
    assert torch.equal(cache.layers[0].keys, rows(0, 14))
    cache.update(rows(14, 15), rows(14, 15), 0)
    assert torch.equal(cache.layers[0].keys, rows(0, 15))
    assert cache.layers[1].get_seq_length() == 10


def test_only_layers_of_one_shape_share_a_buffer():
    num_alike = MAX_LAYERS + 3
    cache = DynamicCache()
    for layer in range(num_alike + 2):
        heads = HEADS if layer < num_alike else HEADS + 1
        cache.update(rows(0, 10, layer, heads), rows(0, 10, layer, heads), layer)
    grow_layers(cache)
    for layer in range(num_alike + 2):
        heads = HEADS if layer < num_alike else HEADS + 1
        cache.update(rows(10, 12, layer, heads), rows(10, 12, layer, heads), layer)
        assert torch.equal(cache.layers[layer].keys, rows(0, 12, layer, heads))
    assert num_buffers(cache.layers[:num_alike]) == 2
    assert num_buffers(cache.layers[num_alike:]) == 1
    assert num_buffers(cache.layers) == 3


def test_layers_that_share_a_buffer_outgrow_it_together():
    cache = DynamicCache()
    for layer in range(3):
        cache.update(rows(0, 10, layer), rows(0, 10, layer) + 0.5, layer)
    grow_layers(cache)
    for start in range(10, 1200, 70):
        for layer in range(3):
            new = rows(start, start + 70, layer)
            keys, values = cache.update(new, new + 0.5, layer)
            assert torch.equal(keys, rows(0, start + 70, layer))
            assert torch.equal(values, rows(0, start + 70, layer) + 0.5)
        assert num_buffers(cache.layers) == 1


def test_a_copy_shares_buffers_of_its_own():
    cache = grown_cache()
    for layer in range(3):
        cache.update(rows(10, 12, layer), rows(10, 12, layer), layer)
    copied = copy.deepcopy(cache)
    addresses = [layer.keys.data_ptr() for layer in copied.layers]
    for layer in range(3):
        copied.update(rows(50, 55, layer), rows(50, 55, layer), layer)
        cache.update(rows(12, 13, layer), rows(12, 13, layer), layer)
        assert torch.equal(copied.layers[layer].keys, torch.cat([rows(0, 12, layer), rows(50, 55, layer)], dim=2))
        assert torch.equal(cache.layers[layer].keys, rows(0, 13, layer))
    assert [layer.keys.data_ptr() for layer in copied.layers] == addresses, "the copy's rows were copied once more"
    assert num_buffers(copied.layers) == 1
    assert num_buffers(copied.layers + cache.layers) == 2


def test_a_cache_that_is_let_go_is_freed_at_once():
    cache = grown_cache()
    cache.update(rows(10, 12), rows(10, 12), 0)
    buffer = weakref.ref(cache.layers[0].shared_buffers[0])
    gc.disable()
    try:
        del cache
        assert buffer() is None
    finally:
        gc.enable()


def test_a_layer_whose_batch_changes_leaves_the_others():
    cache = grown_cache()
    for layer in range(3):
        cache.update(rows(10, 12, layer), rows(10, 12, layer), layer)
    cache.layers[1].batch_repeat_interleave(2)
    for layer in range(3):
        new = rows(12, 14, layer)
        cache.update(*[new.repeat_interleave(2, dim=0) if layer == 1 else new] * 2, layer)
        assert torch.equal(cache.layers[layer].keys[:1], rows(0, 14, layer))
    assert cache.layers[1].keys.shape[0] == 2
    assert num_buffers(cache.layers) == 2


def test_rows_of_fewer_sequences_or_heads_are_not_taken_for_cropped_ones():
    """Their first one lies at the same address."""
    for cut in (lambda rows: rows[:1], lambda rows: rows[:, :1]):
        layers = [GrowingLayer(), DynamicLayer()]
        for layer in layers:
            new = torch.arange(2 * HEADS * 4 * DIM, dtype=torch.float32).view(2, HEADS, 4, DIM)
            layer.update(new, new + 0.5)
            layer.crop(-1)
            layer.keys, layer.values = cut(layer.keys), cut(layer.values)
            layer.update(cut(new), cut(new))
        assert torch.equal(layers[0].keys, layers[1].keys)
        assert torch.equal(layers[0].values, layers[1].values)


def test_keys_and_values_may_differ_in_shape():
    layers = [GrowingLayer(), DynamicLayer()]
    for start in (0, 4, 300):
        for layer in layers:
            layer.update(rows(start, start + 300), rows(start, start + 300)[..., :2])
    assert torch.equal(layers[0].values, layers[1].values)


@pytest.mark.parametrize("is_replaced", [False, True], ids=["as they are", "one replaced by the caller"])
@pytest.mark.parametrize("seed", range(4))
def test_paths_are_committed_as_in_ordinary_layers(seed, is_replaced):
    """Many rounds over more layers than share a buffer, one of them with a sliding window."""
    generator = torch.Generator().manual_seed(seed)
    num_layers = MAX_LAYERS + 2
    window = {"sliding_window": 9}
    caches = [
        cache_of([DynamicLayer() for _ in range(num_layers)] + [DynamicSlidingWindowLayer(**window)]) for _ in range(2)
    ]
    for step in range(40):
        num_rows = 20 if step == 0 else int(torch.randint(1, 17, (1,), generator=generator))
        new = torch.randn(num_layers + 1, 1, HEADS, num_rows, DIM, generator=generator)
        path = (torch.rand(num_rows, generator=generator) < 0.5).nonzero()[:, 0]
        path = torch.unique(torch.cat([torch.zeros(1, dtype=torch.long), path])).tolist()
        for cache in caches:
            cache.layers[-1].activate_past_recording()
            for index, layer in enumerate(cache.layers):
                layer.update(new[index], new[index] + 0.5)
            if step:
                commit_path(cache, path, num_rows)
            elif cache is caches[0]:
                grow_layers(cache)
            if is_replaced and step % 7 == 3:  # step 38 is the last
                cache.layers[3].keys = cache.layers[3].keys + 1
        for layer, ordinary in zip(*(cache.layers for cache in caches), strict=True):
            assert torch.equal(layer.keys, ordinary.keys)
            assert torch.equal(layer.values, ordinary.values)
    assert num_buffers(caches[0].layers[:-1]) == 2
