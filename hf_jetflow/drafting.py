"""`JetFlowCandidateGenerator`: anchor and context features -> block -> head -> candidates per depth."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.generation.candidate_generator import CandidateGenerator

from .caches import HeadCache, StaticHeadCache
from .modeling_jetflow import BranchCorrection, JetFlowHead
from .reuse import HeadContext
from .target import Context, Target, TargetStates
from .tree import BranchScorer, Candidates, build_tree, corrected_logprobs


CandidateLogits = Callable[[int, torch.Tensor], torch.Tensor]


class _CorrectedScores:
    """
    The branch scorer of one proposal: once per depth, over all branches of the frontier (see `tree.BranchScorer`).

    Args:
        correction ([`BranchCorrection`]): The head's.
        target ([`Target`]): Whose embeddings it reads.
        rows (`torch.Tensor`, (depth, hidden)): The head's rows.
        candidates ([`Candidates`]): Of the same depths.
        candidate_logits: Turns shifts of a depth into logit changes of its candidates.
    """

    def __init__(
        self,
        correction: BranchCorrection,
        target: Target,
        rows: torch.Tensor,
        candidates: Candidates,
        candidate_logits: CandidateLogits,
    ):
        self._correction, self._target = correction, target
        self._slots = correction.project_slots(rows)
        self._logprobs = candidates.logprobs
        self._candidate_logits = candidate_logits
        self._state: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logprobs = self._logprobs[depth][None]
        if depth == 0:  # the anchor is the only branch, and the block was drafted after it
            return logprobs
        slots = self._slots
        embeds = self._target.embed(tokens.to(self._target.device)).to(slots.device, slots.dtype)
        state = None if self._state is None else self._state[parents.to(slots.device)]
        shifts, self._state = self._correction(slots[depth], embeds, state)
        adjustments = self._candidate_logits(depth, shifts).to(logprobs.device, torch.float32)
        return corrected_logprobs(logprobs, adjustments)[0]


class JetFlowCandidateGenerator(CandidateGenerator):
    """
    Drafts with a head for one generation.

    Feed it the target's states with `observe` whenever tokens were committed, then `propose` drafts behind the newest
    committed token.

    Args:
        head ([`JetFlowHead`]): The draft head.
        target ([`Target`]): The target it borrows its embeddings from.
        context ([`Context`], *optional*): The generation's. Where its cache is static, the head's forwards have one
            shape, and are compiled where the target's are.
        past ([`HeadContext`], *optional*): What the head was shown by an earlier call that left the target's cache.
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
        self._path_rows = head.config.block_size  # states that a round hands over at most
        self._cache: HeadCache | StaticHeadCache = HeadCache(head.config.num_hidden_layers)
        if context is not None and context.num_static_slots is not None:
            capacity = context.num_static_slots + self._path_rows
            self._cache = StaticHeadCache(head.config.num_hidden_layers, capacity)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # features and positions the head has not read
        if past is not None:
            past.load(self._cache, head.config.num_rows)
            self._pending.append((past.features, past.feature_position_ids))
        self._newest_position: torch.Tensor | None = None  # (1,), of the newest committed token that was observed
        self._projection = target.output_rows(head.draft_token_ids) if head.lm_head is None else head.lm_head.weight
        self._slots = torch.arange(head.config.num_rows, device=head.device)
        self.branch_scorer: BranchScorer | None = None  # of the newest proposal, for a head with a branch correction

    def observe(self, states: TargetStates, rows: list[int] | None = None) -> None:
        """Take over the states of newly committed tokens; of `rows` only, where a tree was verified."""
        features, position_ids = states.features, states.position_ids
        if rows is not None:
            features, position_ids = features[:, rows], position_ids[:, rows]
        self._pending.append((features, position_ids))
        self._newest_position = position_ids[0, -1:]

    def head_context(self) -> HeadContext:
        """All that the head was shown."""
        layers, position_ids = self._cache.context_rows()
        features, feature_position_ids = (torch.cat(parts, dim=1) for parts in zip(*self._pending, strict=True))
        if position_ids is None:
            position_ids = feature_position_ids[:, :0]
        return HeadContext(tuple(layers), position_ids, features, feature_position_ids)

    @torch.no_grad()
    def propose(self, anchor_id: torch.Tensor, position: int, max_depth: int, width: int) -> Candidates:
        """
        One head forward.

        Args:
            anchor_id (`torch.Tensor`, (1,)): The newest committed token.
            position (`int`): Its absolute position.
            max_depth (`int`): Depths to draft; 0 drafts nothing and leaves the head alone.
            width (`int`): Candidates per depth; a head with a branch correction proposes those it re-scores.

        Returns:
            `Candidates`: (max_depth, width), on the anchor's device; `branch_scorer` then re-scores them.
        """
        head, device = self.head, anchor_id.device
        if max_depth == 0:
            return Candidates(anchor_id.new_empty(0, width), torch.empty(0, width, device=device))
        is_static = isinstance(self._cache, StaticHeadCache)
        first = 0 if head.config.anchor_predicts else 1  # row that drafts depth 1
        # Rows behind the deepest drafted one are invisible to it when every layer is causal.
        may_be_short = all(head.config.causal_layers) and not is_static
        slots = self._slots[None, : first + max_depth if may_be_short else head.config.num_rows]
        embeds = self.embed_block(anchor_id[:, None].expand_as(slots), (slots == 0).to(device))
        features, context_position_ids = (torch.cat(parts, dim=1) for parts in zip(*self._pending, strict=True))
        self._pending = [(features[:, :0], context_position_ids[:, :0])]
        read = self._read_static if is_static else head
        rows = read(
            inputs_embeds=embeds.to(head.device, head.dtype),
            features=features.to(head.device, head.dtype),
            position_ids=position + slots,
            context_position_ids=context_position_ids.to(head.device),
            past_key_values=self._cache,
        )[0, first : first + max_depth]
        return self.rank(rows, width, device)

    def _read_static(self, features: torch.Tensor, context_position_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The head's forward with one number of context rows: a path's, padded. More of them, as in a prompt, are read
        as they are."""
        assert isinstance(self._cache, StaticHeadCache)
        assert self._context is not None
        num_rows = features.shape[1]
        forward: Callable = self.head
        if not self._cache.is_empty and num_rows <= self._path_rows:
            forward = self._context.forward_of(self.head)
            num_pad = self._path_rows - num_rows
            features = pad(features, (0, 0, 0, num_pad))
            anchor_position = inputs["position_ids"][:, :1]  # no row sees a context row that is not before its anchor
            context_position_ids = torch.cat([context_position_ids, anchor_position.expand(-1, num_pad)], dim=1)
        rows = forward(features=features, context_position_ids=context_position_ids, **inputs)
        self._cache.keep(num_rows)
        return rows

    def embed_block(self, block_ids: torch.Tensor, is_anchor: torch.Tensor) -> torch.Tensor:
        """Input rows of the head (1, rows, hidden), by its own embedding or the target's."""
        head = self.head
        if head.embed_tokens is None:
            return self.target.embed_block(block_ids, is_anchor, head.mask_embedding)
        assert head.config.mask_token_id is not None
        return head.embed_tokens(torch.where(is_anchor, block_ids, head.config.mask_token_id).to(head.device))

    def rank(self, rows: torch.Tensor, width: int, device: torch.device) -> Candidates:
        """The candidates of drafted rows (depth, hidden), on `device`; `branch_scorer` is then theirs."""
        correction = self.head.branch_correction
        if correction is None:
            return self._candidates(rows, width, device)[0]
        candidates, places = self._candidates(rows, self.head.config.branch_candidates, device)
        self.branch_scorer = _CorrectedScores(correction, self.target, rows, candidates, self._output(places))
        return candidates

    def _candidates(self, rows: torch.Tensor, width: int, device: torch.device) -> tuple[Candidates, torch.Tensor]:
        """Best `width` tokens of each row (depth, hidden) and their places in the draft vocabulary."""
        token_ids, logprobs = self.head.draft_token_ids, self.logprobs(rows)
        best = logprobs.topk(min(width, logprobs.shape[-1]))
        tokens = best.indices if token_ids is None else token_ids.to(best.indices.device)[best.indices]
        return Candidates(tokens.to(device), best.values.to(device)), best.indices

    def logprobs(self, rows: torch.Tensor) -> torch.Tensor:
        """Draft log-probabilities (rows, draft_vocab) of drafted rows (rows, hidden), before any branch correction."""
        if self._projection is not None:
            logits = rows.to(self._projection.device, self._projection.dtype) @ self._projection.T
        else:
            rows = rows.to(self.target.device, self.target.model.dtype)
            logits = self.target.output_logits(rows, self.head.draft_token_ids)
        return torch.log_softmax(self.head.shape_logits(logits.float()), dim=-1)

    def _output(self, places: torch.Tensor) -> CandidateLogits:
        """What turns shifts (branches, hidden) of a depth into logit changes of its candidates (branches, width)."""
        if self._projection is not None:
            columns = self._projection[places].transpose(1, 2)
            return lambda depth, shifts: shifts.to(columns.device, columns.dtype) @ columns[depth]
        target, token_ids = self.target, self.head.draft_token_ids

        def changes(depth: int, shifts: torch.Tensor) -> torch.Tensor:
            shifts = shifts.to(target.device, target.model.dtype)
            rows = torch.cat([shifts, torch.zeros_like(shifts[:1])])  # the zero row yields what is no shift: the bias
            logits = target.output_logits(rows, token_ids)[:, places[depth]]
            return logits[:-1] - logits[-1]

        return changes

    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """
        The base class's chain view of `propose`: the best token of every depth behind `input_ids` (1, seq).

        No draft probabilities are returned: nothing is sampled from the head, and verification never needs them.
        """
        if self._newest_position is None:
            raise ValueError("nothing was observed yet; call `observe` with the target's states of the prompt first")
        position = int(self._newest_position) + 1
        block_size = self.head.config.block_size
        candidates = self.propose(input_ids[:, -1], position, block_size - 1, width=1)
        chain = build_tree(input_ids[:, -1], candidates, block_size, self.branch_scorer, width=1)
        return torch.cat([input_ids, chain.tokens[None, 1:]], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Nothing to update: the loop plans every round anew."""
