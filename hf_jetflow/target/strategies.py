"""Cache strategies: what rounds do with the target's cache, by the kind of cache.

`cache_strategy` picks one per generation; commit, roll back and settle need no further case distinction. Between
rounds the cache holds every committed token but the anchors.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import DynamicCache, StaticCache

from ..trees.tree import DraftTree, trim_tree
from .batch_caches import BatchRows, commit_paths, retire_row, settle_batch, spread_layers
from .caches import StaticLayer, commit_path, max_static_nodes, static_rows
from .growing_cache import grow_layers, settle_layers
from .mixer_adapters import TreeMixer, TreeNodes, reading_trees
from .recurrent import RecurrentStates, has_states, record_rows


class CacheStrategy:
    """
    A growing cache of one sequence; the base of the others.

    Args:
        cache (`DynamicCache` or `StaticCache`): The target's, filled by the prefill.
        rows ([`BatchRows`]): How many tokens of each sequence it holds.
    """

    def __init__(self, cache: DynamicCache | StaticCache, rows: BatchRows):
        self.cache, self.rows = cache, rows

    @property
    def max_nodes(self) -> int | None:
        """Nodes that a round can verify; `None` if any number."""
        return None

    @property
    def num_slots(self) -> int | None:
        """Rows of keys that every forward sees, used or not; `None` for a cache that grows."""
        return None

    def num_rows(self, num_nodes: int) -> int:
        """Rows of the forward that verifies `num_nodes` nodes; those beyond the nodes are padding."""
        return num_nodes

    def open(self) -> None:
        """Make the cache ready for rounds; `settle` ends them."""
        grow_layers(self.cache)

    def prepare(self) -> None:
        """Called before each verify: nodes may be rejected."""
        record_rows(self.cache)

    def reading(self, tree: DraftTree) -> AbstractContextManager[None]:
        """Around the forward over a tree's nodes."""
        return nullcontext()

    def commit(self, tree: DraftTree, paths: list[list[int]]) -> None:
        """Keep each sequence's path, compacted behind its prefix, and drop the other nodes."""
        self._commit_path(tree, paths[0])
        self.rows.advance(paths)

    def _commit_path(self, tree: DraftTree, path: list[int]) -> None:
        commit_path(self.cache, path, self.num_rows(tree.num_nodes))

    def roll_back(self, tree: DraftTree) -> None:
        """Drop all nodes of a verified tree, and leave the cache to the caller with the text up to the anchor; of a
        batch, as much as every sequence has."""
        self._commit_path(tree, [])
        self.settle(int(self.rows.lengths.min()))

    def retire(self, index: int) -> None:
        """Go on without the sequence at a batch index; the last active sequence takes its slot."""
        self.rows.retire(index)

    def settle(self, length: int) -> None:
        """Leave the cache as plain decoding does, with `length` tokens of every sequence."""
        settle_layers(self.cache)


class StaticStrategy(CacheStrategy):
    """A static cache of one sequence: forwards have few sizes, one compiled graph each."""

    cache: StaticCache

    @property
    def max_nodes(self) -> int:
        return max_static_nodes(self.num_slots - int(self.rows.lengths))

    @property
    def num_slots(self) -> int:
        return next(layer.max_cache_len for layer in self.cache.layers if isinstance(layer, StaticLayer))

    def num_rows(self, num_nodes: int) -> int:
        return static_rows(num_nodes)

    def open(self) -> None:
        pass

    def settle(self, length: int) -> None:
        pass


class ReplayedStrategy(CacheStrategy):
    """
    A cache with recurrent states of unknown layers: accepted rows of a rejected chain are read once more.

    Args:
        read: Runs the target over the nodes of a chain behind the cache.
    """

    def __init__(self, cache: DynamicCache, rows: BatchRows, read: Callable[[DraftTree], Any]):
        super().__init__(cache, rows)
        self._read = read
        self._states_before: RecurrentStates | None = None  # the newest verify

    def prepare(self) -> None:
        self._states_before = RecurrentStates.copy(self.cache)
        super().prepare()

    def _commit_path(self, tree: DraftTree, path: list[int]) -> None:
        if len(path) < tree.num_nodes:
            assert self._states_before is not None
            commit_path(self.cache, [], tree.num_nodes)
            self._states_before.put_back(self.cache)
            if not path:
                return
            tree = trim_tree(tree, len(path))
            super().prepare()
            self._read(tree)
        super()._commit_path(tree, path)


class BatchStrategy(CacheStrategy):
    """A growing cache of several sequences, which advance by different lengths and leave one by one."""

    def open(self) -> None:
        spread_layers(self.cache, self.rows)

    def commit(self, tree: DraftTree, paths: list[list[int]]) -> None:
        commit_paths(self.cache, self.rows, paths)
        self.rows.advance(paths)

    def roll_back(self, tree: DraftTree) -> None:
        self.rows.recall()  # rows behind the lengths are not taken along
        self.settle(int(self.rows.lengths.min()))

    def retire(self, index: int) -> None:
        retire_row(self.cache, self.rows, index)

    def settle(self, length: int) -> None:
        settle_batch(self.cache, self.rows, length)


class HybridStrategy(CacheStrategy):
    """
    A cache with recurrent states. They stay as they are while a tree is verified, and are moved along the path at
    commit. A lone root is a step of plain decoding, with its kernels.

    Args:
        mixers (`list[TreeMixer]`): The recurrent layers.
    """

    def __init__(self, cache: DynamicCache | StaticCache, rows: BatchRows, mixers: list[TreeMixer]):
        super().__init__(cache, rows)
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
            return self.settle(int(self.rows.lengths))
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
        self.rows.recall()
        lengths = {*self.rows.lengths.tolist()}
        if len(lengths) == 1:
            return super().roll_back(tree)
        self.settle(0)  # states of longer sequences cannot go back: a later call reads everything
        for mixer in self._mixers:
            mixer.forget()
            mixer.states.reset()

    def retire(self, index: int) -> None:
        last = len(self.rows.lengths) - 1
        super().retire(index)
        for mixer in self._mixers:
            mixer.reorder([index, last], [last, index])

    def settle(self, length: int) -> None:
        places = sorted(range(len(self.rows.order)), key=self.rows.order.__getitem__)
        for mixer in self._mixers:
            mixer.reorder(list(range(len(places))), places)
        super().settle(length)


def cache_strategy(
    cache: DynamicCache | StaticCache, rows: BatchRows, mixers: list[TreeMixer], read: Callable[[DraftTree], Any]
) -> CacheStrategy:
    """
    The strategy for a cache that holds the prompts.

    Args:
        rows ([`BatchRows`]): How many tokens of each sequence it holds.
        mixers (`list[TreeMixer]`): The target's recurrent layers, if they read trees.
        read: Runs the target over the nodes of a chain behind the cache.
    """
    is_batch, is_static = len(rows.order) > 1, isinstance(cache, StaticCache)
    if mixers:
        kind = HybridBatchStrategy if is_batch else HybridStaticStrategy if is_static else HybridStrategy
        return kind(cache, rows, mixers)
    if is_batch:
        return BatchStrategy(cache, rows)
    if is_static:
        return StaticStrategy(cache, rows)
    if has_states(cache):
        return ReplayedStrategy(cache, rows, read)
    return CacheStrategy(cache, rows)
