"""`JetFlowCandidateGenerator`: anchor and context features -> block -> head -> candidates per depth."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.utils import logging

from ..head.cache import UNSEEN_POSITION, HeadCache, StaticHeadCache
from ..head.modeling_jetflow import JetFlowHead
from ..head.scorers import StepScorer, TableScorer
from ..target.context import Context, TargetStates
from ..target.target import Target
from ..transfer import to_device
from ..trees.device_ngrams import MatchedNgrams, continue_full_tree
from ..trees.ngrams import MAX_CONTEXT, ContextNgrams, TextNgrams, continue_tree
from ..trees.tree import BranchScorer, Candidates, DraftTree, build_tree
from .branch_scores import (
    BranchScores,
    Correction,
    LogitChanges,
    ProjectedTokenCache,
    StepCorrection,
    TableCorrection,
    gather_rows,
)
from .draft_weights import DraftWeights, draft_weights
from .policy import MAX_CONTINUED
from .reuse import HeadContext


logger = logging.get_logger(__name__)


@dataclass
class Draft:
    """One draft of the head, and what scores it along a branch."""

    context_ids: torch.Tensor  # (..., seq) newest committed tokens, the anchor last
    candidates: Candidates  # (..., depth, width), scored as if all branches of a depth were alike
    scorer: BranchScorer | None = None  # `None` without n-grams and branch scorer
    has_ngrams: bool = False  # n-grams of the text may continue the tree below the head's deepest level

    def best_tree(
        self,
        node_budget: int,
        width: int | None = None,
        min_logprob: float = -math.inf,
        max_continued: int = 0,
    ) -> DraftTree:
        """The best tree within the node budget; see `build_tree` and `continue_tree`."""
        tree = build_tree(self.context_ids[..., -1:], self.candidates, node_budget, self.scorer, width, min_logprob)
        if not self.has_ngrams:
            return tree
        if tree.num_nodes == node_budget and tree.tokens.device.type != "cpu":
            return continue_full_tree(tree, self.context_ids, max_continued, min_logprob)
        return continue_tree(tree, self.context_ids, node_budget, max_continued, min_logprob)


class JetFlowCandidateGenerator(CandidateGenerator):
    """
    Drafts with a head for one generation of one sequence or a batch of them.

    Call `observe` with the target's states whenever tokens were committed, then `propose` to draft behind them.

    Args:
        head ([`JetFlowHead`]): The draft head.
        target ([`Target`]): The target it borrows its embeddings from.
        context ([`Context`], *optional*): With a static cache, the head's forwards have one shape, and are compiled if
            the target's are.
        past ([`HeadContext`], *optional*): What an earlier call, which left the target's cache, has shown to the head.
    """

    def __init__(
        self,
        head: JetFlowHead,
        target: Target,
        context: Context | None = None,
        past: HeadContext | None = None,
    ):
        self.head = head
        self.target = target
        self._context = context
        # Maximum number of states per round, as a multiple of the block: forwards of a static cache have few sizes.
        self._max_path_rows = -(-(head.config.block_size + MAX_CONTINUED) // head.config.block_size)
        self._max_path_rows *= head.config.block_size
        self._cache: HeadCache | StaticHeadCache = HeadCache(head.config.num_hidden_layers)
        if context is not None and context.strategy.capacity is not None:
            self._cache = _static_cache(head, context.strategy.capacity + self._max_path_rows)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # features and positions the head has not read
        if past is not None:
            past.load(self._cache, head.config.num_rows)
            self._pending.append((past.features, past.feature_position_ids))
        self._newest_positions: torch.Tensor | None = None  # (batch,) of the newest observed tokens
        self._slots = torch.arange(head.config.num_rows, device=head.device)
        self._texts: list[TextNgrams] = []  # by sequence; empty without n-grams
        self._has_checked_scores = False  # done once per generation: off the CPU the host has to wait

    @cached_property
    def _weights(self) -> DraftWeights:
        """Created at the first draft: some calls never draft."""
        return draft_weights(self.head, self.target)

    @cached_property
    def _token_parts(self) -> ProjectedTokenCache:
        assert isinstance(self.head.branch_correction, StepScorer)
        return ProjectedTokenCache(self.head.branch_correction, self.target)

    @cached_property
    def _draft_indices(self) -> torch.Tensor:
        """Maps a target token id to its draft-vocabulary index, (vocab + 1,); other ids map to the draft vocabulary's
        size."""
        size, token_ids = self.head.config.vocab_size, self.head.draft_token_ids
        if token_ids is None:
            return torch.arange(size + 1, device=self.head.device)
        places = token_ids.new_full((size + 1,), len(token_ids))
        return places.scatter_(0, token_ids, torch.arange(len(token_ids), device=token_ids.device))

    def observe(self, states: TargetStates, paths: list[list[int]] | None = None) -> None:
        """Take over the states of newly committed tokens; after a verify, those of each sequence's path."""
        taps, position_ids = states.taps, states.position_ids
        if paths is not None:
            taps, position_ids = _path_rows(taps, position_ids, paths)
        self._pending.append((torch.cat(taps, dim=-1), position_ids))
        self._newest_positions = position_ids[:, -1]

    def select_sequences(self, indices: list[int]) -> None:
        """Keep only these sequences of the batch, in this order."""
        index = to_device(indices, self.head.device)
        self._texts = [self._texts[i] for i in indices if self._texts]
        self._pending = [
            (features[index.to(features.device)], position_ids[index.to(position_ids.device)])
            for features, position_ids in self._pending
        ]
        if isinstance(self._cache, HeadCache):
            self._cache.select_sequences(index)

    def close(self) -> None:
        """Leave buffers that compiled forwards hold on to for the head's next call."""
        if isinstance(self._cache, StaticHeadCache) and self._context is not None and self._context.is_compiled:
            IDLE_CACHES[self.head] = (self.head.device, self.head.dtype, self._cache)

    def head_context(self) -> HeadContext:
        """Everything that the head was shown."""
        layers, position_ids = self._cache.context_rows()
        features, feature_position_ids = (torch.cat(parts, dim=1) for parts in zip(*self._pending, strict=True))
        if position_ids is None:
            position_ids = feature_position_ids[:, :0]
        return HeadContext(tuple(layers), position_ids, features, feature_position_ids)

    @torch.no_grad()
    def propose(self, context_ids: torch.Tensor, positions: torch.Tensor, max_depth: int, width: int) -> Draft:
        """
        One head forward.

        Args:
            context_ids (`torch.Tensor`, (batch, seq)): The newest committed tokens of each sequence, the anchor last.
            positions (`torch.Tensor`, (batch,)): The anchors' absolute positions.
            max_depth (`int`): Depths to draft; 0 drafts nothing and leaves the head alone.
            width (`int`): Candidates per depth; re-scored branches use `config.branch_candidates` instead.

        Returns:
            [`Draft`]: Its candidates are (batch, max_depth, width), on the tokens' device.
        """
        head, device, anchor_ids = self.head, context_ids.device, context_ids[:, -1:]
        if max_depth == 0:
            shape = (len(anchor_ids), 0, width)
            return Draft(context_ids, Candidates(anchor_ids.new_empty(shape), torch.empty(shape, device=device)))
        is_static = isinstance(self._cache, StaticHeadCache)
        first = 0 if head.config.anchor_predicts else 1  # row that drafts depth 1
        may_be_short = head.config.blocks_can_be_cut and not is_static
        slots = self._slots[None, : first + max_depth if may_be_short else head.config.num_rows]
        embeds = self.embed_block(anchor_ids.expand(-1, slots.shape[1]), (slots == 0).to(device))
        features, context_position_ids = (torch.cat(parts, dim=1) for parts in zip(*self._pending, strict=True))
        self._pending = [(features[:, :0], context_position_ids[:, :0])]
        read = self._read_static if is_static else head
        with self._weights.in_use():
            rows = read(
                inputs_embeds=embeds.to(head.device, head.dtype),
                features=features.to(head.device, head.dtype),
                position_ids=to_device(positions, head.device)[:, None] + slots,
                context_position_ids=context_position_ids.to(head.device),
                past_key_values=self._cache,
            )[:, first : first + max_depth]
            return self.rank(rows, context_ids, width)

    def _read_static(self, features: torch.Tensor, context_position_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The head's forward with few numbers of context rows: a path's, padded to blocks. More of them, as in a
        prompt, are read as they are."""
        assert isinstance(self._cache, StaticHeadCache)
        assert self._context is not None
        num_rows = features.shape[1]
        forward: Callable = self.head
        if not self._cache.is_empty and num_rows <= self._max_path_rows:
            forward = self._context.forward_of(self.head)
            num_pad = -num_rows % self.head.config.block_size
            features = pad(features, (0, 0, 0, num_pad))
            anchor_position = inputs["position_ids"][:, :1]  # no row sees a context row that is not before its anchor
            context_position_ids = torch.cat([context_position_ids, anchor_position.expand(-1, num_pad)], dim=1)
        rows = forward(features=features, context_position_ids=context_position_ids, **inputs)
        self._cache.count_rows(num_rows)
        return rows

    def embed_block(self, block_ids: torch.Tensor, is_anchor: torch.Tensor) -> torch.Tensor:
        """Input rows of the head (batch, rows, hidden), by its own embedding or the target's."""
        head = self.head
        if head.embed_tokens is None:
            return self.target.embed_block(block_ids, is_anchor, head.mask_embedding)
        assert head.config.mask_token_id is not None
        return head.embed_tokens(torch.where(is_anchor, block_ids, head.config.mask_token_id).to(head.device))

    def rank(self, rows: torch.Tensor, context_ids: torch.Tensor, width: int) -> Draft:
        """The draft of rows (..., depth, hidden) behind tokens (..., seq), on the tokens' device."""
        config, device = self.head.config, context_ids.device
        weights = config.ngram_weights
        scores_branches = bool(weights) or self.head.branch_correction is not None
        logprobs, token_ids = self.logprobs(rows), self.head.draft_token_ids
        order = logprobs
        if weights:  # context tokens rank by the most that n-grams can add, so that they become candidates
            order = self._boost_context_tokens(logprobs, context_ids.to(logprobs.device), sum(weights))
        num_scored = min(config.branch_candidates if scores_branches else width, logprobs.shape[-1])
        places = order.topk(num_scored).indices
        tokens = places if token_ids is None else token_ids.to(places.device)[places]
        scores = logprobs.gather(-1, places).to(device)
        if not self._has_checked_scores:
            self._has_checked_scores = True
            _warn_unless_finite(scores)
        # A row of the head that overflows scores NaN throughout. No tree follows a candidate at minus infinity.
        candidates = Candidates(tokens.to(device), scores.nan_to_num(-math.inf, neginf=-math.inf))
        scorer = None
        if scores_branches:
            ngrams: ContextNgrams | MatchedNgrams | None = None
            if weights and device.type == "cpu":
                ngrams = ContextNgrams(self._read_texts(context_ids, len(weights)), candidates, weights)
            elif weights:
                ngrams = MatchedNgrams(context_ids, candidates, weights)
            scorer = BranchScores(candidates, ngrams, self._correction(rows, context_ids, candidates, places))
        return Draft(context_ids, candidates, scorer, has_ngrams=bool(weights))

    def _correction(
        self, rows: torch.Tensor, context_ids: torch.Tensor, candidates: Candidates, places: torch.Tensor
    ) -> Correction | None:
        scorer, first_depth = self.head.branch_correction, self.head.config.first_corrected_depth
        if scorer is None:
            return None
        if isinstance(scorer, TableScorer):
            return TableCorrection(scorer, rows, context_ids, candidates, places, self._weights, first_depth)
        changes = self._make_logit_changes(scorer, places)
        return StepCorrection(
            scorer, rows, context_ids, candidates, self._token_parts, changes, self._weights, first_depth
        )

    def _read_texts(self, context_ids: torch.Tensor, longest: int) -> list[TextNgrams]:
        """The n-grams of the newest tokens of each text."""
        texts = context_ids.reshape(-1, context_ids.shape[-1])[:, -MAX_CONTEXT:].tolist()
        if len(self._texts) != len(texts):
            self._texts = [TextNgrams(longest) for _ in texts]
        for known, ids in zip(self._texts, texts, strict=True):
            num_padding = next((place for place, token in enumerate(ids) if token >= 0), len(ids))
            known.follow(ids[num_padding:])
        return self._texts

    def _boost_context_tokens(self, logprobs: torch.Tensor, context_ids: torch.Tensor, gain: float) -> torch.Tensor:
        """Log-probabilities (..., depth, draft_vocab) and `gain` for tokens among the newest of a text."""
        size = self.head.config.vocab_size
        ids = context_ids[..., -MAX_CONTEXT:]
        ids = ids.where((ids >= 0) & (ids < size), size)  # padding; placeholders of images may lie outside too
        places = self._draft_indices.to(ids.device)[ids].unsqueeze(-2).expand(*logprobs.shape[:-1], -1)
        order = pad(logprobs, (0, 1))  # the last column stands for ids outside the draft vocabulary
        return order.scatter_(-1, places, order.gather(-1, places) + gain)[..., :-1]

    def logprobs(self, rows: torch.Tensor) -> torch.Tensor:
        """Draft log-probabilities (..., draft_vocab) of drafted rows (..., features), before any branch correction."""
        rows, projection = rows[..., : self.head.config.hidden_size], self._weights.projection
        if projection is not None:
            logits = projection(rows.to(projection.weight.device, projection.weight.dtype))
        else:
            rows = rows.to(self.target.device, self.target.model.dtype)
            logits = self.target.output_logits(rows, self.head.draft_token_ids)
        return torch.log_softmax(self.head.shape_logits(logits.float()), dim=-1)

    def _make_logit_changes(self, scorer: StepScorer, places: torch.Tensor) -> LogitChanges:
        """Return a function that maps shifts (..., branches, shift) of a depth to logit changes of its candidates,
        (..., branches, width)."""
        weight = scorer.output_weight
        if weight is None and self._weights.projection is not None:
            weight = self._weights.projection.weight
        if weight is not None:

            def products(depth: int, shifts: torch.Tensor) -> torch.Tensor:
                shifts, columns = shifts.to(weight.device, weight.dtype), places[..., depth, :].to(weight.device)
                return scorer.candidate_logits(shifts, weight, columns)

            return products
        target, token_ids = self.target, self.head.draft_token_ids

        def changes(depth: int, shifts: torch.Tensor) -> torch.Tensor:
            shifts = shifts.to(target.device, target.model.dtype)
            zero = torch.zeros_like(shifts[..., :1, :])  # yields what is no shift: the bias
            logits = target.output_logits(torch.cat([shifts, zero], dim=-2), token_ids)
            columns = places[..., depth, :].unsqueeze(-2)
            logits = logits.gather(-1, columns.expand(*logits.shape[:-1], columns.shape[-1]))
            return logits[..., :-1, :] - logits[..., -1:, :]

        return changes

    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """
        The base class's chain view of `propose`: the best token of every depth behind `input_ids` (1, seq).

        No draft probabilities are returned: nothing is sampled from the head, and verification never needs them.
        """
        if self._newest_positions is None:
            raise ValueError("nothing was observed yet; call `observe` with the target's states of the prompt first")
        block_size = self.head.config.block_size
        draft = self.propose(input_ids, self._newest_positions + 1, block_size - 1, width=1)
        chain = draft.best_tree(block_size, width=1)
        return torch.cat([input_ids, chain.tokens[:, 1:]], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Nothing to update: the loop plans every round from scratch."""


# Of each head that is in use and was compiled: the static cache of its latest call, unless a call is using it.
IDLE_CACHES: WeakKeyDictionary[JetFlowHead, tuple[torch.device, torch.dtype, StaticHeadCache]] = WeakKeyDictionary()


def _static_cache(head: JetFlowHead, capacity: int) -> StaticHeadCache:
    """An empty cache, at the same addresses as in the call before if it fits."""
    device, dtype, cache = IDLE_CACHES.pop(head, (None, None, None))
    if cache is None or (device, dtype, cache.capacity) != (head.device, head.dtype, capacity):
        return StaticHeadCache(head.config.num_hidden_layers, capacity)
    cache.reset()
    return cache


def _warn_unless_finite(scores: torch.Tensor) -> None:
    if scores.isnan().any():
        logger.warning_once(
            "The draft head computes NaN scores, and those drafts are dropped: the text stays exact, but decoding is "
            "slow. Its weights are damaged, or its numbers overflow in its dtype: load it in bfloat16 or float32."
        )


def _path_rows(
    taps: tuple[torch.Tensor, ...], position_ids: torch.Tensor, paths: list[list[int]]
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Tapped states (batch, length, hidden) and positions (batch, length) of each sequence's path; shorter ones are
    padded with rows that no block sees."""
    device = position_ids.device
    if len(paths) == 1:
        rows = to_device(paths[0], device)
        return tuple(states.index_select(1, rows.to(states.device)) for states in taps), position_ids[:, rows]
    length = max(len(path) for path in paths)
    rows = to_device([path + [-1] * (length - len(path)) for path in paths], device)
    is_pad, rows = rows < 0, rows.clamp_min(0)
    return (
        tuple(gather_rows(states, rows.to(states.device)) for states in taps),
        position_ids.gather(1, rows).masked_fill_(is_pad, UNSEEN_POSITION),
    )
