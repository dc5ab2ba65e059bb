"""The loop. One round is plan, draft, tree, verify, walk, commit; tokens leave through the emitter as they are chosen.

Invariants: the target's cache holds every committed token but the anchor; the head has been shown the states of
exactly the cached tokens.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .caches import cache_windows, settle_layers
from .drafting import JetFlowCandidateGenerator
from .emit import Emitter
from .modeling_jetflow import JetFlowHead
from .policy import AutoPolicy, FixedPolicy, RoundCosts, read_limits
from .stats import GenerationStats
from .target import Target
from .trace import Trace
from .tree import build_tree
from .walk import Chooser, walk_tree


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
    policy = choose_policy(head, model)
    wants = {name: getattr(generation_config, name) for name in OUTPUT_FLAGS}
    keeps = [wants["return_dict_in_generate"] and wants[name] for name in ("output_scores", "output_logits")]
    chooser = Chooser(logits_processor, generation_config.do_sample, *keeps)
    emitter = Emitter(input_ids, stopping_criteria, streamer, chooser)
    target = Target(model, head.config)
    stats = head.last_stats = GenerationStats()

    with _timed(stats, "prefill"):
        context, states = target.prefill(input_ids, generation_config, model_kwargs)
        emitter.record_prompt(states)
        drafter = JetFlowCandidateGenerator(head, target, context)
        drafter.observe(states)
        emitter.push(chooser.choose(states.logits, emitter.committed_ids()))
    trace = Trace(head, stats)
    while not emitter.is_finished:
        plan = policy.plan(emitter.num_remaining, context.most_nodes)
        with _timed(stats, "draft"):
            candidates = drafter.propose(emitter.anchor_id, context.position, plan.max_depth, plan.width)
        with _timed(stats, "tree"):
            tree = build_tree(emitter.anchor_id, candidates, plan.node_budget, drafter.branch_scorer, plan.width)
            tree = policy.fit(tree)
        with _timed(stats, "verify"):
            states = target.verify(context, tree)
        with _timed(stats, "walk"):
            walk = walk_tree(tree, states.logits, chooser, emitter.committed_ids, emitter.push)
        with _timed(stats, "commit"):
            emitter.record_path(states, walk.path, cache_windows(context.cache))
            target.commit(context, tree, walk.path)
            drafter.observe(states, walk.path)
        policy.record(tree, len(walk.path) - 1)
        stats.count_round(len(tree.tokens) - 1, tree.max_depth, len(walk.path) - 1)
        trace.record(tree, walk)
    stats.num_new_tokens, stats.policy = emitter.num_new_tokens, policy.report()
    settle_layers(context.cache)
    return emitter.finish(context.cache, wants)


# What rounds cost, learned where `node_budget` is "auto", for each head and target that are still in use.
ROUND_COSTS: WeakKeyDictionary[JetFlowHead, WeakKeyDictionary[PreTrainedModel, dict]] = WeakKeyDictionary()


def choose_policy(head: JetFlowHead, model: PreTrainedModel) -> AutoPolicy | FixedPolicy:
    """The policy that the head's generation config asks for; what rounds cost is remembered."""
    limits = read_limits(head.generation_config, head.config.block_size)
    if getattr(head.generation_config, "node_budget", None) != "auto":
        return FixedPolicy(limits)
    of_head = ROUND_COSTS.setdefault(head, WeakKeyDictionary())
    costs = of_head.setdefault(model, {}).setdefault((model.device, model.dtype, head.dtype, limits), RoundCosts())
    return AutoPolicy(limits, costs)


OUTPUT_FLAGS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_hidden_states",
    "output_attentions",
)


@contextmanager
def _timed(stats: GenerationStats, step: str) -> Iterator[None]:
    """Add the host time of one step to the statistics."""
    start = time.perf_counter()
    yield
    stats.seconds_by_step[step] = stats.seconds_by_step.get(step, 0.0) + time.perf_counter() - start
