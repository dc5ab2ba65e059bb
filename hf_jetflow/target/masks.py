"""Attention masks of a verify: each node sees the prefix, its ancestors and itself."""

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from ..head.masks import additive_mask
from ..transfer import to_device
from ..trees.tree import DraftTree
from .caches import cache_windows
from .layer_kinds import Window


if TYPE_CHECKING:
    from .context import Context


# Models look up their recurrent layers' kinds, too, which mask padding only.
NO_MASKS = dict.fromkeys(("linear_attention", "conv"))


def tree_masks(context: "Context", tree: DraftTree) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
    """
    The mask for the model's forward: one tensor, or one per kind of layer where the model has several.

    A lone root needs none, as in plain decoding, unless there is padding.
    """
    is_even = context.padding is None and len(set(context.slots.lengths.tolist())) == 1
    if tree.num_nodes == 1 and is_even and context.strategy.capacity is None:
        return None
    masks = {kind: _tree_mask(context, tree, window) for kind, window in context.target.windows.items()}
    if context.mask_dtype != torch.bool:
        masks = {kind: additive_mask(mask, context.mask_dtype) for kind, mask in masks.items()}
    return {**NO_MASKS, **masks} if len(masks) > 1 else next(iter(masks.values()))


def padding_mask(context: "Context", tree: DraftTree) -> torch.Tensor | None:
    """(1, keys): 0 for the prompt's padding, as in plain decoding; `None` without padding. All that a target which
    verifies chains needs to know."""
    if context.padding is None:
        return None
    num_new = int(context.slots.lengths) + tree.num_nodes - context.padding.shape[1]
    return pad((~context.padding).long(), (0, num_new), value=1).to(context.target.device)


def _tree_mask(context: "Context", tree: DraftTree, window: Window | None) -> torch.Tensor:
    """(batch, 1, rows, keys) bool: a node sees the prefix within the window in positions, its ancestors and itself.

    No row sees the slots behind a sequence's nodes. With a static cache, rows that pad see what the root sees.
    """
    nodes, device, max_cached = tree.num_nodes, context.target.device, _max_cached_rows(context, window)
    longest = int(context.slots.lengths.max())
    slots = torch.arange(longest if max_cached is None else min(longest, max_cached), device=device)
    lengths, positions = context.lengths_and_positions(device)[..., None].unbind()
    cached = lengths if max_cached is None else lengths.clamp_max(max_cached)
    is_seen = slots < cached
    if context.padding is not None:
        is_pad = context.padding[to_device(context.slots.active, context.padding.device)].to(device)
        indices = slots + lengths - cached
        is_prompt = indices < is_pad.shape[1]
        is_seen = is_seen & ~(is_prompt & is_pad.gather(1, indices.clamp_max(is_pad.shape[1] - 1)))
    sees_prefix = is_seen[:, None].expand(-1, nodes, -1)
    sees_node = tree.ancestor_mask.to(device)
    if window is not None:
        # A cached row's distance is counted in positions: the last one lies directly before the anchor.
        slot_positions = positions - cached + slots
        node_positions = positions + tree.depths.to(device)
        sees_prefix = sees_prefix & window.sees(node_positions[:, :, None], slot_positions[:, None])
        sees_node = sees_node & window.sees(node_positions[:, :, None], node_positions[:, None])
    node_slots = cached + torch.arange(nodes, device=device)
    mask = pad(sees_prefix, (0, nodes)).scatter_(2, node_slots[:, None].expand_as(sees_node), sees_node)
    if (capacity := context.strategy.capacity) is not None:
        mask = torch.cat([mask, mask[:, :1].expand(-1, context.strategy.num_rows(nodes) - nodes, -1)], dim=1)
        mask = pad(mask, (0, capacity - mask.shape[2]))
    mask = mask[:, None]
    if window is None and context.padding is None and capacity is None and len(mask) == 1:
        mask._jetflow_nodes = sees_node[:, None]  # type: ignore[attr-defined]
    return mask


def _max_cached_rows(context: "Context", window: Window | None) -> int | None:
    """Maximum number of rows that a layer with this window returns from the cache in front of the nodes; `None` if
    all."""
    if window is not None and window.size in cache_windows(context.cache):
        return window.size - 1
    return None
