"""Other ways to draft, from transformers itself, to measure a head against.

- `native-dflash`: transformers' own chain loop for DFlash heads (`speculation_type="dflash"`), driven with the weights
  of the same head.
- `prompt-lookup`: drafts copied from the text so far, without any model.
- `assistant:ID`: assisted generation with a small model of the same or another vocabulary.

Under sampling transformers verifies drafts by random numbers of its own: the texts follow the target's distribution
but are not those of plain decoding with the same seed, whatever the dtype.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from .._compat import CACHE_NAME
from ..head.modeling_jetflow import JetFlowHead
from ..target.loading import load_target


ASSISTANT = "assistant:"
RIVALS = ("native-dflash", "prompt-lookup", f"{ASSISTANT}ID")
PROMPT_LOOKUP_TOKENS = 10  # the number in transformers' own examples


def is_rival(method: str) -> bool:
    return method in RIVALS[:2] or method.removeprefix(ASSISTANT) not in ("", method)


def rival_kwargs(
    method: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: JetFlowHead
) -> dict[str, Any]:
    """
    Keywords of `generate` that make the target decode with a rival method.

    Raises:
        ValueError: If the head cannot draft that way, or the assistant cannot be loaded as a causal language model.
        OSError: If the assistant is not there.
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
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"the assistant of `{ASSISTANT}{source}` cannot be loaded: {error}") from error
    has_same_size = assistant.config.get_text_config().vocab_size == target.config.get_text_config().vocab_size
    if not has_same_size:
        return {"assistant_model": assistant, "tokenizer": tokenizer, "assistant_tokenizer": its_tokenizer}
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"the assistant `{source}` has other tokens than the target but as many, which transformers takes for the "
            "same ones; choose an assistant with the target's tokenizer, or one whose vocabulary has another size"
        )
    return {"assistant_model": assistant}


class NativeDFlash(nn.Module):
    """
    A head as transformers' `DFlashTokenCandidateGenerator` wants it: the backbone alone.

    The generator embeds the anchor and MASK rows with the target's embeddings, hands over the tapped states, keeps
    keys and values in a cache of its own, and scores the rows with the target's whole output embedding. So this rival
    uses all weights of the backbone and, for a head with one, its learned mask embedding; it uses no branch
    correction and no draft vocabulary (it may draft tokens outside of it), always a chain of `block_size - 1`.

    Args:
        head ([`JetFlowHead`]): The head.

    Raises:
        ValueError: If the head taps the target's embedding output, which the generator counts no layer for.
    """

    def __init__(self, head: JetFlowHead):
        super().__init__()
        self.head = head
        config = head.config
        assert config.hidden_state_indices is not None
        if 0 in config.hidden_state_indices:
            raise ValueError(
                "the head taps the target's embedding output, which transformers' DFlash loop cannot hand over; leave "
                "`native-dflash` out of the methods"
            )
        # Without layer types: the cache keeps all rows, and the head's own masks cut its windows.
        self.config = PreTrainedConfig(
            num_hidden_layers=config.num_hidden_layers,
            target_layer_ids=[index - 1 for index in config.hidden_state_indices],
            block_size=config.block_size,
            mask_token_id=config.mask_token_id or 0,  # replaced below where the head has a mask embedding
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
            context_hidden_states (`torch.Tensor`, (1, seq, taps x target_hidden)): States not in the cache yet.
            position_ids (`torch.Tensor`, (1, seq + block_size)): Of both, the context first.
            attention_mask: Not read: the prompts of a bench are not padded.
            cache: The generator's, under `CACHE_NAME`.
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
    """transformers' cache behind the head's interface; the generator itself crops the block's rows."""

    def __init__(self, cache: Cache):
        self._cache = cache

    def extend(
        self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor, num_context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache.update(keys, values, layer_idx)

    def extend_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(int(position_ids[0, -1]) + 1, device=position_ids.device)[None]
