"""`Target`: the only file that calls the target model."""

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_jetflow import JetFlowConfig


class Target:
    def __init__(self, model: PreTrainedModel, head_config: JetFlowConfig):
        self.model = model
        self.head_config = head_config

    @torch.no_grad()
    def states(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (batch, seq, taps x hidden) and normed last hidden states of whole, right-padded sequences."""
        outputs = self.model.base_model(
            input_ids=input_ids, output_hidden_states=self.head_config.hidden_state_indices, use_cache=False
        )
        return self._fuse(outputs.hidden_states), outputs.last_hidden_state

    def _fuse(self, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([hidden_states[index] for index in self.head_config.hidden_state_indices], dim=-1)

    def embed_block(
        self, input_ids: torch.Tensor, is_anchor: torch.Tensor, mask_embedding: torch.Tensor | None
    ) -> torch.Tensor:
        """Input rows of the head: `input_ids` where `is_anchor`, MASK elsewhere. (batch, rows, hidden)."""
        mask_id = self.head_config.mask_token_id
        embedding = self.model.get_input_embeddings()
        if mask_embedding is None:
            return embedding(torch.where(is_anchor, input_ids, mask_id))
        embeds = embedding(input_ids)
        return torch.where(is_anchor[..., None], embeds, mask_embedding.to(embeds.dtype))

    def output_rows(self, token_ids: torch.Tensor | None) -> torch.Tensor:
        """Rows of the target's output embedding, (draft_vocab, hidden)."""
        module = self.model.get_output_embeddings()
        assert isinstance(module, nn.Linear)
        return module.weight if token_ids is None else module.weight[token_ids]
