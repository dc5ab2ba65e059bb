"""Tokens per round of a head, measured by decoding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..head.modeling_jetflow import JetFlowHead
from ..head.settings import head_settings


def tokens_per_round(
    target: PreTrainedModel,
    head: JetFlowHead,
    prompts: Sequence[Sequence[int]],
    node_budget: int,
    *,
    max_new_tokens: int = 128,
    progress: Callable[[int, int, str], None] | None = None,
) -> float:
    """
    Tokens per round of greedy decoding over prompts given as token ids: the mean over all rounds of all prompts.

    The head's mode and generation config and the random generators do not change.

    Args:
        progress: Called with prompts done, prompts in all, and what they are; first before the first prompt.
    """
    rounds = accepted = 0
    what = f"held-out prompts, {node_budget} nodes"
    if progress is not None:
        progress(0, len(prompts), what)
    with head_settings(head, node_budget=node_budget):
        for number, ids in enumerate(prompts, 1):
            greedy_ids(target, ids, max_new_tokens, assistant_model=head)
            rounds += head.last_stats.num_rounds
            accepted += head.last_stats.num_accepted
            if progress is not None:
                progress(number, len(prompts), what)
    return (accepted + rounds) / rounds if rounds else 0.0


def greedy_ids(target: PreTrainedModel, ids: Sequence[int], max_new_tokens: int, **kwargs: Any) -> list[int]:
    """New token ids of one greedy `generate` call; other keywords go to `generate`."""
    input_ids = torch.tensor([list(ids)], device=target.device)
    mask = torch.ones_like(input_ids)
    output = target.generate(input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, **kwargs)
    return output[0, len(ids) :].tolist()
