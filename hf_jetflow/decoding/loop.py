"""The loop: one round is plan, draft, best tree, verify, walk, commit.

Everything that a generation in progress owns lives in its [`DecodingSession`]; this file only says what happens in
which order. Start here, then read `session.py`.
"""

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..head.modeling_jetflow import JetFlowHead
from .session import Call, DecodingSession


def decode(
    model: PreTrainedModel,
    head: JetFlowHead,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """
    Tree speculative decoding with the output of plain decoding.

    Takes what `generate` hands to a decoding method, prepared, and returns what `generate` returns.
    """
    call = Call(input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
    session = DecodingSession(model, head, call)
    with session.rewinding_noise():
        while not session.is_finished:
            if session.needs_fresh_cache:  # Phi-3 only, at the length where its other RoPE begins
                session.read_again()
                continue
            session.drop_finished()
            policy = session.policy
            plan = policy.plan(session.max_yield, session.max_nodes)
            draft = session.draft(plan)
            tree = policy.trim(session.best_tree(draft, plan), plan)
            states = session.verify(tree)
            paths = session.walk(tree, states)  # emits the accepted tokens and the bonus token
            session.commit(tree, states, paths)
            policy.record(tree, paths)
            session.end_round(tree, paths)
    return session.finish()
