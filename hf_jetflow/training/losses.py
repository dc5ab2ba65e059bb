"""The training loss of each row: forward KL to the target's distribution, in chunks (arXiv 2606.18394, section 3.3).

The output projection is frozen, so the forward pass computes the gradient of the head's rows chunk by chunk and
stores no logits: the logits are the memory peak of training.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..errors import JetFlowError
from ..target.target import Target
from ..trees.tree import corrected_logprobs, with_rest


@dataclass(frozen=True)
class LogitShape:
    """How a target shapes the logits of its output embedding: times `scale`, then `cap * tanh(x / cap)`."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


IDENTITY = LogitShape()
CLOSE = 0.02  # largest root mean square error, relative to the logits' spread: rounding in bfloat16
STEEP = 0.9  # share of a soft cap above which the logit before the cap cannot be recovered


@dataclass
class KLResult:
    """Results of `chunked_forward_kl`, per row. Tokens are row indices of the projection."""

    divergence: torch.Tensor  # (rows,), KL in nats, differentiable
    teacher_tokens: torch.Tensor  # (rows,), the target's first choice
    candidates: torch.Tensor  # (rows, num_candidates), the head's first choices, best first
    logprobs: torch.Tensor  # (rows, num_candidates), the head's log-probabilities of them
    teacher_logprobs: torch.Tensor  # (rows, num_candidates), the target's

    @property
    def is_top1(self) -> torch.Tensor:
        """Whether head and target rank the same token first, (rows,)."""
        return self.candidates[:, 0] == self.teacher_tokens


class _ChunkedForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows, teacher_rows, projection, temperature, num_candidates, chunk_size, teacher_shape
    ):
        new = rows.new_empty
        divergence = new(rows.shape[0], dtype=torch.float32)
        teacher_tokens = new(rows.shape[0], dtype=torch.long)
        candidates = new(rows.shape[0], num_candidates, dtype=torch.long)
        logprobs = new(rows.shape[0], num_candidates, dtype=torch.float32)
        teacher_logprobs = torch.empty_like(logprobs)
        gradient = torch.empty_like(rows)
        for start in range(0, rows.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            logits = (rows[part].to(projection.dtype) @ projection.T).float()
            teacher = teacher_shape((teacher_rows[part].to(projection.dtype) @ projection.T).float())
            teacher_tokens[part] = teacher.argmax(-1)
            best = logits.topk(num_candidates)
            candidates[part] = best.indices
            logprobs[part] = best.values - logits.logsumexp(-1, keepdim=True)
            teacher_logprobs[part] = teacher.gather(-1, best.indices) - teacher.logsumexp(-1, keepdim=True)
            log_q = torch.log_softmax(logits / temperature, -1)
            log_p = torch.log_softmax(teacher / temperature, -1)
            p = log_p.exp()
            divergence[part] = (p * (log_p - log_q)).sum(-1)
            slope = (log_q.exp() - p) / temperature  # d KL / d logits
            gradient[part] = (slope.to(projection.dtype) @ projection).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        facts = teacher_tokens, candidates, logprobs, teacher_logprobs
        ctx.mark_non_differentiable(*facts)
        return divergence, *facts

    @staticmethod
    def backward(ctx, grad_divergence, *_):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_divergence[:, None]).to(gradient.dtype), *[None] * 6


def chunked_forward_kl(
    rows: torch.Tensor,
    teacher_rows: torch.Tensor,
    projection: torch.Tensor,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    num_candidates: int = 1,
    teacher_shape: LogitShape = IDENTITY,
) -> KLResult:
    """
    KL(target || head) of each row, both seen through the same frozen output projection.

    Args:
        rows (`torch.Tensor`, (rows, hidden)): The head's normed rows.
        teacher_rows (`torch.Tensor`, (rows, hidden)): The target's normed last hidden states at the same predictions.
        projection (`torch.Tensor`, (draft_vocab, hidden)): Rows of the target's output embedding that are scored.
        temperature (`float`): Distillation temperature T.
        chunk_size (`int`): Rows whose logits are in memory at a time.
        num_candidates (`int`): Candidates per row whose log-probabilities are returned, at most the draft vocabulary.
        teacher_shape ([`LogitShape`]): Scale and soft cap that the target applies to the projection's logits.

    Returns:
        `KLResult`: Figures by row.
    """
    sizes = temperature, num_candidates, chunk_size
    return KLResult(*_ChunkedForwardKL.apply(rows, teacher_rows, projection, *sizes, teacher_shape))


class _CandidateLogits(torch.autograd.Function):
    """Logits of chosen tokens. All logits are computed, chunk by chunk: faster than gathering embeddings."""

    @staticmethod
    def forward(ctx, rows, tokens, projection, chunk_size):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tokens, projection)
        ctx.chunk_size, ctx.dtype = chunk_size, rows.dtype
        parts = zip(rows.to(projection.dtype).split(chunk_size), tokens.split(chunk_size), strict=True)
        return torch.cat([(part @ projection.T).gather(1, chosen) for part, chosen in parts]).float()

    @staticmethod
    def backward(ctx, grad_logits):  # type: ignore[no-untyped-def]
        tokens, projection = ctx.saved_tensors
        gradient = []
        for part, chosen in zip(grad_logits.split(ctx.chunk_size), tokens.split(ctx.chunk_size), strict=True):
            spread = projection.new_zeros(len(part), len(projection))
            gradient.append(spread.scatter_(1, chosen, part.to(projection.dtype)) @ projection)
        return torch.cat(gradient).to(ctx.dtype), None, None, None


def correction_kl(
    kl: KLResult, shifts: torch.Tensor, projection: torch.Tensor, chunk_size: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Forward KL of the corrected scores of each row's candidates.

    As in drafting, the distributions have `num_candidates + 1` outcomes: the candidates, and any other token.

    Args:
        kl ([`KLResult`]): The rows' candidates and both sides' log-probabilities of them.
        shifts (`torch.Tensor`, (rows, hidden)): The correction's shift of each row, differentiable.
        projection (`torch.Tensor`, (draft_vocab, hidden)): Rows of the target's output embedding that are scored.
        chunk_size (`int`): Rows whose logits are in memory at a time.

    Returns:
        Divergences (rows,) in nats, differentiable, and whether the corrected scores rank the target's first choice
        first (rows,).
    """
    changes = _CandidateLogits.apply(shifts, kl.candidates, projection, chunk_size)
    log_q, log_p = corrected_logprobs(with_rest(kl.logprobs), changes), with_rest(kl.teacher_logprobs)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    best = kl.candidates.gather(1, log_q[..., :-1].argmax(-1, keepdim=True))[:, 0]
    return divergence, best == kl.teacher_tokens


def feature_errors(rows: torch.Tensor, teacher_rows: torch.Tensor) -> torch.Tensor:
    """
    Mean squared error of each row to the target's normed state, in units of that state's variance; (rows,).

    The variance is per row, so that a row's gradient does not depend on the other rows of its micro-batch.
    """
    teacher = teacher_rows.float()
    return (rows.float() - teacher).square().mean(-1) / teacher.var(-1).clamp_min(1e-12)


def depth_weights(num_depths: int, gamma: float | None, device: torch.device | None = None) -> torch.Tensor:
    """exp(-(depth - 1) / gamma) for depths 1 .. `num_depths`; all ones without gamma. Shape (num_depths,)."""
    steps = torch.arange(num_depths, dtype=torch.float32, device=device)
    return torch.ones_like(steps) if gamma is None else torch.exp(-steps / gamma)


@torch.no_grad()
def logit_shape(target: Target) -> LogitShape:
    """
    Infer the target's logit scale and soft cap, so that the head learns the distribution the target samples from.

    The logits of a short text are compared with those of the output embedding.

    Raises:
        JetFlowError: If the logits are computed in another way, so that hidden states cannot teach a head.
    """
    model, projection, cap = target.model, target.embeddings.plain_output_rows(None), _soft_cap(target.model)
    input_ids = torch.arange(3, 19, device=target.device)[None]
    raw = (target.states(input_ids)[1][0].to(projection.dtype) @ projection.T).float()
    logits = model(input_ids=input_ids, use_cache=False).logits[0].float()
    before = logits
    if cap is not None:
        before = cap * torch.atanh((logits / cap).clamp(-STEEP, STEEP))
        raw_fitted, before = (part[logits.abs() < STEEP * cap] for part in (raw, before))
    else:
        raw_fitted = raw
    shape = LogitShape(scale=float((before * raw_fitted).sum() / raw_fitted.square().sum()), cap=cap)
    off = float((shape(raw) - logits).square().mean().sqrt() / logits.std())
    if not off <= CLOSE:
        raise JetFlowError(
            f"the logits of `{model.config.model_type}` are not those of its output embedding, scaled or soft-capped "
            f"(they differ by {off:.0%} of their spread), so its hidden states cannot teach a head; give a target "
            "whose language model head is one linear layer"
        )
    return shape


def _soft_cap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)  # few have the field
