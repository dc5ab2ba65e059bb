"""The draft as one function of fixed shapes: head, ranking, branch scores, context n-grams, best tree.

`torch.compile` captures it whole, since nothing in it depends on values that the host would have to wait for. It runs
the functions that draft on any device; `transfer.must_not_wait` says which variant of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from ..head.cache import StaticHeadCache
from ..head.modeling_jetflow import JetFlowHead
from ..target.target import Target
from ..trees.recycled import RecycledChoices
from ..trees.tree import DraftTree


if TYPE_CHECKING:
    from .drafter import JetFlowCandidateGenerator


@dataclass
class CapturedDraft:
    """A draft that comes as a tree."""

    tree: DraftTree

    def best_tree(self, *_limits: object) -> DraftTree:
        """
        The tree, within the limits of all rounds: one graph drafts for all of them.

        The policy trims it to this round's node budget. This round's other limits would save no work by then, and a
        node beyond them costs a row, never a token: the walk ends where the text does.
        """
        return self.tree


def is_on_one_device(head: JetFlowHead, target: Target) -> bool:
    """Whether the head and the target's embeddings lie on the device of the tokens."""
    modules = (head, target.model.get_input_embeddings(), target.model.get_output_embeddings())
    return {weight.device for module in modules for weight in module.parameters()} == {target.device}


def draft_tree(
    drafter: "JetFlowCandidateGenerator",
    newest_ids: torch.Tensor,
    positions: torch.Tensor,
    features: torch.Tensor,
    first_positions: torch.Tensor,
    recycled: RecycledChoices | None,
    noise: torch.Tensor | None,
    cache: StaticHeadCache,
    node_budget: int,
    max_depth: int,
    width: int,
    max_continued: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best tree of one head forward.

    Args:
        newest_ids (`torch.Tensor`, (batch, seq)): The newest committed tokens, the anchor last; -1 in front.
        positions (`torch.Tensor`, (batch,)): The anchors' absolute positions.
        features (`torch.Tensor`, (batch, rows, taps x target_hidden)): Of the tokens in front of the anchor that the
            cache lacks, then padding; the cache counts them.
        first_positions (`torch.Tensor`, (batch,)): Positions of the first rows; one by one, the others follow.
        recycled ([`RecycledChoices`], *optional*): Of the tree before, grown to `node_budget` nodes.
        noise (`torch.Tensor`, (batch, max_depth, vocab), *optional*): Of the next draws.
        node_budget, max_depth, width, max_continued: See [`~policy.TreeLimits`].

    Returns:
        Tokens, parents and depths (3, batch, nodes), and their log-probabilities (batch, nodes).
    """
    # No row sees a context row that is not before its anchor, such as padding.
    offsets = torch.arange(features.shape[1], device=first_positions.device)
    context_position_ids = first_positions[:, None] + offsets
    rows = drafter.read_block(newest_ids[:, -1:], positions, features, context_position_ids, cache, max_depth)
    cache.count_rows(positions[0] - first_positions[0])
    draft = drafter.ranker.rank(rows, newest_ids, width, recycled, noise)
    tree = draft.best_tree(node_budget, width, max_continued=max_continued)
    return torch.stack([tree.tokens, tree.parents, tree.depths]), tree.logprobs


def as_draft(outputs: tuple[torch.Tensor, ...], max_depth: int) -> CapturedDraft:
    """The draft that `draft_tree` returned. Copied: a CUDA graph overwrites its outputs when another one runs."""
    nodes, logprobs = (output.clone() for output in outputs)
    tokens, parents, depths = nodes.unbind()
    return CapturedDraft(DraftTree(tokens, parents, depths, logprobs, max_depth))


# Of each head that is in use and was compiled: the static cache of its latest call, unless a call is using it.
IDLE_CACHES: WeakKeyDictionary[JetFlowHead, tuple[torch.device, torch.dtype, StaticHeadCache]] = WeakKeyDictionary()


def static_cache(head: JetFlowHead, capacity: int, is_compiled: bool) -> StaticHeadCache:
    """An empty cache, at the same addresses as in the call before if it fits."""
    if is_compiled:  # a power of two, so that texts of similar lengths share a graph
        capacity = max(1 << (capacity - 1).bit_length(), 512)
    device, dtype, cache = IDLE_CACHES.pop(head, (None, None, None))
    if cache is None or (device, dtype, cache.capacity) != (head.device, head.dtype, capacity):
        return StaticHeadCache(head.config.num_hidden_layers, capacity, head.device)
    cache.reset()
    return cache


def keep_static_cache(head: JetFlowHead, cache: StaticHeadCache) -> None:
    """Leave a cache, whose addresses captured functions hold on to, for the head's next call."""
    IDLE_CACHES[head] = (head.device, head.dtype, cache)
