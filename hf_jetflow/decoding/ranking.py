"""`Ranker`: rows of the head -> a `Draft`, which are candidates per depth and what scores them along a branch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import pad
from transformers.utils import logging

from ..head.modeling_jetflow import JetFlowHead
from ..head.scorers import StepScorer, TableScorer
from ..target.target import Target
from ..transfer import must_not_wait
from ..trees.device_ngrams import MatchedNgrams, continue_with_matches
from ..trees.ngrams import MAX_SEARCHED, ContextNgrams, TextNgrams, continue_tree
from ..trees.recycled import RecycledChoices, RecycledNgrams
from ..trees.tree import Candidates, DraftTree, ScoreBranches, build_tree
from .branch_scores import (
    BranchChanges,
    BranchScores,
    DraftedRows,
    ProjectedTokenCache,
    StepChanges,
    TableChanges,
    shift_products,
)
from .draft_weights import DraftWeights, draft_weights
from .outside_tokens import NO_TOKEN, distinct_outside, outside_logits


logger = logging.get_logger(__name__)

MAX_CONTEXT_GAIN = 5.0  # nats; 4 and 8 give the same tokens per round within 1 %, on short texts


@dataclass
class Draft:
    """One draft of the head, and what scores it along a branch."""

    newest_ids: torch.Tensor  # (..., seq) newest committed tokens, the anchor last
    candidates: Candidates  # (..., depth, width), scored as if all branches of a depth were alike
    score_branches: ScoreBranches | None = None  # `None` without n-grams and branch scorer
    has_ngrams: bool = False  # n-grams of the text may continue the tree below the head's deepest level

    def best_tree(
        self,
        node_budget: int,
        width: int | None = None,
        min_logprob: float = -math.inf,
        max_continued: int = 0,
    ) -> DraftTree:
        """The best tree within the node budget; see `build_tree` and `continue_tree`."""
        tree = build_tree(
            self.newest_ids[..., -1:], self.candidates, node_budget, self.score_branches, width, min_logprob
        )
        if not self.has_ngrams:
            return tree
        continued = continue_with_matches if must_not_wait(tree.tokens.device) else continue_tree
        return continued(tree, self.newest_ids, node_budget, max_continued, min_logprob)


class Ranker:
    """
    Ranks candidates for one generation of one sequence or a batch of them.

    Args:
        head ([`JetFlowHead`]): The draft head.
        target ([`Target`]): The target it borrows its embeddings from.
    """

    def __init__(self, head: JetFlowHead, target: Target):
        self._head, self._target = head, target
        self._texts: list[TextNgrams] = []  # by sequence; empty without n-grams
        scorer = head.branch_correction
        self._projected_tokens = ProjectedTokenCache(scorer, target) if isinstance(scorer, StepScorer) else None
        self._has_checked_scores = False

    @property
    def _ngram_weights(self) -> Sequence[float]:
        return self._head.config.ngram_weights or ()

    @cached_property
    def weights(self) -> DraftWeights:
        """Draft weights of the head and target. Created at the first draft: some calls never draft."""
        return draft_weights(self._head, self._target)

    @cached_property
    def _draft_indices(self) -> torch.Tensor:
        """Maps a target token id to its draft-vocabulary index, (vocab + 1,); other ids map to the draft vocabulary's
        size."""
        size, token_ids = self._head.config.vocab_size, self._head.draft_token_ids
        if token_ids is None:
            return torch.arange(size + 1, device=self._head.device)
        indices = token_ids.new_full((size + 1,), len(token_ids))
        return indices.scatter_(0, token_ids, torch.arange(len(token_ids), device=token_ids.device))

    def prepare(self) -> None:
        """Make what captured drafts read and only the host can make."""
        _ = self.weights, self._draft_indices

    def select_sequences(self, indices: list[int]) -> None:
        """Keep only these sequences of the batch, in this order."""
        self._texts = [self._texts[i] for i in indices if self._texts]

    def rank(
        self,
        rows: torch.Tensor,
        newest_ids: torch.Tensor,
        width: int,
        recycled: RecycledChoices | None = None,
        noise: torch.Tensor | None = None,
    ) -> Draft:
        """
        The draft of rows (..., depth, hidden) behind tokens (..., seq), on the tokens' device.

        Each depth gets `width` candidates, or `config.branch_candidates` where branches are scored. `noise` (...,
        depth, vocab) of the next draws counts for every score, see `noise.draft_noise`.
        """
        config = self._head.config
        is_scored = bool(self._ngram_weights) or self._head.branch_correction is not None
        num_candidates = config.branch_candidates if is_scored else width
        candidates, drafted = self._candidates(rows, newest_ids, num_candidates, recycled, noise)
        if not is_scored:
            return Draft(newest_ids, candidates)
        ngrams = self._ngrams(newest_ids, candidates, recycled) if self._ngram_weights else None
        branch_changes = self._branch_changes(drafted)
        score_branches = BranchScores(candidates, ngrams, branch_changes)
        return Draft(newest_ids, candidates, score_branches, has_ngrams=ngrams is not None)

    def _candidates(
        self,
        rows: torch.Tensor,
        newest_ids: torch.Tensor,
        num_candidates: int,
        recycled: RecycledChoices | None,
        noise: torch.Tensor | None,
    ) -> tuple[Candidates, DraftedRows]:
        """The best tokens of each depth, on the tokens' device: scored for the tree, and as the head alone scores them
        for its branch scorer."""
        device, context, outside = newest_ids.device, None, None
        if self._ngram_weights:
            context = newest_ids[..., -MAX_SEARCHED:]
            if recycled is not None:
                context = torch.cat([context, recycled.choices.view(*context.shape[:-1], -1)], dim=-1)
            if self.scores_outside_tokens:
                outside = distinct_outside(context, self._draft_indices.to(device))
        head_logprobs = logprobs = self.logprobs(rows, outside)
        if noise is not None:
            logprobs = torch.log_softmax(logprobs + self._noise_of(noise.to(logprobs.device), outside), dim=-1)
        order = logprobs
        if context is not None:  # these tokens rank higher, by what n-grams may add to them, to become candidates
            gain = min(sum(self._ngram_weights), MAX_CONTEXT_GAIN)
            order = self._boost_context_tokens(logprobs, context.to(logprobs.device), gain)
        indices = order.topk(min(num_candidates, order.shape[-1])).indices
        tokens = self._target_ids(indices, outside).to(device)
        scores = logprobs.gather(-1, indices).to(device)
        if not torch.compiler.is_compiling():
            self.warn_unless_finite(scores)
        # A row of the head that overflows scores NaN throughout. No tree follows a candidate at minus infinity.
        candidates = alone = Candidates(tokens, scores.nan_to_num(-math.inf, neginf=-math.inf))
        if noise is not None:
            scores = head_logprobs.gather(-1, indices).to(device)
            alone = Candidates(tokens, scores.nan_to_num(-math.inf, neginf=-math.inf))
        return candidates, DraftedRows(rows, newest_ids, alone, indices)

    def _noise_of(self, noise: torch.Tensor, outside: torch.Tensor | None) -> torch.Tensor:
        """Noise (..., depth, draft_vocab + tokens) of the draft vocabulary and of tokens (..., tokens) outside of it,
        given that of the tokens that the target draws (..., depth, vocab)."""
        size, token_ids = self._head.config.vocab_size, self._head.draft_token_ids
        noise = pad(noise, (0, size - noise.shape[-1]))  # a negative number cuts it
        if token_ids is None:
            return noise
        drafted = noise.index_select(-1, token_ids.to(noise.device))
        if outside is None:
            return drafted
        ids = outside.clamp_min(0).to(noise.device).unsqueeze(-2).expand(*noise.shape[:-1], -1)
        return torch.cat([drafted, noise.gather(-1, ids)], dim=-1)

    @property
    def scores_outside_tokens(self) -> bool:
        """Whether all that is scored by rows of the target's output embedding, which every token has."""
        scorer = self._head.branch_correction
        by_rows = scorer is None or (isinstance(scorer, StepScorer) and scorer.output_weight is None)
        return by_rows and self._head.draft_token_ids is not None and self.weights.output_embedding is not None

    def _target_ids(self, indices: torch.Tensor, outside: torch.Tensor | None) -> torch.Tensor:
        """Target ids of draft-vocabulary indices (..., depth, width), behind which tokens (..., tokens) come."""
        token_ids = self._head.draft_token_ids
        if token_ids is None:
            return indices
        token_ids = token_ids.to(indices.device)
        if outside is None or not outside.shape[-1]:
            return token_ids[indices]
        ids = outside.clamp_min(0).to(indices.device).unsqueeze(-2).expand(*indices.shape[:-1], -1)
        others = ids.gather(-1, (indices - len(token_ids)).clamp_min(0))
        return torch.where(indices < len(token_ids), token_ids[indices.clamp_max(len(token_ids) - 1)], others)

    def _ngrams(
        self, newest_ids: torch.Tensor, candidates: Candidates, recycled: RecycledChoices | None
    ) -> ContextNgrams | MatchedNgrams:
        weights, gain = self._ngram_weights, self._head.config.recycled_weight
        if must_not_wait(newest_ids.device):
            return MatchedNgrams(newest_ids, candidates, weights, recycled, gain)
        texts = self._read_texts(newest_ids, len(weights))
        if recycled is None:
            return ContextNgrams([[text] for text in texts], candidates, [weights])
        parts = recycled.tokens, recycled.parents, recycled.choices, recycled.num_committed
        of_trees = [
            RecycledNgrams(tokens, parents, choices, text.ids, num_committed, len(weights))
            for text, tokens, parents, choices, num_committed in zip(
                texts, *(part.tolist() for part in parts), strict=True
            )
        ]
        sources = list(zip(texts, of_trees, strict=True))
        return ContextNgrams(sources, candidates, [weights, [gain * weight for weight in weights]])

    def _branch_changes(self, drafted: DraftedRows) -> BranchChanges | None:
        scorer, first_depth = self._head.branch_correction, self._head.config.first_corrected_depth
        if scorer is None:
            return None
        if isinstance(scorer, TableScorer):
            return TableChanges(scorer, drafted, self.weights, first_depth)
        assert self._projected_tokens is not None
        products = shift_products(scorer, self._target, self.weights, drafted, self._head.draft_token_ids)
        return StepChanges(scorer, drafted, self._projected_tokens, products, self.weights, first_depth)

    def _read_texts(self, newest_ids: torch.Tensor, longest: int) -> list[TextNgrams]:
        """The n-grams of the newest tokens of each text."""
        texts = newest_ids.reshape(-1, newest_ids.shape[-1])[:, -MAX_SEARCHED:].tolist()
        if len(self._texts) != len(texts):
            self._texts = [TextNgrams(longest) for _ in texts]
        for known, ids in zip(self._texts, texts, strict=True):
            num_padding = next((index for index, token in enumerate(ids) if token >= 0), len(ids))
            known.follow(ids[num_padding:])
        return self._texts

    def _boost_context_tokens(self, logprobs: torch.Tensor, ids: torch.Tensor, gain: float) -> torch.Tensor:
        """Log-probabilities (..., depth, draft_vocab + tokens), and `gain` more for these tokens (..., seq) and for
        all outside the draft vocabulary."""
        size, token_ids = self._head.config.vocab_size, self._head.draft_token_ids
        num_drafted = size if token_ids is None else len(token_ids)
        ids = ids.where((ids >= 0) & (ids < size), size)  # padding; placeholders of images may lie outside too
        indices = self._draft_indices.to(ids.device)[ids].unsqueeze(-2).expand(*logprobs.shape[:-1], -1)
        order = pad(logprobs[..., :num_drafted], (0, 1))  # the last column stands for ids outside the draft vocabulary
        order = order.scatter_(-1, indices, order.gather(-1, indices) + gain)[..., :-1]
        return torch.cat([order, logprobs[..., num_drafted:] + gain], dim=-1) if token_ids is not None else order

    def logprobs(self, rows: torch.Tensor, outside: torch.Tensor | None = None) -> torch.Tensor:
        """
        Draft log-probabilities of drafted rows (..., depth, features), before any branch correction.

        Args:
            outside (`torch.Tensor`, (..., tokens), *optional*): Tokens outside the draft vocabulary to score with it.

        Returns:
            `torch.Tensor`, (..., depth, draft_vocab + tokens).
        """
        rows, projection = rows[..., : self._head.config.hidden_size], self.weights.projection
        if projection is not None:
            logits = projection(rows.to(projection.weight.device, projection.weight.dtype))
        else:
            rows = rows.to(self._target.device, self._target.model.dtype)
            logits = self._target.embeddings.output_logits(rows, self._head.draft_token_ids)
        if outside is None:
            return torch.log_softmax(self._head.shape_logits(logits.float()), dim=-1)
        assert self.weights.output_embedding is not None
        more = outside_logits(rows, outside, self.weights.output_embedding)
        logits = self._head.shape_logits(torch.cat([logits, more], dim=-1).float())
        is_missing = pad(outside == NO_TOKEN, (logits.shape[-1] - outside.shape[-1], 0)).unsqueeze(-2)
        return torch.log_softmax(logits.masked_fill(is_missing.to(logits.device), -math.inf), dim=-1)

    def warn_unless_finite(self, scores: torch.Tensor) -> None:
        """Look at the head's numbers once per generation: off the CPU the host has to wait."""
        if self._has_checked_scores:
            return
        self._has_checked_scores = True
        if scores.isnan().any():
            logger.warning_once(
                "The draft head computes NaN scores, and those drafts are dropped: the text stays exact, but decoding "
                "is slow. Its weights are damaged, or its numbers overflow in its dtype: load it in bfloat16 or "
                "float32."
            )
