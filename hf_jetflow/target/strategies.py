"""Cache strategies: what rounds do with the target's cache, by the kind of cache.

`cache_strategy` picks one per generation; commit, roll back and settle need no further case distinction. Between
rounds the cache holds every committed token but the anchors.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import DynamicCache, StaticCache

from ..transfer import to_device
from ..trees.tree import DraftTree, trim_tree
from .batch_caches import BatchLayer, commit_paths, settle_batch, spread_layers
from .caches import (
    StaticLayer,
    commit_path,
    commit_static_path,
    compact_rows,
    max_static_nodes,
    record_rows,
    static_rows,
)
from .growing_cache import grow_layers, settle_layers
from .mixer_layers import TreeMixer, TreeNodes, reading_trees
from .recurrent import RecurrentStates, has_states
from .slots import BatchSlots


class CacheStrategy:
    """
    What rounds do with a growing cache of one sequence. Other kinds of cache override what differs.

    Args:
        cache (`DynamicCache` or `StaticCache`): The target's, filled by the prefill.
        slots ([`BatchSlots`]): How many tokens of each sequence it holds.
    """

    def __init__(self, cache: DynamicCache | StaticCache, slots: BatchSlots):
        self.cache, self.slots = cache, slots

    @property
    def max_nodes(self) -> int | None:
        """Nodes that a round can verify; `None` if any number."""
        return None

    @property
    def capacity(self) -> int | None:
        """Rows of keys that every forward sees, used or not; `None` for a cache that grows."""
        return None

    def num_rows(self, num_nodes: int) -> int:
        """Rows of the forward that verifies `num_nodes` nodes; those beyond the nodes are padding."""
        return num_nodes

    def capture(self, captured: Callable[..., Callable]) -> None:
        """Capture the moves of `commit`, where their shapes are fixed; `captured` makes a captured function."""

    def open(self) -> None:
        """Make the cache ready for rounds; `settle` ends them."""
        grow_layers(self.cache)

    def prepare(self) -> None:
        """Make the cache able to drop nodes; called before each verify."""
        record_rows(self.cache)

    def reading(self, tree: DraftTree) -> AbstractContextManager[None]:
        """Context manager around the forward over a tree's nodes."""
        return nullcontext()

    def commit(self, tree: DraftTree, paths: list[list[int]]) -> None:
        """Compact each sequence's path behind its prefix, and drop the other nodes."""
        self._commit_path(tree, paths[0])
        self.slots.advance(paths)

    def _commit_path(self, tree: DraftTree, path: list[int]) -> None:
        """`commit` of one sequence, without counting."""
        commit_path(self.cache, path, tree.num_nodes)

    def roll_back(self, tree: DraftTree) -> None:
        """Drop all nodes of a verified tree, and leave the cache to the caller with the text up to the anchor; of a
        batch, as much as every sequence has."""
        self._commit_path(tree, [])
        self.settle(int(self.slots.lengths.min()))

    def retire(self, slot: int) -> None:
        """Go on without the sequence in a slot; the last active sequence takes over the slot."""
        self.slots.retire(slot)

    def settle(self, length: int) -> None:
        """Leave the cache as plain decoding does. Sequences of a batch end at `length` tokens, padded to it where they
        are shorter; one sequence holds that many."""
        settle_layers(self.cache)


class StaticStrategy(CacheStrategy):
    """A static cache of one sequence: forwards have few sizes, one compiled graph each."""

    cache: StaticCache
    _compact_rows: Callable | None = None  # captured, where the target's forward is

    @property
    def max_nodes(self) -> int:
        return max_static_nodes(self.capacity - int(self.slots.lengths))

    @property
    def capacity(self) -> int:
        return next(layer.max_cache_len for layer in self.cache.layers if isinstance(layer, StaticLayer))

    def num_rows(self, num_nodes: int) -> int:
        return static_rows(num_nodes)

    def capture(self, captured: Callable[..., Callable]) -> None:
        self._compact_rows = captured(compact_rows, dynamic=True)

    def open(self) -> None:
        pass

    def _commit_path(self, tree: DraftTree, path: list[int]) -> None:
        num_rows = self.num_rows(tree.num_nodes)
        layers = [layer for layer in self.cache.layers if isinstance(layer, StaticLayer)]
        devices = {layer.keys.device for layer in layers}
        if self._compact_rows is None or len(path) == num_rows or len(devices) > 1:
            return commit_static_path(self.cache, path, num_rows)
        buffers = [states for layer in layers for states in (layer.keys, layer.values)]
        numbers = to_device([*path, *range(len(path), num_rows), len(path)], *devices)
        self._compact_rows(buffers, [layer.cumulative_length for layer in layers], numbers[:-1], numbers[-1])

    def settle(self, length: int) -> None:
        pass


class ReplayedStrategy(CacheStrategy):
    """
    A cache with recurrent states of unknown layers: accepted rows of a rejected chain are read again.

    Args:
        read: Runs the target over the nodes of a chain behind the cache.
    """

    def __init__(self, cache: DynamicCache, slots: BatchSlots, read: Callable[[DraftTree], Any]):
        super().__init__(cache, slots)
        self._read = read
        self._states_before: RecurrentStates | None = None  # the newest verify

    def prepare(self) -> None:
        self._states_before = RecurrentStates.copy(self.cache)
        super().prepare()

    def _commit_path(self, tree: DraftTree, path: list[int]) -> None:
        if len(path) < tree.num_nodes:
            assert self._states_before is not None
            commit_path(self.cache, [], tree.num_nodes)
            self._states_before.restore(self.cache)
            if not path:
                return
            tree = trim_tree(tree, len(path))  # the path: each node of a chain is at most as likely as its parent
            super().prepare()
            self._read(tree)
        super()._commit_path(tree, path)


class BatchStrategy(CacheStrategy):
    """A growing cache of several sequences, which advance by different lengths and leave one by one."""

    def open(self) -> None:
        spread_layers(self.cache, self.slots)

    def commit(self, tree: DraftTree, paths: list[list[int]]) -> None:
        commit_paths(self.cache, self.slots, paths)
        self.slots.advance(paths)

    def roll_back(self, tree: DraftTree) -> None:
        self.slots.reactivate()  # rows behind the lengths are not taken along
        self.settle(int(self.slots.lengths.min()))

    def retire(self, slot: int) -> None:
        last = len(self.slots.lengths) - 1
        super().retire(slot)
        for layer in self.cache.layers:
            if isinstance(layer, BatchLayer):
                layer.swap(slot, last)

    def settle(self, length: int) -> None:
        settle_batch(self.cache, self.slots, length)


class HybridStrategy(CacheStrategy):
    """
    A cache with recurrent states. They stay as they are while a tree is verified, and are moved along the path at
    commit. A lone root is a step of plain decoding, with its kernels.

    Args:
        mixers (`list[TreeMixer]`): The recurrent layers.
    """

    def __init__(self, cache: DynamicCache | StaticCache, slots: BatchSlots, mixers: list[TreeMixer]):
        super().__init__(cache, slots)
        self._mixers = mixers

    def _is_step(self, tree: DraftTree) -> bool:
        """Whether the forward over the tree moves the states itself."""
        return tree.num_nodes == 1

    def reading(self, tree: DraftTree) -> AbstractContextManager[None]:
        if self._is_step(tree):
            return nullcontext()
        return reading_trees(self._mixers, TreeNodes(tree, self.num_rows(tree.num_nodes)))

    def commit(self, tree: DraftTree, paths: list[list[int]]) -> None:
        if not self._is_step(tree):
            for mixer in self._mixers:
                mixer.advance(paths)
        super().commit(tree, paths)

    def roll_back(self, tree: DraftTree) -> None:
        if self._is_step(tree):  # as in plain decoding, the root was read
            self.commit(tree, [[0]])
            return self.settle(int(self.slots.lengths))
        for mixer in self._mixers:
            mixer.forget()
        super().roll_back(tree)


class HybridStaticStrategy(HybridStrategy, StaticStrategy):
    """A static cache with recurrent states, of one sequence."""


class HybridBatchStrategy(HybridStrategy, BatchStrategy):
    """A cache with recurrent states, of several sequences."""

    def _is_step(self, tree: DraftTree) -> bool:
        return False  # the layers hold states of all sequences, active or not

    def roll_back(self, tree: DraftTree) -> None:
        self.slots.reactivate()
        lengths = {*self.slots.lengths.tolist()}
        if len(lengths) == 1:
            return super().roll_back(tree)
        self.settle(0)  # states of longer sequences cannot go back: a later call reads everything
        for mixer in self._mixers:
            mixer.forget()
            mixer.states.reset()

    def retire(self, slot: int) -> None:
        last = len(self.slots.lengths) - 1
        super().retire(slot)
        for mixer in self._mixers:
            mixer.reorder([slot, last], [last, slot])

    def settle(self, length: int) -> None:
        sources = sorted(range(len(self.slots.order)), key=self.slots.order.__getitem__)
        for mixer in self._mixers:
            mixer.reorder(list(range(len(sources))), sources)
        super().settle(length)


def cache_strategy(
    cache: DynamicCache | StaticCache, slots: BatchSlots, mixers: list[TreeMixer], read: Callable[[DraftTree], Any]
) -> CacheStrategy:
    """
    The strategy for a cache that holds the prompts.

    There is none for batches in a static cache or with unknown recurrent layers, which are decoded plainly
    (`plain_batch_reason`), nor for chains in a static cache, which `Target.prefill` refuses.

    Args:
        slots ([`BatchSlots`]): How many tokens of each sequence it holds.
        mixers (`list[TreeMixer]`): The target's recurrent layers, if they read trees.
        read: Runs the target over the nodes of a chain behind the cache.
    """
    is_batch, is_static = len(slots.order) > 1, isinstance(cache, StaticCache)
    if mixers:
        kind = HybridBatchStrategy if is_batch else HybridStaticStrategy if is_static else HybridStrategy
        return kind(cache, slots, mixers)
    if is_batch:
        return BatchStrategy(cache, slots)
    if is_static:
        return StaticStrategy(cache, slots)
    if has_states(cache):
        return ReplayedStrategy(cache, slots, read)
    return CacheStrategy(cache, slots)
