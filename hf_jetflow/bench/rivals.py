"""Transformers' own ways to draft, to compare a head with.

- `native-dflash`: the chain loop for DFlash heads (`speculation_type="dflash"`), with the weights of the same head.
- `prompt-lookup`: drafts copied from the text so far, without a model.
- `assistant:ID`: assisted generation with a small model of the same or another vocabulary.

Under sampling these verify drafts with extra random numbers. Their texts follow the target's distribution, but differ
from plain decoding with the same seed in every dtype.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from .._compat import CACHE_NAME
from ..errors import JetFlowError
from ..head.modeling_jetflow import JetFlowHead
from ..target.loading import load_target
from .settings import ASSISTANT


PROMPT_LOOKUP_TOKENS = 10  # the number in transformers' own examples


def rival_kwargs(
    method: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: JetFlowHead
) -> dict[str, Any]:
    """
    Keywords of `generate` for a rival method.

    Raises:
        JetFlowError: If the head cannot draft that way, or the assistant is no causal language model.
        OSError: If the assistant does not exist.
    """
    if method == "native-dflash":
        return {"assistant_model": NativeDFlash(head), "speculation_type": "dflash"}
    if method == "prompt-lookup":
        return {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS}
    return _assistant_kwargs(method.removeprefix(ASSISTANT), target, tokenizer)


def _assistant_kwargs(source: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    try:
        assistant, its_tokenizer = load_target(source, str(target.dtype).removeprefix("torch."))
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else JetFlowError
        raise kind(f"the assistant of `{ASSISTANT}{source}` cannot be loaded: {error}") from error
    has_same_size = assistant.config.get_text_config().vocab_size == target.config.get_text_config().vocab_size
    if not has_same_size:
        return {"assistant_model": assistant, "tokenizer": tokenizer, "assistant_tokenizer": its_tokenizer}
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise JetFlowError(
            f"the assistant `{source}` has another vocabulary than the target, but of the same size, so transformers "
            "takes them for equal; use an assistant with the target's tokenizer, or with a vocabulary of another size"
        )
    return {"assistant_model": assistant}


class NativeDFlash(nn.Module):
    """
    Adapts a head to transformers' `DFlashTokenCandidateGenerator`, which drafts chains of `block_size - 1`.

    The generator embeds the anchor and MASK rows with the target's embedding, passes the tapped states, owns the cache
    and scores the rows with the target's full output embedding. So this rival uses the head's backbone and its learned
    mask embedding, but neither its branch correction nor its draft vocabulary.

    Args:
        head ([`JetFlowHead`]): The head.

    Raises:
        JetFlowError: If the head taps the target's embedding output, which the generator cannot pass.
    """

    def __init__(self, head: JetFlowHead):
        super().__init__()
        self.head = head
        config = head.config
        assert config.hidden_state_indices is not None
        if 0 in config.hidden_state_indices:
            raise JetFlowError(
                "the head taps the target's embedding output, which transformers' DFlash loop cannot pass; leave "
                "`native-dflash` out of the methods"
            )
        # Without layer types the cache keeps all rows; the head's own masks apply its windows.
        self.config = PreTrainedConfig(
            num_hidden_layers=config.num_hidden_layers,
            target_layer_ids=[index - 1 for index in config.hidden_state_indices],
            block_size=config.block_size,
            mask_token_id=config.mask_token_id or 0,  # unused if the head has a mask embedding
            vocab_size=config.vocab_size,
        )

    @property
    def device(self) -> torch.device:
        return self.head.device

    def forward(
        self,
        noise_embeds: torch.Tensor,
        context_hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **cache: Cache,
    ) -> BaseModelOutput:
        """
        Args:
            noise_embeds (`torch.Tensor`, (1, block_size, hidden)): Embeddings of the anchor and the MASK rows.
            context_hidden_states (`torch.Tensor`, (1, seq, taps x target_hidden)): Tapped states not yet cached.
            position_ids (`torch.Tensor`, (1, seq + block_size)): Positions of the context, then of the block.
            attention_mask: Ignored: rivals decode one prompt at a time, without padding.
            cache: The generator's cache, under `CACHE_NAME`.
        """
        head, num_context = self.head, context_hidden_states.shape[1]
        if head.mask_embedding is not None:
            masks = head.mask_embedding.to(noise_embeds.dtype).expand_as(noise_embeds[:, 1:])
            noise_embeds = torch.cat([noise_embeds[:, :1], masks], dim=1)
        rows = head(
            inputs_embeds=noise_embeds.to(head.dtype),
            features=context_hidden_states.to(head.dtype),
            position_ids=position_ids[:, num_context:],
            context_position_ids=position_ids[:, :num_context],
            past_key_values=_NativeCache(cache[CACHE_NAME]),
        )
        return BaseModelOutput(last_hidden_state=rows)


class _NativeCache:
    """Gives transformers' cache the interface of the head's; the generator crops the rows of the block."""

    def __init__(self, cache: Cache):
        self._cache = cache

    def extend(
        self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor, num_context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache.update(keys, values, layer_idx)

    def extend_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(int(position_ids[0, -1]) + 1, device=position_ids.device)[None]
