"""What a target makes of its output embedding's logits: the head learns the distribution that it has in the end."""

import torch
from transformers import PreTrainedModel

from ..target.target import Target
from .losses import LogitShape


CLOSE = 0.02  # of the logits' spread, in root mean square: what rounding in bfloat16 may leave
STEEP = 0.9  # of a soft cap: beyond it the capped logit says little about the one before


@torch.no_grad()
def logit_shape(target: Target) -> LogitShape:
    """
    Scale and soft cap of the target's logits, found by comparing them with those of its output embedding.

    Raises:
        ValueError: If they are made in another way, so that a head cannot be taught from hidden states.
    """
    model, projection, cap = target.model, target.plain_output_rows(None), _soft_cap(target.model)
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
        raise ValueError(
            f"the logits of `{model.config.model_type}` are not those of its output embedding, scaled or soft-capped "
            f"(they differ by {off:.0%} of their spread), so a head cannot be taught from its hidden states; give a "
            "target whose language model head is one linear layer"
        )
    return shape


def _soft_cap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)  # few have the field
