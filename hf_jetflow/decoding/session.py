"""`DecodingSession`: a generation in progress, and its steps.

Invariants: the target's cache holds every committed token but the anchors; the drafter has observed the states of
exactly the cached tokens, and the head reads them in its next forward. The sequences of a batch share all forwards and
advance by different lengths; a finished sequence is swapped out: the last active sequence takes over its batch slot.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from .._compat import CACHE_NAME
from ..head.modeling_jetflow import JetFlowHead
from ..stats import GenerationStats
from ..target.adapters import AdapterNames
from ..target.prefilled import TargetStates
from ..target.slots import BatchSlots
from ..target.target import Target
from ..transfer import to_device
from ..trees.tree import DraftTree, chain_of
from ..trees.walk import Chooser, walk_trees
from .batching import TEXT_BLIND, draw_nothing, sequence_processors
from .captured_draft import CapturedDraft
from .drafter import JetFlowCandidateGenerator
from .emitter import Emitter
from .noise import Noise, SequenceNoise, draft_noise
from .policy import Policy, TreeLimits, choose_policy
from .ranking import Draft
from .reuse import store_context, stored_context
from .tree_log import Round, TreeLog


REST_CHUNK = 16  # tokens of finished sequences that are fed at a time, where the caller gets the cache of a batch
MIN_LAID_OUT = 16  # tokens that a text must be able to gain, for laid-out weights of the target to pay
Step = TypeVar("Step", bound=Callable[..., Any])


@dataclass
class Call:
    """What `generate` hands to a decoding method, prepared."""

    input_ids: torch.Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    streamer: BaseStreamer | None
    model_kwargs: dict[str, Any]


def _step(name: str) -> Callable[[Step], Step]:
    """Add the host time of a method to the statistics of its session, as the time of the step `name`."""

    def wrap(method: Step) -> Step:
        @functools.wraps(method)
        def timed(self: "DecodingSession", *args: Any) -> Any:
            start = time.perf_counter()
            result = method(self, *args)
            seconds = self.stats.seconds_by_step
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return timed  # type: ignore[return-value]

    return wrap


class DecodingSession:
    """
    Owns what one `generate` call with a head needs from round to round. Creating it reads the prompt and emits the
    first token.

    Args:
        model (`PreTrainedModel`): The target.
        head ([`JetFlowHead`]): Its `round_observers` are told of every round (see [`~tree_log.Round`]).
        call ([`Call`]): The call of `generate`.
    """

    def __init__(self, model: PreTrainedModel, head: JetFlowHead, call: Call):
        self._head, self._model, self._call = head, model, call
        self._policies: dict[int, Policy] = {}
        self._policy_for(len(call.input_ids))  # wrong settings are refused before the prompt is read
        self._noise = Noise(len(call.input_ids))
        self._choosers = make_choosers(call, self._noise)
        self._slots = BatchSlots(len(call.input_ids), AdapterNames(model))
        self._emitter = Emitter(
            call.input_ids,
            call.stopping_criteria,
            self._slots,
            call.streamer,
            pad_token_id=_pad_token_id(call.generation_config),
            attention_mask=call.model_kwargs.get("attention_mask"),
        )
        self._target = Target(model, head.config)
        self.stats = head.last_stats = GenerationStats()
        self._read_text(call.input_ids, call.model_kwargs)
        self._observers = (*TreeLog(head, self.stats).observers, *head.round_observers)

    @_step("prefill")
    def _read_text(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any], is_prompt: bool = True) -> None:
        """Prefill the target with the text, show its states to a new drafter, and emit the next token."""
        cache = model_kwargs.get(CACHE_NAME)
        past = stored_context(cache, self._head)
        self._prefilled, states = self._target.prefill(
            input_ids, self._call.generation_config, model_kwargs, self._slots, is_prompt
        )
        # Prompts given as embeddings, and an adapter's virtual tokens, are cached without an id.
        self._num_without_id = int(self._slots.lengths[0]) - input_ids.shape[1]
        self._emitter.record_prompt(states)
        if self._prefilled.cache is not cache:  # a target may start a new one, and read all of the text
            past = None
        self._drafter = JetFlowCandidateGenerator(self._head, self._target, self._prefilled, past)
        self._drafter.observe(states)
        self._emit_next(states)
        if not self.is_finished:
            self._prefilled.strategy.open()
            num_remaining = self._emitter.num_remaining
            if num_remaining is None or num_remaining >= MIN_LAID_OUT:
                is_wanted = getattr(self._head.generation_config, "lay_out_target", None)
                self._prefilled.lay_out(is_wanted, self._head._weights_version)

    def _emit_next(self, states: TargetStates) -> None:
        """Choose and emit the token behind the text of every sequence."""
        with self._counting_tokens():
            for sequence, chooser in enumerate(self._choosers):
                token = chooser.choose(states.logits[sequence], self._emitter.committed_ids(sequence))
                self._emitter.push(sequence, token, chooser.scores)

    @contextmanager
    def _counting_tokens(self) -> Iterator[None]:
        """Count what was emitted inside, at an error too."""
        try:
            yield
        finally:
            self.stats.num_new_tokens = self._emitter.num_new_tokens

    @property
    def needs_fresh_cache(self) -> bool:
        """Whether plain decoding's next step starts a new cache."""
        return self._prefilled.needs_fresh_cache(self._emitter.length)

    def read_again(self) -> None:
        """Read all text so far into a new cache, as plain decoding does (Phi-3, at the length of its first RoPE)."""
        strategy, emitter = self._prefilled.strategy, self._emitter
        strategy.settle(self._num_cached(emitter.length))
        model_kwargs = self._model._update_model_kwargs_for_generation(
            ModelOutput({CACHE_NAME: strategy.cache}),
            dict(self._call.model_kwargs),
            num_new_tokens=emitter.num_new_tokens,
        )
        self._read_text(emitter.committed_ids(), model_kwargs, False)
        self.stats.count_round(0, 0, [0])

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        return self._emitter.is_finished

    @property
    def max_yield(self) -> int | None:
        """Tokens that the next round may yield for some sequence, the bonus token included; `None` if any number."""
        max_depth, num_remaining = self._prefilled.max_depth, self._emitter.num_remaining
        limits = [num_remaining, None if max_depth is None else max_depth + 1]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def max_nodes(self) -> int | None:
        """Nodes that the next round can verify; `None` if any number."""
        return self._prefilled.max_nodes

    @property
    def policy(self) -> Policy:
        """Plans the rounds of as many sequences as are active."""
        return self._policy_for(len(self._slots.active))

    def _policy_for(self, num_sequences: int) -> Policy:
        size = 2 ** (num_sequences - 1).bit_length()  # batches of about one size share a policy
        if size not in self._policies:
            self._policies[size] = choose_policy(self._head, self._model, size)
        return self._policies[size]

    def drop_finished(self) -> None:
        """Swap out finished sequences: the last active sequence takes over each free batch slot."""
        for finished in self._emitter.finished_slots:
            last = len(self._slots.active) - 1
            self._drafter.select_sequences([last if slot == finished else slot for slot in range(last)])
            self._prefilled.strategy.retire(finished)

    @_step("draft")
    def draft(self, plan: TreeLimits) -> Draft | CapturedDraft:
        """The head's candidates behind the anchors, with what scores them along a branch."""
        device = self._target.device
        newest_ids = to_device(self._emitter.newest_ids, device)
        _lengths, positions = self._prefilled.lengths_and_positions(device)
        noise = self._noise_ahead() if plan.max_depth else None
        return self._drafter.draft(newest_ids, positions, plan, self.policy.limits, noise)

    def _noise_ahead(self) -> torch.Tensor | None:
        """What the next draws of the active sequences add to the scores of tokens; `None` if that cannot be told."""
        config = self._call.generation_config
        draws = [noise for sequence in self._slots.active if (noise := self._choosers[sequence].noise)]
        if not (config.do_sample and draws):
            return None
        return draft_noise(draws, self.policy.limits.max_depth, config.temperature or 1.0)

    @_step("tree")
    def best_tree(self, draft: Draft | CapturedDraft, plan: TreeLimits) -> DraftTree:
        """The best tree over a draft within the plan."""
        return draft.best_tree(plan.node_budget, plan.width, plan.min_logprob, plan.max_continued)

    @_step("verify")
    def verify(self, tree: DraftTree) -> TargetStates:
        """One target forward over all nodes."""
        return self._prefilled.verify(tree)

    @_step("walk")
    def walk(self, tree: DraftTree, states: TargetStates) -> list[list[int]]:
        """
        Follow the target's own choices and emit them: the caller has them before `commit` compacts the cache.

        Returns the paths.

        On an error, such as a closed streamer, the nodes are rolled back. A later call can reuse the cache.
        """
        choosers = [self._choosers[sequence] for sequence in self._slots.active]
        with ExitStack() as on_error, self._counting_tokens():
            on_error.callback(self._prefilled.strategy.roll_back, tree)
            paths = walk_trees(tree, states.logits, choosers, self._emitter)
            on_error.pop_all()
        return paths

    @_step("commit")
    def commit(self, tree: DraftTree, states: TargetStates, paths: list[list[int]]) -> None:
        """Compact the accepted paths in the cache and queue their states for the head."""
        # Batches that return states are decoded plainly.
        self._emitter.record_path(states, paths[0], self._prefilled.cache)
        self._drafter.observe(states, tree, paths)  # before the next captured function, which may overwrite the states
        self._prefilled.strategy.commit(tree, paths)

    def end_round(self, tree: DraftTree, paths: list[list[int]]) -> None:
        """Count the round, and tell the observers."""
        self.stats.count_round(tree.num_nodes - 1, tree.max_depth, [len(path) - 1 for path in paths])
        if self._observers:
            active = self._slots.active
            bonus_ids = [int(self._emitter.committed_ids(sequence)[0, -1]) for sequence in active]
            finished = Round(tree, paths, active, bonus_ids, self.stats)
            for observer in self._observers:
                observer(finished)

    @contextmanager
    def rewinding_noise(self) -> Iterator[None]:
        """Afterwards, the random number generator is where plain decoding leaves it, at an error too."""
        try:
            yield
        finally:
            self._noise.rewind(self._emitter.num_steps)

    def finish(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """What `generate` returns."""
        self.stats.policy = self.policy.report()
        self._head.last_stats = self.stats  # a criterion may have generated with the same head
        cache = self._prefilled.cache
        # A cache that the caller retains must end as plain decoding leaves it.
        if self._call.generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False):
            self._read_rest()
            self._prefilled.strategy.settle(self._num_cached(self._emitter.length))
            store_context(cache, self._head, self._drafter.head_context)
        self._drafter.close()
        return self._emitter.finish(cache, self._call.generation_config, self._choosers[0])

    def _num_cached(self, length: int) -> int:
        """Cached tokens of a sequence with `length` ids: all but the anchor, and those without an id."""
        return length - 1 + self._num_without_id

    def _read_rest(self) -> None:
        """Feed the tokens that plain decoding would still feed for finished sequences."""
        slots, rest_ids = self._slots, self._emitter.rest_ids()
        slots.cut([self._num_cached(length) for length in self._emitter.lengths])
        slots.reactivate()
        num_missing = slots.lengths.max() - slots.lengths
        for start in range(0, rest_ids.shape[1], REST_CHUNK):
            chain = chain_of(rest_ids[slots.order, start : start + REST_CHUNK])
            num_read = (num_missing - start).clamp(0, chain.num_nodes)
            # Sequences that lack fewer tokens repeat their last position: there may be none behind it.
            depths = chain.depths.minimum((num_read - 1).clamp_min(0)[:, None].to(chain.depths.device))
            chain = replace(chain, depths=depths)
            self._prefilled.verify(chain)
            self._prefilled.strategy.commit(chain, [list(range(length)) for length in num_read.tolist()])


def make_choosers(call: Call, noise: Noise) -> list[Chooser]:
    """One chooser for each sequence; those of a batch share the noise."""
    batch, config = len(call.input_ids), call.generation_config
    is_text_blind = all(type(processor) in TEXT_BLIND for processor in call.logits_processor)
    # Draws ahead would change what a processor or criterion draws itself. Batches come with no processor that does.
    is_noise_ours = batch > 1 or (draw_nothing(call.logits_processor) and draw_nothing(call.stopping_criteria))
    return [
        Chooser(
            sequence_processors(call.logits_processor, i) if batch > 1 else call.logits_processor,
            config.do_sample,
            keep_scores=config.return_dict_in_generate and config.output_scores,
            keep_logits=config.return_dict_in_generate and config.output_logits,
            noise=SequenceNoise(noise, i) if is_noise_ours else None,
            is_text_blind=is_text_blind,
        )
        for i in range(batch)
    ]


def _pad_token_id(generation_config: GenerationConfig) -> int | None:
    pad_token = getattr(generation_config, "_pad_token_tensor", None)
    return None if pad_token is None else int(pad_token)
