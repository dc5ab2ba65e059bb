"""Attention masks of a verify: each node sees the prefix, its ancestors and itself."""

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from ..head.masks import additive_mask
from ..trees.tree import DraftTree, ancestor_mask
from .caches import cache_windows
from .layer_kinds import Window


if TYPE_CHECKING:
    from .prefilled import PrefilledTarget


# Models look up a mask for their recurrent layers, too. It would hide padding only, so there is none.
NO_MASKS = dict.fromkeys(("linear_attention", "conv"))


def tree_masks(prefilled: "PrefilledTarget", tree: DraftTree) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
    """
    The mask for the model's forward: one tensor, or one per kind of layer where the model has several.

    A lone root needs none, as in plain decoding, unless there is padding.
    """
    lengths, device = prefilled.slots.lengths, prefilled.target.device
    if tree.num_nodes == 1 and prefilled.padding is None and len(set(lengths.tolist())) == 1:
        return None
    depths, sees_node = tree.depths.to(device), tree.ancestor_mask.to(device)
    is_pad, longest = prefilled.padding_of_active, int(lengths.max())

    def mask_of(window: Window | None) -> torch.Tensor:
        max_cached = _max_cached_rows(prefilled, window)
        num_keys = tree.num_nodes + (longest if max_cached is None else min(longest, max_cached))
        mask = _tree_mask(
            depths, sees_node, prefilled.lengths_and_positions(device), is_pad, num_keys, window, max_cached
        )
        mask = _in_dtype(mask, prefilled.mask_dtype)
        if window is None and is_pad is None and len(mask) == 1:
            mask._jetflow_nodes = sees_node[:, None]  # type: ignore[attr-defined]  # read by `grouped_sdpa`
        return mask

    return by_kind({kind: mask_of(window) for kind, window in prefilled.target.windows.items()})


def static_inputs(
    nodes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    lengths_and_positions: torch.Tensor,
    is_pad: torch.Tensor | None,
    sizes: tuple[int, int, int],
    windows: tuple[Window | None, ...],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """
    Inputs of a forward with a static cache, as a function of fixed shapes, which can be captured.

    Args:
        nodes: Tokens, parents and depths of a tree, (nodes,) each.
        lengths_and_positions (`torch.Tensor`, (2, 1)): Cached tokens, and the anchor's position.
        is_pad (`torch.Tensor`, (1, prompt), *optional*): Where the prompt was padded.
        sizes: Rows of the forward, keys of the cache, and the deepest level of the tree.
        windows: Of each kind of layer.
        dtype (`torch.dtype`): Of the masks.

    Returns:
        Ids and positions (2, 1, rows), and the mask (1, 1, rows, keys) of each kind. Rows behind the nodes are
        padding, as children of the root.
    """
    num_rows, num_keys, max_depth = sizes
    tokens, parents, depths = pad(torch.stack(nodes), (0, num_rows - len(nodes[0])))[:, None].unbind()
    sees_node = ancestor_mask(parents, max_depth)
    masks = [_tree_mask(depths, sees_node, lengths_and_positions, is_pad, num_keys, window) for window in windows]
    position_ids = lengths_and_positions[1, :, None] + depths
    return torch.stack([tokens, position_ids]), *(_in_dtype(mask, dtype) for mask in masks)


def by_kind(masks: dict[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor | None]:
    """Masks of the kinds of layers, as the model's forward takes them."""
    return {**NO_MASKS, **masks} if len(masks) > 1 else next(iter(masks.values()))


def padding_mask(prefilled: "PrefilledTarget", tree: DraftTree) -> torch.Tensor | None:
    """(1, keys): 0 for the prompt's padding, as in plain decoding; `None` without padding. All that a target which
    verifies chains needs to know."""
    if prefilled.padding is None:
        return None
    num_new = int(prefilled.slots.lengths) + tree.num_nodes - prefilled.padding.shape[1]
    return pad((~prefilled.padding).long(), (0, num_new), value=1).to(prefilled.target.device)


def _tree_mask(
    depths: torch.Tensor,
    sees_node: torch.Tensor,
    lengths_and_positions: torch.Tensor,
    is_pad: torch.Tensor | None,
    num_keys: int,
    window: Window | None,
    max_cached: int | None = None,
) -> torch.Tensor:
    """(batch, 1, nodes, keys) bool: a node sees the prefix within the window in positions, its ancestors and itself.

    No node sees the keys behind a sequence's nodes.
    """
    nodes, device = depths.shape[1], depths.device
    key_indices = torch.arange(num_keys, device=device)
    lengths, positions = lengths_and_positions[..., None].unbind()
    cached = lengths if max_cached is None else lengths.clamp_max(max_cached)
    is_seen = key_indices < cached
    if is_pad is not None:
        indices = key_indices + lengths - cached
        is_prompt = indices < is_pad.shape[1]
        is_seen = is_seen & ~(is_prompt & is_pad.gather(1, indices.clamp_max(is_pad.shape[1] - 1)))
    sees_prefix = is_seen[:, None].expand(-1, nodes, -1)
    if window is not None:
        # A cached row's distance is counted in positions: the last one lies directly before the anchor.
        key_positions = positions - cached + key_indices
        node_positions = positions + depths
        sees_prefix = sees_prefix & window.sees(node_positions[:, :, None], key_positions[:, None])
        sees_node = sees_node & window.sees(node_positions[:, :, None], node_positions[:, None])
    node_indices = cached + torch.arange(nodes, device=device)
    return sees_prefix.scatter(2, node_indices[:, None].expand_as(sees_node), sees_node)[:, None]


def _in_dtype(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return mask if dtype == torch.bool else additive_mask(mask, dtype)


def _max_cached_rows(prefilled: "PrefilledTarget", window: Window | None) -> int | None:
    """Maximum number of rows that a layer with this window returns from the cache in front of the nodes; `None` if
    all."""
    if window is not None and window.size in cache_windows(prefilled.cache):
        return window.size - 1
    return None
