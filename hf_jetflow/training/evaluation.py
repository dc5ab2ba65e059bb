"""Tokens per round of a head, measured by decoding."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..head.modeling_jetflow import JetFlowHead


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
    with decoding_with(head, node_budget):
        for number, ids in enumerate(prompts, 1):
            input_ids = torch.tensor([list(ids)], device=target.device)
            target.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                assistant_model=head,
            )
            rounds += head.last_stats.num_rounds
            accepted += head.last_stats.num_accepted
            if progress is not None:
                progress(number, len(prompts), what)
    return (accepted + rounds) / rounds if rounds else 0.0


@contextmanager
def decoding_with(head: JetFlowHead, node_budget: int) -> Iterator[None]:
    """Decode with a node budget; the head's mode and settings are restored."""
    was_training = head.training
    earlier = {name: getattr(head, name) for name in ("generation_config", "last_stats", "record_trees", "last_trees")}
    head.generation_config = copy.deepcopy(head.generation_config)
    head.generation_config.node_budget = node_budget
    head.record_trees = False
    head.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, value in earlier.items():
            setattr(head, name, value)
        head.train(was_training)
