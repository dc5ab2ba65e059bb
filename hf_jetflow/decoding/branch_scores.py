"""Scores of a draft tree's nodes: those of the head's block, changed by the head's branch scorer and by n-grams."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..buffers import gather_rows
from ..head.scorers import Memory, StepScorer, TableScorer
from ..target.target import Target
from ..transfer import must_not_wait
from ..trees.device_ngrams import MatchedNgrams
from ..trees.ngrams import ContextNgrams
from ..trees.tree import Candidates, corrected_logprobs, with_rest
from .draft_weights import DraftWeights


MAX_CACHED_TOKENS = 2048  # capacity of the projected-token cache
NUM_PREFETCHED = 8  # top candidates per depth to project in advance

# products(depth, shifts): turns shifts (..., branches, shift) of a depth into logit changes of its candidates,
# (..., branches, width).
ShiftProducts = Callable[[int, torch.Tensor], torch.Tensor]
# changes(depth, parents, tokens): logit changes (..., branches, width) of a depth's candidates after each branch of
# the frontier (see `tree.ScoreBranches`); `None` if nothing changes at this depth.
BranchChanges = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]


class BranchScores:
    """
    Scores of one draft's candidates after each branch of the frontier, by depth: a `tree.ScoreBranches`.

    Args:
        candidates ([`Candidates`]): Candidates with branch-independent scores.
        ngrams ([`ContextNgrams`] or [`MatchedNgrams`], *optional*): Context n-grams of the same candidates.
        branch_changes (`BranchChanges`, *optional*): Changes of the same candidates by the head's branch scorer.
    """

    def __init__(
        self,
        candidates: Candidates,
        ngrams: ContextNgrams | MatchedNgrams | None,
        branch_changes: BranchChanges | None,
    ):
        self._logprobs, self._ngrams = with_rest(candidates.logprobs), ngrams
        self._branch_changes = branch_changes

    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logprobs = self._logprobs[..., depth, :].unsqueeze(-2)
        with torch.no_grad():
            changes = None if self._branch_changes is None else self._branch_changes(depth, parents, tokens)
        if changes is not None:
            changes = changes.to(logprobs.device, torch.float32)
            changes = changes.nan_to_num(0.0, posinf=0.0, neginf=0.0)  # a correction that overflows is ignored
        if self._ngrams is not None:
            of_ngrams = self._ngrams(depth, parents, tokens)
            changes = of_ngrams if changes is None else changes + of_ngrams
        scores = logprobs if changes is None else corrected_logprobs(logprobs, changes)
        return scores[..., :-1]


class ProjectedTokenCache:
    """
    Pre-projected tokens: a step scorer's projection of a branch's last token, cached for one generation.

    A token drafted in one round is usually drafted again in the next ones, a depth higher. Nothing is cached where
    shapes are fixed.

    Args:
        scorer ([`StepScorer`]): The head's branch scorer.
        target ([`Target`]): The target that embeds the tokens.
    """

    def __init__(self, scorer: StepScorer, target: Target):
        self._scorer, self._target = scorer, target
        self._projected: torch.Tensor | None = None  # (MAX_CACHED_TOKENS, features)
        self._indices: dict[int, int] = {}  # rows of it, by token

    def lookup(self, tokens: torch.Tensor, prefetch: torch.Tensor | None = None) -> torch.Tensor:
        """Projections (tokens, features) of tokens (tokens,). `prefetch` tokens are projected and cached with them."""
        if must_not_wait(tokens.device):
            return self._project(tokens)
        token_ids = tokens.tolist()
        wanted = dict.fromkeys(token_ids if prefetch is None else [*token_ids, *prefetch.flatten().tolist()])
        unknown = [token for token in wanted if token not in self._indices]
        if len(self._indices) + len(unknown) > MAX_CACHED_TOKENS:
            self._indices, unknown = {}, list(dict.fromkeys(token_ids))
        if len(unknown) > MAX_CACHED_TOKENS:
            return self._project(tokens)
        if unknown:
            projected, num_known = self._project(torch.tensor(unknown, device="cpu")), len(self._indices)
            if self._projected is None:
                self._projected = projected.new_empty(MAX_CACHED_TOKENS, projected.shape[-1])
            self._projected[num_known : num_known + len(unknown)] = projected
            self._indices.update(zip(unknown, range(num_known, num_known + len(unknown)), strict=True))
        assert self._projected is not None
        indices = torch.tensor([self._indices[token] for token in token_ids], device=self._projected.device)
        return self._projected.index_select(0, indices)

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = next(self._scorer.parameters())
        if not self._scorer.reads_embeddings:
            return self._scorer.project_tokens(tokens.to(weight.device))
        embeds = self._target.embeddings.embed(tokens.to(self._target.device))
        return self._scorer.project_tokens(embeds.to(weight.device, weight.dtype))


@dataclass
class DraftedRows:
    """Rows of one draft, and the candidates that they drafted."""

    rows: torch.Tensor  # (..., depth, features), the head's
    newest_ids: torch.Tensor  # (..., seq) newest committed tokens, the anchor last
    candidates: Candidates
    indices: torch.Tensor  # (..., depth, width), the candidates as indices into the draft vocabulary; others lie above


class TableChanges:
    """
    Logit changes of one draft by a table scorer: all pairs of candidates of neighboring depths are scored at once.

    Args:
        scorer ([`TableScorer`]): The head's.
        drafted ([`DraftedRows`]): What it scores.
        weights ([`DraftWeights`]): Draft weights of this head and target.
        first_depth (`int`): Depth of the first nodes whose children's scores change.
    """

    def __init__(self, scorer: TableScorer, drafted: DraftedRows, weights: DraftWeights, first_depth: int):
        rows, candidates = drafted.rows, drafted.candidates
        tokens, device = candidates.tokens, rows.device
        anchors = drafted.newest_ids[..., -1:, None].expand_as(tokens[..., :1, :])
        self._parents = torch.cat([anchors, tokens[..., :-1, :]], dim=-2)  # of each depth, (..., depth, width)
        with weights.in_use():
            table = scorer.table(
                rows,
                self._parents.to(device),
                tokens.to(device),
                drafted.indices.to(device),
                candidates.logprobs.to(device),
            )
        self._table, self._first_depth = table.to(tokens.device), first_depth  # (..., depth, parents, width)

    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        if depth < self._first_depth:
            return None
        is_parent = self._parents[..., depth, :].unsqueeze(-2) == tokens.unsqueeze(-1)
        return gather_rows(self._table[..., depth, :, :], is_parent.int().argmax(-1))


class StepChanges:
    """
    Logit changes of one draft by a step scorer.

    Shared work is done once: tokens are projected per distinct token, memory is recalled per distinct parent, on
    demand.

    Args:
        scorer ([`StepScorer`]): The head's.
        drafted ([`DraftedRows`]): What it scores.
        projected_tokens ([`ProjectedTokenCache`]): Of `scorer`.
        shift_products: Turns shifts of a depth into logit changes of its candidates.
        weights ([`DraftWeights`]): Draft weights of this head and target.
        first_depth (`int`): Depth of the first nodes whose children's scores change.
    """

    def __init__(
        self,
        scorer: StepScorer,
        drafted: DraftedRows,
        projected_tokens: ProjectedTokenCache,
        shift_products: ShiftProducts,
        weights: DraftWeights,
        first_depth: int,
    ):
        self._scorer, self._projected_tokens, self._weights = scorer, projected_tokens, weights
        with weights.in_use():
            self._projected_rows = scorer.project_rows(drafted.rows)
        self._shift_products, self._first_depth = shift_products, first_depth
        self._start_ids = _start_ids(drafted.newest_ids, scorer)
        # Projected in advance, together with the first tokens that are looked up.
        self._likely_tokens: torch.Tensor | None = drafted.candidates.tokens[..., 1:-1, :NUM_PREFETCHED]
        self._memory: Memory = ()  # of the previous depth, branches flattened
        self._num_before = 0

    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        if depth == 0:
            self._memory = ()  # of an earlier tree: a draft can build several
        if depth < self._first_depth and not self._scorer.reads_anchor:
            return None
        with self._weights.in_use():
            shifts = self._read(depth, parents, tokens)
            return None if depth < self._first_depth else self._shift_products(depth, shifts)

    def _read(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        scorer, row, shape = self._scorer, self._projected_rows[..., depth, :].unsqueeze(-2), tokens.shape
        projected = self._project(tokens, self._likely_tokens)
        self._likely_tokens = None
        recalled: Memory | None = None
        if depth == 0:
            recalled = scorer.start(row, self._project(self._start_ids))
        elif self._memory:
            recalled = self._recall(parents)
        shifts, memory = scorer.read(depth, row, projected, recalled)
        self._memory, self._num_before = tuple(part.flatten(0, len(shape) - 1) for part in memory), shape[-1]
        return shifts

    def _project(self, tokens: torch.Tensor, likely: torch.Tensor | None = None) -> torch.Tensor:
        projected = self._projected_tokens.lookup(tokens.flatten(), likely)
        return projected.view(*tokens.shape, -1).to(self._projected_rows.device)

    def _recall(self, parents: torch.Tensor) -> Memory:
        """What each branch recalls of its parent, (..., branches, ...)."""
        shape, indices = parents.shape, parents.flatten()
        if len(indices) > shape[-1]:  # several sequences
            stop, step = len(indices) // shape[-1] * self._num_before, self._num_before
            indices = indices + torch.arange(0, stop, step, device=indices.device).repeat_interleave(shape[-1])
        indices, of_branch = _distinct(indices.to(self._projected_rows.device))
        recalled = self._scorer.recall(tuple(part.index_select(0, indices) for part in self._memory))
        return tuple(part.index_select(0, of_branch).unflatten(0, shape) for part in recalled)


def shift_products(
    scorer: StepScorer,
    target: Target,
    weights: DraftWeights,
    drafted: DraftedRows,
    token_ids: torch.Tensor | None,
) -> ShiftProducts:
    """
    Return a function that maps shifts (..., branches, shift) of a depth to logit changes of its candidates.

    Args:
        drafted ([`DraftedRows`]): What it scores.
        token_ids (`torch.Tensor`, (draft_vocab,), *optional*): The draft vocabulary, if it is not the target's.
    """
    weight, indices = scorer.output_weight, drafted.indices
    if weight is None and weights.output_embedding is not None:
        weight, indices = weights.output_embedding, drafted.candidates.tokens
    elif weight is None and weights.projection is not None:
        weight = weights.projection.weight
    if weight is not None:

        def products(depth: int, shifts: torch.Tensor) -> torch.Tensor:
            shifts, columns = shifts.to(weight.device, weight.dtype), indices[..., depth, :].to(weight.device)
            return scorer.candidate_logits(shifts, weight, columns)

        return products

    def products_by_module(depth: int, shifts: torch.Tensor) -> torch.Tensor:
        shifts = shifts.to(target.device, target.model.dtype)
        zero = torch.zeros_like(shifts[..., :1, :])  # yields what is no shift: the bias
        logits = target.embeddings.output_logits(torch.cat([shifts, zero], dim=-2), token_ids)
        columns = indices[..., depth, :].unsqueeze(-2)
        logits = logits.gather(-1, columns.expand(*logits.shape[:-1], columns.shape[-1]))
        return logits[..., :-1, :] - logits[..., -1:, :]

    return products_by_module


def _start_ids(newest_ids: torch.Tensor, scorer: StepScorer) -> torch.Tensor:
    """Token (..., 1) with which memory starts: the anchor, or the one before it if there is one."""
    anchors = newest_ids[..., -1:]
    if not scorer.starts_before_anchor or newest_ids.shape[-1] == 1:
        return anchors
    before = newest_ids[..., -2:-1]
    is_token = (before >= 0) & (before < scorer.config.vocab_size)  # no padding, no placeholder of an image
    return torch.where(is_token, before, anchors)


def _distinct(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct numbers in order of appearance, and each number's index among them."""
    if must_not_wait(numbers.device):
        return numbers, torch.arange(len(numbers), device=numbers.device)
    known = numbers.tolist()
    indices = {number: index for index, number in enumerate(dict.fromkeys(known))}
    of_number = [indices[number] for number in known]
    return torch.tensor(list(indices), device="cpu"), torch.tensor(of_number, device="cpu")
