"""What drafting reads beside the head's own modules: the output embedding's rows, and weights laid out for the CPU.

Kept for each pair of head and target that is still in use, and made anew when a tensor it was made of has changed.
"""

from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from ..head.linear import DraftLinear, Imprint, LaidOutWeights
from ..head.modeling_jetflow import JetFlowHead
from ..target.target import Target


class DraftWeights:
    """Those of one head and target, as they were at the latest `refresh`."""

    def __init__(self) -> None:
        # The output embedding; `None` where the target's is no plain matrix: then its own module is called.
        self.projection: nn.Linear | None = None
        self._made_of: list[Imprint] = []
        self._laid_out = LaidOutWeights()

    def refresh(self, head: JetFlowHead, target: Target) -> None:
        """Make anew what has changed."""
        self.projection = head.lm_head if head.lm_head is not None else self._projection(head, target)
        modules = dict.fromkeys((*head.modules(), self.projection))
        self._laid_out.refresh(module for module in modules if isinstance(module, DraftLinear))

    def _projection(self, head: JetFlowHead, target: Target) -> nn.Linear | None:
        whole, token_ids = target.output_rows(None), head.draft_token_ids
        if whole is None:
            return None
        sources = [whole] if token_ids is None else [whole, token_ids]
        is_known = self.projection is not None and len(self._made_of) == len(sources)
        if not (is_known and all(made_of.fits(now) for made_of, now in zip(self._made_of, sources, strict=True))):
            self._made_of = [Imprint.of(source) for source in sources]
            if token_ids is None:
                return _linear(nn.Linear, whole)
            return _linear(DraftLinear, whole[token_ids.to(whole.device)])
        return self.projection

    def in_use(self) -> AbstractContextManager[None]:
        """Inside, the head's layers and the projection read what is laid out."""
        return self._laid_out.in_use()


def _linear(kind: type[nn.Linear], weight: torch.Tensor) -> nn.Linear:
    layer = kind(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer


_KEPT: WeakKeyDictionary[JetFlowHead, WeakKeyDictionary[PreTrainedModel, DraftWeights]] = WeakKeyDictionary()


@torch.no_grad()
def draft_weights(head: JetFlowHead, target: Target) -> DraftWeights:
    """Those of a head and a target as they are now."""
    weights = _KEPT.setdefault(head, WeakKeyDictionary()).setdefault(target.model, DraftWeights())
    weights.refresh(head, target)
    return weights
