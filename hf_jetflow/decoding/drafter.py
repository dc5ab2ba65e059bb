"""`JetFlowCandidateGenerator`: anchor and context features -> block -> head -> candidates per depth."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.utils import logging

from ..head.cache import UNSEEN_POSITION, HeadCache, StaticHeadCache
from ..head.modeling_jetflow import JetFlowHead
from ..head.scorers import StepScorer, TableScorer
from ..target.context import Context, TargetStates
from ..target.target import Target
from ..transfer import must_not_wait, to_device
from ..trees.device_ngrams import MatchedNgrams, continue_with_matches
from ..trees.ngrams import MAX_CONTEXT, ContextNgrams, TextNgrams, continue_tree
from ..trees.tree import BranchScorer, Candidates, DraftTree, build_tree
from .branch_scores import (
    BranchScores,
    Correction,
    ProjectedTokenCache,
    StepCorrection,
    TableCorrection,
    gather_rows,
    logit_changes,
)
from .captured_draft import (
    CapturedDraft,
    as_draft,
    draft_tree,
    is_on_one_device,
    keep_static_cache,
    static_cache,
)
from .draft_weights import DraftWeights, draft_weights
from .policy import MAX_CONTINUED, RoundPlan
from .reuse import HeadContext


logger = logging.get_logger(__name__)


@dataclass
class Draft:
    """One draft of the head, and what scores it along a branch."""

    newest_ids: torch.Tensor  # (..., seq) newest committed tokens, the anchor last
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
        tree = build_tree(self.newest_ids[..., -1:], self.candidates, node_budget, self.scorer, width, min_logprob)
        if not self.has_ngrams:
            return tree
        continued = continue_with_matches if must_not_wait(tree.tokens.device) else continue_tree
        return continued(tree, self.newest_ids, node_budget, max_continued, min_logprob)


class JetFlowCandidateGenerator(CandidateGenerator):
    """
    Drafts with a head for one generation of one sequence or a batch of them.

    Call `observe` with the target's states whenever tokens were committed, then `propose` to draft behind them.

    Args:
        head ([`JetFlowHead`]): The draft head.
        target ([`Target`]): The target it borrows its embeddings from.
        context ([`Context`], *optional*): With a static cache and a compiled target, drafts are captured, too.
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
        self._max_path_rows = head.config.block_size + MAX_CONTINUED  # a captured draft reads as many states
        self._cache: HeadCache | StaticHeadCache = HeadCache(head.config.num_hidden_layers)
        if context is not None and context.strategy.capacity is not None:
            self._cache = static_cache(head, context.strategy.capacity + self._max_path_rows, context.is_compiled)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # features and positions the head has not read
        if past is not None:
            past.load(self._cache, head.config.num_rows)
            self._pending.append((past.features, past.feature_position_ids))
        self._newest_positions: torch.Tensor | None = None  # (batch,) of the newest observed tokens
        self._row_offsets = torch.arange(head.config.num_rows, device=head.device)
        self._texts: list[TextNgrams] = []  # by sequence; empty without n-grams
        scorer = head.branch_correction
        self._token_parts = ProjectedTokenCache(scorer, target) if isinstance(scorer, StepScorer) else None
        self._has_checked_scores = False  # done once per generation: off the CPU the host has to wait

    @cached_property
    def _weights(self) -> DraftWeights:
        """Created at the first draft: some calls never draft."""
        return draft_weights(self.head, self.target)

    @cached_property
    def _draft_indices(self) -> torch.Tensor:
        """Maps a target token id to its draft-vocabulary index, (vocab + 1,); other ids map to the draft vocabulary's
        size."""
        size, token_ids = self.head.config.vocab_size, self.head.draft_token_ids
        if token_ids is None:
            return torch.arange(size + 1, device=self.head.device)
        indices = token_ids.new_full((size + 1,), len(token_ids))
        return indices.scatter_(0, token_ids, torch.arange(len(token_ids), device=token_ids.device))

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
        """Drafts no more."""
        if isinstance(self._cache, StaticHeadCache) and self._context is not None and self._context.is_compiled:
            keep_static_cache(self.head, self._cache)

    def head_context(self) -> HeadContext:
        """Everything that the head was shown."""
        layers, position_ids = self._cache.context_rows()
        features, feature_position_ids = (torch.cat(parts, dim=1) for parts in zip(*self._pending, strict=True))
        if position_ids is None:
            position_ids = feature_position_ids[:, :0]
        return HeadContext(tuple(layers), position_ids, features, feature_position_ids)

    @torch.no_grad()
    def propose(self, newest_ids: torch.Tensor, positions: torch.Tensor, max_depth: int, width: int) -> Draft:
        """
        One head forward.

        Args:
            newest_ids (`torch.Tensor`, (batch, seq)): The newest committed tokens of each sequence, the anchor last.
            positions (`torch.Tensor`, (batch,)): The anchors' absolute positions.
            max_depth (`int`): Depths to draft; 0 drafts nothing and leaves the head alone.
            width (`int`): Candidates per depth; re-scored branches use `config.branch_candidates` instead.

        Returns:
            [`Draft`]: Its candidates are (batch, max_depth, width), on the tokens' device.
        """
        anchor_ids = newest_ids[:, -1:]
        if max_depth == 0:
            shape = (len(anchor_ids), 0, width)
            logprobs = torch.empty(shape, device=newest_ids.device)
            return Draft(newest_ids, Candidates(anchor_ids.new_empty(shape), logprobs))
        features, context_position_ids = self._take_pending()
        with self._weights.in_use():
            rows = self.read_block(anchor_ids, positions, features, context_position_ids, self._cache, max_depth)
            if isinstance(self._cache, StaticHeadCache):
                self._cache.count_rows(features.shape[1])
            return self.rank(rows, newest_ids, width)

    @torch.no_grad()
    def draft(
        self, newest_ids: torch.Tensor, positions: torch.Tensor, plan: RoundPlan, limits: RoundPlan
    ) -> Draft | CapturedDraft:
        """
        The draft of a round: one captured function if the target's forward is compiled, `propose` otherwise.

        Args:
            plan ([`RoundPlan`]): The round's.
            limits ([`RoundPlan`]): The generation's: a captured draft has one size, which fits all rounds.
        """
        deepest = limits.max_depth + limits.max_continued
        if plan.max_depth == 0 or self._draft_tree is None or not self._fits(deepest):
            return self.propose(newest_ids, positions, plan.max_depth, plan.width)
        assert isinstance(self._cache, StaticHeadCache)
        num_ids = MAX_CONTEXT if self.head.config.ngram_weights else 2
        newest_ids = pad(newest_ids[:, -num_ids:], (max(num_ids - newest_ids.shape[1], 0), 0), value=-1)
        features, context_position_ids = self._take_pending()
        if self._cache.is_empty or features.shape[1] > self._max_path_rows:  # a prompt: all but its newest row
            self._read_ahead((newest_ids[:, -1:], positions), features[:, :-1], context_position_ids[:, :-1])
            features, context_position_ids = features[:, -1:], context_position_ids[:, -1:]
        num_rows = features.shape[1]
        num_pad = self._max_path_rows - num_rows
        padded = pad(features, (0, 0, 0, num_pad))
        # No row sees a context row that is not before its anchor.
        padded_ids = torch.cat([context_position_ids, positions[:, None].expand(-1, num_pad)], dim=1)
        shape = limits.node_budget, limits.max_depth, limits.width, limits.max_continued
        outputs = self._draft_tree(self, newest_ids, positions, padded, padded_ids, self._cache, *shape)
        self._cache.count_rows(num_rows)
        return as_draft(outputs, deepest)

    @cached_property
    def _draft_tree(self) -> Callable | None:
        """`draft_tree` as one captured function; `None` if the target's forward is not compiled."""
        context, is_static = self._context, isinstance(self._cache, StaticHeadCache)
        if context is None or not (context.is_compiled and is_static and is_on_one_device(self.head, self.target)):
            return None
        _ = self._weights, self._draft_indices  # made by the host
        return context.captured(draft_tree)

    def _fits(self, depth: int) -> bool:
        """Whether the target has positions for nodes of this depth."""
        max_depth = None if self._context is None else self._context.max_depth
        return max_depth is None or depth <= max_depth

    def _read_ahead(self, anchors: tuple[torch.Tensor, ...], features: torch.Tensor, positions: torch.Tensor) -> None:
        """Cache context rows of any number, and check once per call that the head's numbers are finite."""
        assert isinstance(self._cache, StaticHeadCache)
        with self._weights.in_use():
            rows = self.read_block(anchors[0], anchors[1], features, positions, self._cache, 1)
        self._cache.count_rows(features.shape[1])
        self._has_checked_scores = True
        _warn_unless_finite(rows)

    def _take_pending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (batch, seq, taps x target_hidden) and positions (batch, seq) that the head has not read."""
        features, position_ids = (torch.cat(parts, dim=1) for parts in zip(*self._pending, strict=True))
        self._pending = [(features[:, :0], position_ids[:, :0])]
        return features, position_ids

    def read_block(
        self,
        anchor_ids: torch.Tensor,
        positions: torch.Tensor,
        features: torch.Tensor,
        context_position_ids: torch.Tensor,
        cache: HeadCache | StaticHeadCache,
        max_depth: int,
    ) -> torch.Tensor:
        """
        The head's forward over one block per sequence; returns the rows (batch, max_depth, features) that draft.

        Args:
            anchor_ids (`torch.Tensor`, (batch, 1)), positions (`torch.Tensor`, (batch,)): The anchors.
            features (`torch.Tensor`, (batch, seq, taps x target_hidden)): Of context rows that the cache lacks.
            context_position_ids (`torch.Tensor`, (batch, seq)): Their positions.
        """
        head = self.head
        first = 0 if head.config.anchor_predicts else 1  # row that drafts depth 1
        may_be_short = head.config.blocks_can_be_cut and isinstance(cache, HeadCache)
        offsets = self._row_offsets[None, : first + max_depth if may_be_short else head.config.num_rows]
        embeds = self.embed_block(anchor_ids.expand(-1, offsets.shape[1]), (offsets == 0).to(anchor_ids.device))
        return head(
            inputs_embeds=embeds.to(head.device, head.dtype),
            features=features.to(head.device, head.dtype),
            position_ids=to_device(positions, head.device)[:, None] + offsets,
            context_position_ids=context_position_ids.to(head.device),
            past_key_values=cache,
        )[:, first : first + max_depth]

    def embed_block(self, block_ids: torch.Tensor, is_anchor: torch.Tensor) -> torch.Tensor:
        """Input rows of the head (batch, rows, hidden), by its own embedding or the target's."""
        head = self.head
        if head.embed_tokens is None:
            return self.target.embeddings.embed_block(block_ids, is_anchor, head.mask_embedding)
        assert head.config.mask_token_id is not None
        return head.embed_tokens(torch.where(is_anchor, block_ids, head.config.mask_token_id).to(head.device))

    def rank(self, rows: torch.Tensor, newest_ids: torch.Tensor, width: int) -> Draft:
        """
        The draft of rows (..., depth, hidden) behind tokens (..., seq), on the tokens' device.

        Each depth gets `width` candidates, or `config.branch_candidates` where branches are scored.
        """
        config, device = self.head.config, newest_ids.device
        weights = config.ngram_weights
        scores_branches = bool(weights) or self.head.branch_correction is not None
        logprobs, token_ids = self.logprobs(rows), self.head.draft_token_ids
        order = logprobs
        if weights:  # context tokens rank by the most that n-grams can add, so that they become candidates
            order = self._boost_context_tokens(logprobs, newest_ids.to(logprobs.device), sum(weights))
        num_scored = min(config.branch_candidates if scores_branches else width, logprobs.shape[-1])
        indices = order.topk(num_scored).indices
        tokens = indices if token_ids is None else token_ids.to(indices.device)[indices]
        scores = logprobs.gather(-1, indices).to(device)
        if not (self._has_checked_scores or torch.compiler.is_compiling()):
            self._has_checked_scores = True
            _warn_unless_finite(scores)
        # A row of the head that overflows scores NaN throughout. No tree follows a candidate at minus infinity.
        candidates = Candidates(tokens.to(device), scores.nan_to_num(-math.inf, neginf=-math.inf))
        scorer = None
        if scores_branches or torch.compiler.is_compiling():  # compiled, no pairs are picked on the host
            ngrams: ContextNgrams | MatchedNgrams | None = None
            if weights and must_not_wait(device):
                ngrams = MatchedNgrams(newest_ids, candidates, weights)
            elif weights:
                ngrams = ContextNgrams(self._read_texts(newest_ids, len(weights)), candidates, weights)
            scorer = BranchScores(candidates, ngrams, self._correction(rows, newest_ids, candidates, indices))
        return Draft(newest_ids, candidates, scorer, has_ngrams=bool(weights))

    def _correction(
        self, rows: torch.Tensor, newest_ids: torch.Tensor, candidates: Candidates, indices: torch.Tensor
    ) -> Correction | None:
        scorer, first_depth = self.head.branch_correction, self.head.config.first_corrected_depth
        if scorer is None:
            return None
        if isinstance(scorer, TableScorer):
            return TableCorrection(scorer, rows, newest_ids, candidates, indices, self._weights, first_depth)
        assert self._token_parts is not None
        changes = logit_changes(scorer, self.target, self._weights, indices, self.head.draft_token_ids)
        return StepCorrection(
            scorer, rows, newest_ids, candidates, self._token_parts, changes, self._weights, first_depth
        )

    def _read_texts(self, newest_ids: torch.Tensor, longest: int) -> list[TextNgrams]:
        """The n-grams of the newest tokens of each text."""
        texts = newest_ids.reshape(-1, newest_ids.shape[-1])[:, -MAX_CONTEXT:].tolist()
        if len(self._texts) != len(texts):
            self._texts = [TextNgrams(longest) for _ in texts]
        for known, ids in zip(self._texts, texts, strict=True):
            num_padding = next((index for index, token in enumerate(ids) if token >= 0), len(ids))
            known.follow(ids[num_padding:])
        return self._texts

    def _boost_context_tokens(self, logprobs: torch.Tensor, newest_ids: torch.Tensor, gain: float) -> torch.Tensor:
        """Log-probabilities (..., depth, draft_vocab) and `gain` for tokens among the newest of a text."""
        size = self.head.config.vocab_size
        ids = newest_ids[..., -MAX_CONTEXT:]
        ids = ids.where((ids >= 0) & (ids < size), size)  # padding; placeholders of images may lie outside too
        indices = self._draft_indices.to(ids.device)[ids].unsqueeze(-2).expand(*logprobs.shape[:-1], -1)
        order = pad(logprobs, (0, 1))  # the last column stands for ids outside the draft vocabulary
        return order.scatter_(-1, indices, order.gather(-1, indices) + gain)[..., :-1]

    def logprobs(self, rows: torch.Tensor) -> torch.Tensor:
        """Draft log-probabilities (..., draft_vocab) of drafted rows (..., features), before any branch correction."""
        rows, projection = rows[..., : self.head.config.hidden_size], self._weights.projection
        if projection is not None:
            logits = projection(rows.to(projection.weight.device, projection.weight.dtype))
        else:
            rows = rows.to(self.target.device, self.target.model.dtype)
            logits = self.target.embeddings.output_logits(rows, self.head.draft_token_ids)
        return torch.log_softmax(self.head.shape_logits(logits.float()), dim=-1)

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
