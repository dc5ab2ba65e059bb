"""Checks and commits of the target's cache (of batches: `batch_caches.py`)."""

import functools
from collections.abc import Callable, Iterable

import torch
from transformers import Cache, DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer

from .._compat import class_of
from ..errors import JetFlowError
from ..transfer import to_device
from .growing_cache import GrowingLayer
from .recurrent import RECURRENT_LAYERS


# A layer that reads other layers' rows, or none; early releases have no such class.
EmptyLayer = class_of(cache_utils, "DummyLayer")
DynamicSlidingWindowLayer = class_of(cache_utils, "DynamicSlidingWindowLayer")
StaticLayer = class_of(cache_utils, "StaticLayer")
# moves(device): rows of the tree to move, and their new indices among the tree's rows.
Moves = Callable[[torch.device], tuple[torch.Tensor, torch.Tensor]]
STATIC_ROWS = (1, 4, 8, 16, 32, 64, 128, 256)  # sizes of a forward with a static cache; each compiles one graph


def check_target_cache(cache: Cache | None) -> DynamicCache | StaticCache:
    """
    Refuse a cache that cannot hold a tree and roll back; returns any other.

    Raises:
        JetFlowError: Naming the cache and what to use instead.
    """
    without = "generate without `assistant_model`"
    if cache is None:
        raise JetFlowError(
            "this call runs without a cache, or the target makes one of its own, which draft heads cannot roll back; "
            f"leave `use_cache` at True, or {without}"
        )
    if not isinstance(cache, (DynamicCache, StaticCache)) or cache.offloading:
        is_offloaded = getattr(cache, "offloading", False)
        raise JetFlowError(unsupported_cache("an offloaded cache" if is_offloaded else f"`{type(cache).__name__}`"))
    known = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer, StaticLayer, EmptyLayer, *RECURRENT_LAYERS)
    unknown = {type(layer).__name__ for layer in cache.layers if type(layer) not in known}
    if "StaticSlidingWindowLayer" in unknown:
        raise JetFlowError(
            "the static cache of a sliding-window target overwrites rows that a draft tree still needs; leave "
            f"`cache_implementation` unset, or {without}"
        )
    if unknown:
        raise JetFlowError(
            f"the target's cache has {sorted(unknown)} layers, whose state draft heads cannot roll back after a "
            f"rejected draft; {without}"
        )
    return cache


def unsupported_cache(kind: str) -> str:
    """The sentence that refuses a kind of cache."""
    return (
        f"draft trees are not supported with {kind} yet; leave `cache_implementation` unset to use the dynamic cache, "
        "or generate without `assistant_model`"
    )


def check_padded_rows(cache: Cache, is_padding: torch.Tensor) -> None:
    """
    Refuse a cache that dropped rows of a padded prompt, as hooks that compress it do.

    Args:
        is_padding (`torch.Tensor`, (batch, prompt)): Where the prompts are padded.

    Raises:
        JetFlowError: Saying how many rows are missing.
    """
    lengths = {layer.get_seq_length() for layer in cache.layers if type(layer) in (DynamicLayer, GrowingLayer)}
    if is_padding.any() and lengths and min(lengths) < is_padding.shape[1]:
        raise JetFlowError(
            f"the cache holds {min(lengths)} of the prompt's {is_padding.shape[1]} tokens, so draft heads cannot tell "
            "which of them are padding; give one prompt without padding, or generate without `assistant_model`"
        )


def check_even_rows(cache: Cache) -> None:
    """
    Refuse a cache whose layers hold different numbers of tokens, as some hooks that compress it leave it.

    Raises:
        JetFlowError: Saying how many tokens the layers hold.
    """
    lengths = {layer.get_seq_length() for layer in cache.layers if type(layer) in (DynamicLayer, GrowingLayer)} - {0}
    if len(lengths) > 1:
        raise JetFlowError(
            f"the layers of the cache hold {min(lengths)} to {max(lengths)} tokens, but a draft tree has one mask for "
            "all layers; compress every layer to the same length, or generate without `assistant_model`"
        )


def cache_windows(cache: Cache) -> list[int | None]:
    """Window of each layer of the target's cache in positions; `None` for layers that hold every token."""
    return [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in cache.layers]


def static_rows(num_nodes: int) -> int:
    """Rows of a forward that verifies `num_nodes` nodes with a static cache: padded to one of few sizes."""
    return next((rows for rows in STATIC_ROWS if rows >= num_nodes), num_nodes)


def max_static_nodes(num_free: int) -> int:
    """Rows, padding included, that fit into a static cache with `num_free` free rows; at least the root."""
    return max(rows for rows in (*STATIC_ROWS, 1) if rows <= max(num_free, 1))


def record_rows(cache: Cache) -> None:
    """Let the sliding-window layers retain all rows of the next forward, until rows are dropped."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.activate_past_recording()


def commit_path(cache: DynamicCache, path: list[int], num_rows: int) -> None:
    """
    Compact the keys and values of the path behind the prefix, and drop the other nodes. The prefix is not moved.

    Args:
        cache (`DynamicCache`): The target's cache, whose last `num_rows` rows are the tree's nodes.
        path (`list[int]`): Accepted node ids, root first, ascending; an empty path drops all nodes.
        num_rows (`int`): Rows of the verifying forward.
    """
    moves, is_moved = _moves(path)
    moved: set[int] = set()  # ids of the buffers that were moved: layers that share them hold the same tuple
    for layer in cache.layers:
        # A sliding layer has retained rows beyond its window, which go even if the whole tree was accepted.
        if isinstance(layer, DynamicLayer) and (layer.is_sliding or len(path) < num_rows):
            if isinstance(layer, GrowingLayer) and (buffers := layer.shared_buffers):
                start = layer.get_seq_length() - num_rows
                if is_moved and id(buffers) not in moved:
                    _move(buffers, start, moves)
                    moved.add(id(buffers))
                layer.truncate(start + len(path))
                continue
            start = layer.keys.shape[2] - num_rows
            if is_moved:
                _move((layer.keys, layer.values), start, moves)
            _end_at(layer, start + len(path), num_rows - len(path))


def commit_static_path(cache: StaticCache, path: list[int], num_rows: int) -> None:
    """`commit_path` for a static cache: the last rows are the nodes, then padding. All layers have one length."""
    if len(path) == num_rows:  # nothing moves
        return
    layers = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
    lengths = [layer.cumulative_length for layer in layers]
    moves, is_moved = _moves(path)

    @functools.cache
    def shifted(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        start = lengths[0].to(device) - num_rows
        rows, indices = moves(device)
        return rows + start, indices + start

    if is_moved:
        for layer in layers:
            _move((layer.keys, layer.values), 0, shifted)
    torch._foreach_add_(lengths, len(path) - num_rows)  # in place: compiled graphs hold on to them


def _moves(path: list[int]) -> tuple[Moves, bool]:
    """The moves that compact a path, the same for most layers, and whether there are any."""
    # The root is in place, and so are the nodes behind it whose ids equal their index on the path.
    first = next((index for index, node in enumerate(path) if index != node), len(path))

    @functools.cache
    def moves(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return to_device(path[first:], device), torch.arange(first, len(path), device=device)

    return moves, first < len(path)


def compact_rows(
    buffers: list[torch.Tensor], lengths: list[torch.Tensor], rows: torch.Tensor, path_length: torch.Tensor
) -> None:
    """
    `commit_path` of a static cache as a function of fixed shapes, which can be captured.

    Args:
        buffers (`list[torch.Tensor]`, (1, heads, capacity, dim)): Keys and values of all layers.
        lengths (`list[torch.Tensor]`, ()): Rows in each layer, updated in place.
        rows (`torch.Tensor`, (rows of the verifying forward,)): For each of them, the row to copy there.
        path_length (`torch.Tensor`, ()): Rows of the path, which stay.
    """
    indices = lengths[0] - len(rows) + torch.arange(len(rows), device=rows.device)
    sources = lengths[0] - len(rows) + rows
    for buffer in buffers:
        buffer.index_copy_(-2, indices, buffer.index_select(-2, sources))
    for length in lengths:
        length.add_(path_length - len(rows))


def _move(buffers: Iterable[torch.Tensor], start: int, moves: Moves) -> None:
    """Compact rows of buffers (..., rows, dim) behind `start`, in place."""
    for states in buffers:
        rows, indices = (numbers + start if start else numbers for numbers in moves(states.device))
        states.index_copy_(-2, indices, states.index_select(-2, rows))


def _end_at(layer: DynamicLayer, length: int, num_dropped: int) -> None:
    layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length -= num_dropped
        layer.crop(0)  # drops the rows that have left the window
        layer.record_past = False  # so that later forwards, maybe the caller's own, drop them as usual
