"""`TargetEmbeddings`: the target's input and output embeddings, which a head without its own borrows."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import JetFlowError


class TargetEmbeddings:
    """
    Args:
        model (`PreTrainedModel`): The target.
        scale (`float`, *optional*): Factor of the input embeddings that the head was trained with, in place of the
            target's own.
        mask_token_id (`int`, *optional*): Token of the head's MASK rows.
    """

    def __init__(self, model: PreTrainedModel, scale: float | None, mask_token_id: int | None):
        self._model, self._scale, self._mask_token_id = model, scale, mask_token_id

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The target's embeddings of tokens, (..., hidden), scaled as the head was trained with."""
        module, scale = self._model.get_input_embeddings(), self._scale
        return module(input_ids) if scale is None else nn.functional.embedding(input_ids, module.weight) * scale

    def embed_block(
        self, input_ids: torch.Tensor, is_anchor: torch.Tensor, mask_embedding: torch.Tensor | None
    ) -> torch.Tensor:
        """Input rows of the head, (batch, rows, hidden): `input_ids` where `is_anchor`, MASK elsewhere."""
        if mask_embedding is None:
            assert self._mask_token_id is not None
            return self.embed(torch.where(is_anchor, input_ids, self._mask_token_id))
        embeds = self.embed(input_ids)
        return torch.where(is_anchor[..., None], embeds, mask_embedding.to(embeds))

    def output_rows(self, token_ids: torch.Tensor | None) -> torch.Tensor | None:
        """
        Rows (draft_vocab, hidden) of the target's output embedding; `None` where it is not a plain linear layer, or
        its weight is quantized, sharded or not in memory.
        """
        module = self._model.get_output_embeddings()
        if type(module) is not nn.Linear or module.bias is not None:
            return None
        if type(module.weight) is not nn.Parameter or module.weight.is_meta:
            return None
        return module.weight if token_ids is None else module.weight[token_ids.to(module.weight.device)]

    def plain_output_rows(self, token_ids: torch.Tensor | None) -> torch.Tensor:
        """`output_rows`, for uses that cannot do without them."""
        rows = self.output_rows(token_ids)
        if rows is None:
            kind = type(self._model.get_output_embeddings()).__name__
            raise JetFlowError(
                f"the target's output embedding is a `{kind}`, but the loss needs a plain linear layer without bias; "
                "load the target unquantized"
            )
        return rows

    def output_logits(self, rows: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """Logits (..., draft_vocab) by the target's own output module, whatever it is (quantized, biased, ...)."""
        logits = self._model.get_output_embeddings()(rows)
        return logits if token_ids is None else logits[..., token_ids.to(logits.device)]
