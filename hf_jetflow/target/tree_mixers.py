"""Recurrent layers over a draft tree, as pure functions of tensors.

A gated linear recurrence along one path is `S_n = a_n S_parent + k_n d_n^T`, read by `o_n = S_n^T q_n`. Unrolled along
all paths at once, it is a few matrix products under the ancestor mask. Node n sees the state before the tree, decayed
along its whole path, and the updates `k_j d_j^T` of its ancestors j, decayed along the path from j to n. A delta rule
has `d_n = b_n (v_n - a_n S_parent^T k_n)`, so it takes one triangular solve for all `d`; a state space layer is given
its `d`.

Shapes: nodes in an order with parents first; heads in `groups` that share queries and keys, so these have one head in
each group: (batch, groups, 1, nodes, dim), and everything else (batch, groups, heads, nodes, ...).
"""

from dataclasses import dataclass

import torch


PAIR_ELEMENTS = 2**23  # of the decays between nodes by channel that are held at a time
MIN_LOG_DECAY = -1e4  # exp makes it 0; minus infinity would make sums NaN
MIN_CHANNEL_LOG_DECAY = -40.0  # between two nodes: what is left, 4e-18, is lost in rounding


@dataclass
class Recurrence:
    """What a round computed of a layer; the state after any node follows from it."""

    keys: torch.Tensor  # (batch, groups, 1, nodes, key_dim)
    updates: torch.Tensor  # (batch, groups, heads, nodes, value_dim)
    log_decays: torch.Tensor  # (batch, groups, heads, nodes, 1 or key_dim)
    ancestors: torch.Tensor  # (batch, nodes, nodes) bool: row descends from column, or is it

    def advance(self, state: torch.Tensor, nodes: torch.Tensor) -> None:
        """Replace the states (batch, groups, heads, key_dim, value_dim) before the tree by those after the path to
        `nodes` (batch,), in place; -1 leaves a state as it is."""
        is_on_path = self.ancestors[torch.arange(len(nodes), device=nodes.device), nodes] & (nodes >= 0)[:, None]
        on_path = is_on_path[:, None, None, :, None]
        log_decays = self.log_decays.where(on_path, 0)
        # Summed over what lies behind each node of the path, not subtracted: strong decays would cancel.
        behind = (~self.ancestors).to(log_decays.dtype)[:, None, None] @ log_decays
        keys = (self.keys * behind.exp_()).where(on_path, 0)
        total = on_path.transpose(-1, -2).to(log_decays.dtype) @ log_decays
        after = keys.transpose(-1, -2) @ self.updates
        state.copy_(after.addcmul_(total.exp_().transpose(-1, -2), state.to(after.dtype)))


def gated_delta_rule(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    log_decays: torch.Tensor,
    betas: torch.Tensor,
    state: torch.Tensor,
    ancestors: torch.Tensor,
) -> tuple[torch.Tensor, Recurrence]:
    """
    Read a tree by the gated delta rule.

    Args:
        queries, keys (`torch.Tensor`, (batch, groups, 1, nodes, key_dim)): Normalized and scaled.
        values (`torch.Tensor`, (batch, groups, heads, nodes, value_dim)).
        log_decays (`torch.Tensor`, (batch, groups, heads, nodes, 1 or key_dim)): One for all channels of the key, or
            one for each.
        betas (`torch.Tensor`, (batch, groups, heads, nodes)).
        state (`torch.Tensor`, (batch, groups, heads, key_dim, value_dim)): Before the root.
        ancestors (`torch.Tensor`, (batch, nodes, nodes) bool): Row descends from column, or is it.

    Returns:
        Outputs (batch, groups, heads, nodes, value_dim), and what the state after any node follows from.
    """
    log_decays = log_decays.clamp_min(MIN_LOG_DECAY)
    decays = _total(log_decays, ancestors).exp()
    scores_of = _scalar_scores if log_decays.shape[-1] == 1 else _channel_scores
    key_scores, query_scores = scores_of((keys, queries), keys, log_decays, ancestors)
    betas = betas[..., None]
    updates = torch.linalg.solve_triangular(
        betas * key_scores, betas * (values - (keys * decays) @ state), upper=False, unitriangular=True
    )
    outputs = (queries * decays) @ state + query_scores @ updates
    return outputs, Recurrence(keys, updates, log_decays, ancestors)


def state_space_rule(
    queries: torch.Tensor,
    keys: torch.Tensor,
    updates: torch.Tensor,
    log_decays: torch.Tensor,
    state: torch.Tensor,
    ancestors: torch.Tensor,
) -> tuple[torch.Tensor, Recurrence]:
    """
    Read a tree by a state space layer: `C` as queries, `B` as keys, `dt x` as updates.

    Shapes and result as in [`gated_delta_rule`], with one decay for all channels.
    """
    log_decays = log_decays.clamp_min(MIN_LOG_DECAY)
    (scores,) = _scalar_scores((queries,), keys, log_decays, ancestors)
    decays = _total(log_decays, ancestors).exp()
    outputs = decays * (queries @ state) + scores @ updates
    return outputs, Recurrence(keys, updates, log_decays, ancestors)


def _total(log_decays: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
    """Log decays summed along each node's own path, of the same shape."""
    return ancestors.to(log_decays.dtype)[:, None, None] @ log_decays


def _scalar_scores(
    rows: tuple[torch.Tensor, ...], keys: torch.Tensor, log_decays: torch.Tensor, ancestors: torch.Tensor
) -> list[torch.Tensor]:
    """Products of rows and keys, decayed between the nodes; (batch, groups, heads, nodes, nodes), 0 off the paths."""
    mask = ancestors[:, None, None]
    # Summed over the nodes that lie between, not subtracted: strong decays would cancel.
    between = (log_decays.transpose(-1, -2) * mask) @ (~mask).to(log_decays.dtype).transpose(-1, -2)
    decays = between.masked_fill(~mask, -torch.inf).exp_()
    return [decays * (row @ keys.transpose(-1, -2)) for row in rows]


def _channel_scores(
    rows: tuple[torch.Tensor, ...], keys: torch.Tensor, log_decays: torch.Tensor, ancestors: torch.Tensor
) -> list[torch.Tensor]:
    """As `_scalar_scores`, with a decay for each channel; a block of rows at a time."""
    total = _total(log_decays.clamp_min(MIN_CHANNEL_LOG_DECAY), ancestors)
    *batch, num_nodes, _ = total.shape
    size = max(PAIR_ELEMENTS // (total.numel() or 1), 1)
    scores = [total.new_zeros(*batch, num_nodes, num_nodes) for _ in rows]
    for start in range(0, num_nodes, size):
        block = slice(start, start + size)
        seen = slice(0, start + size)  # parents come first
        mask = ancestors[:, None, None, block, seen, None]
        decays = (total[..., block, None, :] - total[..., None, seen, :]).masked_fill(~mask, -torch.inf).exp_()
        decays *= keys[..., None, seen, :]
        for score, row in zip(scores, rows, strict=True):
            score[..., block, seen] = (decays @ row[..., block, :, None])[..., 0]
    return scores


def path_windows(parents: torch.Tensor, width: int) -> torch.Tensor:
    """
    The newest `width` inputs along each node's path, (batch, nodes, width), oldest first: indices among `width` inputs
    before the tree, followed by the nodes.

    Args:
        parents (`torch.Tensor`, (batch, nodes)): -1 for the root.
        width (`int`): Of the convolution's state.
    """
    before = torch.arange(-1, width - 1, device=parents.device).clamp_min(0).expand(len(parents), -1)
    previous = torch.cat([before, parents + width], dim=1)
    lineage = [torch.arange(width, previous.shape[1], device=parents.device).expand_as(parents)]
    for _ in range(width - 1):
        lineage.append(previous.gather(1, lineage[-1]))
    return torch.stack(lineage[::-1], dim=-1)


def newest_window(windows: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """The window of one node of each tree, (batch, width); for -1, the inputs before the tree."""
    chosen = windows[torch.arange(len(nodes), device=nodes.device), nodes]
    return chosen.where((nodes >= 0)[:, None], torch.arange(chosen.shape[1], device=nodes.device))


def windows_of(inputs: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """
    Gather inputs by window, (batch, ..., width, channels).

    Args:
        inputs (`torch.Tensor`, (batch, width + nodes, channels)): Those before the tree, then the nodes'.
        windows (`torch.Tensor`, (batch, ..., width)): See `path_windows`.
    """
    batch, num_rows, channels = inputs.shape
    firsts = torch.arange(0, batch * num_rows, num_rows, device=windows.device)
    index = windows + firsts.view(-1, *[1] * (windows.ndim - 1))
    return inputs.reshape(-1, channels).index_select(0, index.flatten()).view(*windows.shape, channels)


def tree_convolution(
    inputs: torch.Tensor, windows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """
    A causal depthwise convolution along each node's path, (batch, nodes, channels).

    Args:
        inputs, windows: See `windows_of`; the width is at least the kernel's.
        weight (`torch.Tensor`, (channels, kernel)).
        bias (`torch.Tensor`, (channels,), *optional*).
    """
    outputs = (windows_of(inputs, windows[..., -weight.shape[1] :]) * weight.T).sum(-2)
    return outputs if bias is None else outputs + bias
