"""Weights that drafting reads in a form of its own: rows of the output embedding, and copies laid out for the CPU.

They are stored for each pair of head and target that is still in use, and made again when a tensor they were made of
has changed. Every generate call that drafts checks this once.
"""

from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from ..head.modeling_jetflow import JetFlowHead
from ..laid_out import LaidOutWeights, TensorFingerprint
from ..target.target import Target


class DraftWeights:
    """The weights of one head and target, as of the latest `refresh`."""

    def __init__(self) -> None:
        # The output embedding; `None` where the target's is not a plain matrix: then its own module is called.
        self.projection: nn.Linear | None = None
        # The target's, (vocab, hidden), where the projection consists of its rows.
        self.output_embedding: torch.Tensor | None = None
        self._made_of: list[TensorFingerprint] = []
        self._laid_out = LaidOutWeights()
        self._version: int | None = None

    def refresh(self, head: JetFlowHead, target: Target) -> None:
        """Recompute what has changed."""
        if self._version != head._weights_version:
            self._made_of, self._laid_out, self._version = [], LaidOutWeights(), head._weights_version
        self.output_embedding = None if head.lm_head is not None else target.embeddings.output_rows(None)
        self.projection = head.lm_head if head.lm_head is not None else self._projection(head.draft_token_ids)
        layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
        if self._made_of and self.projection is not None:
            layers.append(self.projection)
        self._laid_out.refresh(layers)

    def _projection(self, token_ids: torch.Tensor | None) -> nn.Linear | None:
        whole = self.output_embedding
        if whole is None:
            return None
        if token_ids is None:  # shares the target's memory, so it is never stale
            known = self.projection
            is_same = known is not None and known.weight.is_set_to(whole)
            return known if is_same else _linear(whole)
        sources = [whole, token_ids]
        if not self._made_of or not all(map(TensorFingerprint.matches, self._made_of, sources)):
            self._made_of = [TensorFingerprint.of(source) for source in sources]
            return _linear(whole[token_ids.to(whole.device)])
        return self.projection

    def in_use(self) -> AbstractContextManager[None]:
        """Inside, the head's layers and the projection read their laid-out copies."""
        return nullcontext() if torch.compiler.is_compiling() else self._laid_out.in_use()


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer


_STORED: WeakKeyDictionary[JetFlowHead, WeakKeyDictionary[PreTrainedModel, DraftWeights]] = WeakKeyDictionary()


@torch.no_grad()
def draft_weights(head: JetFlowHead, target: Target) -> DraftWeights:
    """The current draft weights of a head and a target."""
    weights = _STORED.setdefault(head, WeakKeyDictionary()).setdefault(target.model, DraftWeights())
    weights.refresh(head, target)
    return weights
