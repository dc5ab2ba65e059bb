"""
Attention of a draft tree behind a long prefix, in two parts.

All nodes see the whole prefix, so a kernel without a mask can read it; only the nodes among themselves need the
ancestor mask. The prefix then enters the nodes' softmax as one more key: its score is the log-sum-exp of the prefix's
scores, its value is the attention to the prefix. On a GPU, kernels without a mask divide a long prefix among all
processors; those with a mask do not.
"""

import torch


# Cached tokens from which two parts are used. On the CPU they then take 0.85 to 1.0 of the time of one masked kernel
# (docs/did-not-help.md). For a GPU it is an assumption, never measured: behind a shorter prefix a forward waits for
# kernel launches, of which two parts need more.
MIN_PREFIX = 8192


def can_split(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_nodes: int) -> bool:
    """
    Whether `split_sdpa` should be used: the prefix is long, and the device has a kernel for it.

    Only for rows without padding: a static cache, whose unused rows a mask hides, stays with one masked kernel.
    """
    prefix, dim = key.shape[2] - num_nodes, query.shape[-1]
    if prefix < max(1, MIN_PREFIX) or value.shape[-1] != dim:
        return False
    if query.device.type != "cuda":
        return query.device.type == "cpu"
    call = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    return dim % 8 == 0 and torch.backends.cuda.can_use_flash_attention(call)


def split_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, node_mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """
    Attention to all keys but the last `nodes`, which all rows see, and to these under a mask.

    Args:
        query (`torch.Tensor`, (1, key_value_heads, rows, dim)): The query heads of a key/value head are rows.
        key, value (`torch.Tensor`, (1, key_value_heads, keys, dim)).
        node_mask (`torch.Tensor`, (1, 1, rows, nodes)): Added to the scores of the nodes; each row sees one at least.
            The scores have its type: float32, as inside the kernels, or float64.

    Returns:
        `torch.Tensor`, (1, key_value_heads, rows, dim).
    """
    nodes = node_mask.shape[-1]
    prefix = key.shape[2] - nodes
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output, log_sum = _unmasked(query, key[:, :, :prefix], value[:, :, :prefix], scaling)
    states = (each[0].to(node_mask.dtype) for each in (query, key[:, :, prefix:], value[:, :, prefix:]))
    node_query, node_key, node_value = states
    scores = torch.baddbmm(node_mask[0], node_query, node_key.transpose(1, 2), alpha=scaling)
    weights = torch.cat([scores, log_sum[0, ..., None]], dim=-1).softmax(dim=-1)
    merged = torch.baddbmm(weights[..., nodes:] * output[0], weights[..., :nodes], node_value)
    return merged.to(query.dtype)[None]


def _unmasked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all rows to all keys, and the log-sum-exp of each row's scores, (1, heads, rows)."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scaling)
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scaling)[:2]
