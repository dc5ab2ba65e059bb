"""The loop. One round is plan, draft, tree, verify, walk, commit; tokens leave through the emitter as they are chosen.

Invariants: the target's cache holds every committed token but the anchor; the head has been shown the states of
exactly the cached tokens. The sequences of a batch share the forwards and advance by themselves; one that has ended
leaves its place to the last.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .._compat import CACHE_NAME
from ..head.modeling_jetflow import JetFlowHead
from ..stats import GenerationStats
from ..target.layer_kinds import takes_trees
from ..target.target import Context, Target
from ..trees.walk import Chooser, walk_trees
from .batching import BatchNoise, row_processors
from .drafter import JetFlowCandidateGenerator
from .emitter import Emitter
from .policy import AutoPolicy, FixedPolicy, RoundCosts, chain_limits, read_limits
from .reuse import recall, remember
from .tree_log import Trace


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
    batch = len(input_ids)
    wants = {name: getattr(generation_config, name) for name in OUTPUT_FLAGS}
    policy_of = cache(partial(choose_policy, head, model))
    policy = policy_of(_rounded_up(batch))
    noise = BatchNoise(batch)
    choosers = _choosers(noise, batch, logits_processor, generation_config.do_sample, wants)
    emitter = Emitter(input_ids, stopping_criteria, streamer, **_padding(generation_config, model_kwargs))
    target = Target(model, head.config)
    stats = head.last_stats = GenerationStats()

    with _timed(stats, "prefill"):
        past = recall(model_kwargs.get(CACHE_NAME), head)
        context, states = target.prefill(input_ids, generation_config, model_kwargs)
        emitter.record_prompt(states)
        drafter = JetFlowCandidateGenerator(head, target, context, past)
        drafter.observe(states)
        for row, chooser in enumerate(choosers):
            emitter.push(row, chooser.choose(states.logits[row], emitter.committed_ids(row)), chooser.scores)
    trace = Trace(head, stats)
    if not emitter.is_finished:
        target.open(context)
    while not emitter.is_finished:
        _retire_finished(emitter, target, context, drafter)
        policy = policy_of(_rounded_up(len(emitter.rows)))
        plan = policy.plan(emitter.num_remaining, context.most_nodes)
        with _timed(stats, "draft"):
            context_ids = emitter.newest_ids.to(target.device)
            candidates = drafter.propose(context_ids, context.positions, plan.max_depth, plan.width)
        with _timed(stats, "tree"):
            limits = plan.node_budget, plan.width, plan.least_logprob, plan.max_continued
            tree = policy.fit(drafter.grow(context_ids, candidates, *limits))
        with _timed(stats, "verify"):
            states = target.verify(context, tree)
        with _timed(stats, "walk"), target.undone_on_error(context, tree):
            paths = walk_trees(tree, states.logits, [choosers[row] for row in emitter.rows], emitter)
        with _timed(stats, "commit"):
            emitter.record_path(states, paths[0], context.cache)
            target.commit(context, tree, paths)
            drafter.observe(states, paths)
        policy.record(tree, sum(len(path) - 1 for path in paths) / len(paths))
        stats.count_round(tree.num_nodes - 1, tree.max_depth + tree.num_continued, [len(path) - 1 for path in paths])
        trace.record(tree, paths, emitter)
    noise.rewind(emitter.length - input_ids.shape[1])
    stats.num_new_tokens, stats.policy = emitter.num_new_tokens, policy.report()
    if wants["return_dict_in_generate"] or getattr(context.cache, "_is_user_defined", False):
        _leave_cache(head, emitter, target, context, drafter)
    return emitter.finish(context.cache, wants, choosers[0])


def _choosers(
    noise: BatchNoise, batch: int, logits_processor: LogitsProcessorList, do_sample: bool, wants: dict[str, Any]
) -> list[Chooser]:
    """One for each sequence."""
    if batch == 1:
        keeps = [wants["return_dict_in_generate"] and wants[name] for name in ("output_scores", "output_logits")]
        return [Chooser(logits_processor, do_sample, *keeps)]
    return [
        Chooser(row_processors(logits_processor, row), do_sample, draw=partial(noise.draw, row))
        for row in range(batch)
    ]


def _leave_cache(
    head: JetFlowHead, emitter: Emitter, target: Target, context: Context, drafter: JetFlowCandidateGenerator
) -> None:
    """Leave the cache as plain decoding does, and with that of one sequence what the head has read."""
    is_batch = len(context.rows.order) > 1
    if is_batch:
        context.rows.cut([length - 1 for length in emitter.lengths])
        target.read_rest(context, emitter.rest_ids())
    target.settle(context, emitter.length - 1)
    if not is_batch:
        remember(context.cache, head, drafter.head_context())


def _rounded_up(num_places: int) -> int:
    """The next power of two: batches of about one size have one policy."""
    return 2 ** (num_places - 1).bit_length()


def _padding(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the emitter is told of padding, in front of prompts and behind what has ended."""
    pad_token = getattr(generation_config, "_pad_token_tensor", None)
    pad_token_id = None if pad_token is None else int(pad_token)
    return {"pad_token_id": pad_token_id, "attention_mask": model_kwargs.get("attention_mask")}


def _retire_finished(emitter: Emitter, target: Target, context: Context, drafter: JetFlowCandidateGenerator) -> None:
    """Go on without the sequences that have ended; each leaves its place to the last one."""
    for place in emitter.finished_places:
        last = len(emitter.rows) - 1
        drafter.keep_rows([last if kept == place else kept for kept in range(last)])
        target.retire(context, place)
        emitter.retire(place)


# What rounds cost, learned where `node_budget` is "auto", for each head and target that are still in use.
ROUND_COSTS: WeakKeyDictionary[JetFlowHead, WeakKeyDictionary[PreTrainedModel, dict]] = WeakKeyDictionary()


def choose_policy(head: JetFlowHead, model: PreTrainedModel, num_places: int) -> AutoPolicy | FixedPolicy:
    """The policy that the head's generation config asks for, for about `num_places` sequences at once; what rounds
    cost is remembered."""
    limits = read_limits(head.generation_config, head.config.block_size)
    if not takes_trees(model):
        limits = chain_limits(limits)
    if getattr(head.generation_config, "node_budget", None) != "auto":
        return FixedPolicy(limits)
    of_pair = ROUND_COSTS.setdefault(head, WeakKeyDictionary()).setdefault(model, {})
    key = (model.device, model.dtype, head.dtype, limits, num_places)
    return AutoPolicy(limits, of_pair.setdefault(key, RoundCosts(num_places)))


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
