"""The training loss: forward KL to the target's distribution, chunked over rows (arXiv 2606.18394, section 3.3).

The output projection is frozen, so the gradient with respect to the head's rows is formed chunk by chunk in the
forward pass and no logits survive it: the logits are the memory peak of training.
"""

from dataclasses import dataclass

import torch


@dataclass
class KLResult:
    """What one call of `chunked_forward_kl` yields, per row."""

    loss: torch.Tensor  # scalar, weighted sum over rows, differentiable
    divergence: torch.Tensor  # (rows,), unweighted KL in nats
    is_top1: torch.Tensor  # (rows,), whether head and target rank the same token first


class _ChunkedForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, teacher_rows, projection, row_weights, temperature, chunk_size):  # type: ignore[no-untyped-def]
        divergence = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        is_top1 = torch.empty(rows.shape[0], dtype=torch.bool, device=rows.device)
        gradient = torch.empty_like(rows)
        for start in range(0, rows.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            logits = (rows[part].to(projection.dtype) @ projection.T).float()
            teacher = (teacher_rows[part].to(projection.dtype) @ projection.T).float()
            is_top1[part] = logits.argmax(-1) == teacher.argmax(-1)
            log_q = torch.log_softmax(logits / temperature, -1)
            log_p = torch.log_softmax(teacher / temperature, -1)
            p = log_p.exp()
            divergence[part] = (p * (log_p - log_q)).sum(-1)
            # d KL / d logits = (q - p) / T; the loss is scaled by T^2.
            slope = (log_q.exp() - p) * (temperature * row_weights[part])[:, None]
            gradient[part] = (slope.to(projection.dtype) @ projection).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(divergence, is_top1)
        return (divergence * row_weights).sum() * temperature**2, divergence, is_top1

    @staticmethod
    def backward(ctx, grad_loss, _grad_divergence, _grad_top1):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None, None, None


def chunked_forward_kl(
    rows: torch.Tensor,
    teacher_rows: torch.Tensor,
    projection: torch.Tensor,
    row_weights: torch.Tensor,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> KLResult:
    """
    Weighted sum over rows of T^2 KL(target || head), both seen through the same frozen output projection.

    Args:
        rows (`torch.Tensor`, (rows, hidden)): The head's normed rows.
        teacher_rows (`torch.Tensor`, (rows, hidden)): The target's normed last hidden states at the same predictions.
        projection (`torch.Tensor`, (draft_vocab, hidden)): Rows of the target's output embedding that are scored.
        row_weights (`torch.Tensor`, (rows,)): Weight of each row; they should sum to one for a mean.
        temperature (`float`): Distillation temperature T.
        chunk_size (`int`): Rows whose logits exist at a time.

    Returns:
        `KLResult`: The loss and per-row figures.
    """
    loss, divergence, is_top1 = _ChunkedForwardKL.apply(
        rows, teacher_rows, projection, row_weights, temperature, chunk_size
    )
    return KLResult(loss, divergence, is_top1)


def feature_loss(rows: torch.Tensor, teacher_rows: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean squared error to the target's normed states, in units of the variance of rows that count."""
    teacher = teacher_rows.float()
    scale = teacher[row_weights > 0].var().clamp_min(1e-12)
    return ((rows.float() - teacher).square().mean(-1) * row_weights).sum() / scale


def depth_weights(num_depths: int, gamma: float | None, device: torch.device | None = None) -> torch.Tensor:
    """exp(-(depth - 1) / gamma) for depths 1 .. `num_depths`; all ones without gamma. Shape (num_depths,)."""
    steps = torch.arange(num_depths, dtype=torch.float32, device=device)
    return torch.ones_like(steps) if gamma is None else torch.exp(-steps / gamma)
