"""Scores of the nodes of a draft tree: those of the head's block, changed by the branch correction and by n-grams."""

from collections.abc import Callable

import torch

from ..head.branch_correction import BranchCorrection
from ..target.target import Target
from ..trees.device_ngrams import MatchedNgrams
from ..trees.ngrams import ContextNgrams
from ..trees.tree import Candidates, corrected_logprobs, with_rest
from .draft_weights import DraftWeights


MAX_CACHED_TOKENS = 2048  # capacity of the projected-token cache
NUM_PREFETCHED = 8  # top candidates per depth to project in advance

# changes(depth, shifts): turns shifts (..., branches, hidden) of a depth's row into logit changes of its candidates,
# (..., branches, width).
LogitChanges = Callable[[int, torch.Tensor], torch.Tensor]


class BranchScores:
    """
    The branch scorer of one draft, called once per depth for all branches of the frontier (see `tree.BranchScorer`).

    Args:
        candidates ([`Candidates`]): Scored as if all branches of a depth were alike.
        ngrams ([`ContextNgrams`] or [`MatchedNgrams`], *optional*): Made for the same candidates.
        correction ([`Correction`], *optional*): Made for the same candidates.
    """

    def __init__(
        self,
        candidates: Candidates,
        ngrams: ContextNgrams | MatchedNgrams | None,
        correction: "Correction | None",
    ):
        self._logprobs, self._ngrams, self._correction = with_rest(candidates.logprobs), ngrams, correction

    @torch.no_grad()
    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logprobs = self._logprobs[..., depth, :].unsqueeze(-2)
        adjustments = None
        if self._correction is not None and depth:  # depth 0 has one branch, the anchor, which the block has read
            adjustments = self._correction(depth, parents, tokens).to(logprobs.device, torch.float32)
            adjustments = adjustments.nan_to_num(0.0, posinf=0.0, neginf=0.0)  # a correction that overflows is ignored
        if self._ngrams is not None:
            votes = self._ngrams(depth, parents, tokens)
            adjustments = votes if adjustments is None else adjustments + votes
        scores = logprobs if adjustments is None else corrected_logprobs(logprobs, adjustments)
        return scores[..., :-1]


class ProjectedTokenCache:
    """
    Pre-projected tokens: the branch correction's projection of a branch's last token, cached for one generation.

    A token drafted in one round is usually drafted again in the next ones, a depth higher. On other devices than the
    CPU nothing is cached, as the host would have to wait for the tokens.

    Args:
        correction ([`BranchCorrection`]): The head's.
        target ([`Target`]): Whose embeddings it reads.
    """

    def __init__(self, correction: BranchCorrection, target: Target):
        self._correction, self._target = correction, target
        self._kept: torch.Tensor | None = None  # (MAX_CACHED_TOKENS, 2 x width)
        self._places: dict[int, int] = {}  # rows in there, by token

    def of(self, tokens: torch.Tensor, soon: torch.Tensor | None = None) -> torch.Tensor:
        """The parts (tokens, 2 x width) of tokens (tokens,). Those of tokens asked for `soon` are made at once."""
        if tokens.device.type != "cpu":
            return self._project(tokens)
        token_ids = tokens.tolist()
        wanted = dict.fromkeys(token_ids if soon is None else [*token_ids, *soon.flatten().tolist()])
        unknown = [token for token in wanted if token not in self._places]
        if len(self._places) + len(unknown) > MAX_CACHED_TOKENS:
            self._places, unknown = {}, list(dict.fromkeys(token_ids))
        if len(unknown) > MAX_CACHED_TOKENS:
            return self._project(tokens)
        if unknown:
            parts, num_kept = self._project(torch.tensor(unknown, device="cpu")), len(self._places)
            if self._kept is None:
                self._kept = parts.new_empty(MAX_CACHED_TOKENS, parts.shape[-1])
            self._kept[num_kept : num_kept + len(unknown)] = parts
            self._places.update(zip(unknown, range(num_kept, num_kept + len(unknown)), strict=True))
        assert self._kept is not None
        places = torch.tensor([self._places[token] for token in token_ids], device=self._kept.device)
        return self._kept.index_select(0, places)

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = self._correction.token_proj.weight
        embeds = self._target.embed(tokens.to(self._target.device))
        return self._correction.project_tokens(embeds.to(weight.device, weight.dtype))


class Correction:
    """
    The head's branch correction of one proposal.

    What branches share is computed once: the part of their last token, and the part of their parent's state, which is
    known only when a child asks for it.

    Args:
        correction ([`BranchCorrection`]): The head's.
        rows (`torch.Tensor`, (..., depth, hidden)): The head's rows.
        candidates ([`Candidates`]): Drafted by these rows.
        token_parts ([`ProjectedTokenCache`]): Of the same correction.
        logit_changes: Turns shifts of a depth into logit changes of its candidates.
        weights ([`DraftWeights`]): Of head and target.
    """

    def __init__(
        self,
        correction: BranchCorrection,
        rows: torch.Tensor,
        candidates: Candidates,
        token_parts: ProjectedTokenCache,
        logit_changes: LogitChanges,
        weights: DraftWeights,
    ):
        self._correction, self._token_parts, self._weights = correction, token_parts, weights
        self._slots = correction.project_slots(rows)
        self._logit_changes = logit_changes
        self._likely_tokens = candidates.tokens[..., 1:-1, :NUM_PREFETCHED]  # of branches of two tokens and more
        # Of the branches of the depth before, one after the other: inner rows, and states before that depth.
        self._inner: torch.Tensor | None = None
        self._states: torch.Tensor | None = None
        self._num_before = 0

    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        with self._weights.in_use():
            return self._changes(depth, parents, tokens)

    def _changes(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        correction, slots, shape = self._correction, self._slots[..., depth, :].unsqueeze(-2), tokens.shape
        likely = self._likely_tokens if self._inner is None else None
        projected = self._token_parts.of(tokens.flatten(), likely).view(*shape, -1).to(slots.device) + slots
        if self._inner is not None:
            places = parents.flatten()
            if len(places) > shape[-1]:  # several sequences
                stop, step = len(places) // shape[-1] * self._num_before, self._num_before
                places = places + torch.arange(0, stop, step, device=places.device).repeat_interleave(shape[-1])
            places, of_branch = _distinct(places.to(slots.device))
            before = None if self._states is None else self._states.index_select(0, places)
            states = correction.carry(self._inner.index_select(0, places), before)
            projected += correction.project_states(states).index_select(0, of_branch).view_as(projected)
            self._states = states.index_select(0, of_branch)
        inner = correction.gate(projected)
        if correction.has_state:
            self._inner, self._num_before = inner.flatten(0, -2), shape[-1]
        return self._logit_changes(depth, correction.down_proj(inner))


def _distinct(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ones of some numbers, and the place of each number among them."""
    if numbers.device.type == "cpu":
        known = numbers.tolist()
        places = {number: place for place, number in enumerate(dict.fromkeys(known))}
        of_number = [places[number] for number in known]
        return torch.tensor(list(places), device="cpu"), torch.tensor(of_number, device="cpu")
    return numbers, torch.arange(len(numbers), device=numbers.device)  # the host would have to wait for their count
