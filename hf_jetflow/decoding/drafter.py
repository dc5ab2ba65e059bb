"""`JetFlowCandidateGenerator`: anchor and context features -> block -> head -> rows, which `ranking.py` ranks."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from ..buffers import gather_rows
from ..head.cache import UNSEEN_POSITION, GrowingHeadCache, HeadCache, StaticHeadCache
from ..head.modeling_jetflow import JetFlowHead
from ..target.prefilled import PrefilledTarget, TargetStates
from ..target.target import Target
from ..transfer import must_not_wait, to_device
from ..trees.ngrams import MAX_SEARCHED
from ..trees.recycled import RecycledChoices, no_choices, recycle
from ..trees.tree import Candidates, DraftTree
from .captured_draft import CapturedDraft, as_draft, draft_tree, is_on_one_device, keep_static_cache, static_cache
from .policy import MAX_CONTINUED, TreeLimits
from .ranking import Draft, Ranker
from .reuse import HeadContext


class JetFlowCandidateGenerator(CandidateGenerator):
    """
    Drafts with a head for one generation of one sequence or a batch of them.

    Call `observe` with the target's states whenever tokens were committed, then draft behind them. The loop calls
    `draft`; `get_candidates` serves code that knows transformers' candidate generators.

    Args:
        head ([`JetFlowHead`]): The draft head.
        target ([`Target`]): The target it borrows its embeddings from.
        prefilled ([`PrefilledTarget`], *optional*): With a static cache and a compiled target, drafts are captured,
            too.
        past ([`HeadContext`], *optional*): What an earlier call, which left the target's cache, has shown to the head.
    """

    def __init__(
        self,
        head: JetFlowHead,
        target: Target,
        prefilled: PrefilledTarget | None = None,
        past: HeadContext | None = None,
    ):
        self.head = head
        self.target = target
        self._prefilled = prefilled
        self._max_path_rows = head.config.block_size + MAX_CONTINUED  # a captured draft reads as many states
        self._cache: GrowingHeadCache | StaticHeadCache = GrowingHeadCache(head.config.num_hidden_layers)
        if prefilled is not None and prefilled.strategy.capacity is not None:
            self._cache = static_cache(head, prefilled.strategy.capacity + self._max_path_rows, prefilled.is_compiled)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # features and positions the head has not read
        if past is not None:
            past.load(self._cache, head.config.num_rows)
            self._pending.append((past.features, past.feature_position_ids))
        self._newest_positions: torch.Tensor | None = None  # (batch, seq) of the newest observed tokens
        # Ids in front of short texts, and features behind short paths, that give a captured draft its one shape.
        self._fillers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._recycled: RecycledChoices | None = None
        self._row_offsets = torch.arange(head.config.num_rows, device=head.device)
        self.ranker = Ranker(head, target)

    def observe(
        self, states: TargetStates, tree: DraftTree | None = None, paths: list[list[int]] | None = None
    ) -> None:
        """Take over the states of newly committed tokens; after a verify of a tree, those of each sequence's path, and
        the target's choices at the other nodes."""
        if tree is None or paths is None:
            features, position_ids = states.features, states.position_ids
        else:
            features, position_ids = _path_features(states, paths)
            self._recycled = recycle(tree, states.logits, paths) if self._recycles else None
        self._pending.append((features, position_ids))
        self._newest_positions = position_ids

    @property
    def _recycles(self) -> bool:
        return bool(self.head.config.ngram_weights) and self.head.config.recycled_weight > 0

    def select_sequences(self, indices: list[int]) -> None:
        """Keep only these sequences of the batch, in this order."""
        index = to_device(indices, self.head.device)
        self.ranker.select_sequences(indices)
        if self._recycled is not None:
            self._recycled = self._recycled.select_sequences(index)
        self._pending = [
            (features[index.to(features.device)], position_ids[index.to(position_ids.device)])
            for features, position_ids in self._pending
        ]
        if isinstance(self._cache, GrowingHeadCache):
            self._cache.select_sequences(index)

    def close(self) -> None:
        """Leave a captured draft's cache for the head's next call."""
        if isinstance(self._cache, StaticHeadCache) and self._prefilled is not None and self._prefilled.is_compiled:
            keep_static_cache(self.head, self._cache)

    def head_context(self) -> HeadContext:
        """Everything that the head was shown."""
        layers, position_ids = self._cache.context_rows()
        features, feature_position_ids = (torch.cat(parts, dim=1) for parts in zip(*self._pending, strict=True))
        if position_ids is None:
            position_ids = feature_position_ids[:, :0]
        return HeadContext(tuple(layers), position_ids, features, feature_position_ids)

    @torch.no_grad()
    def propose(
        self,
        newest_ids: torch.Tensor,
        positions: torch.Tensor,
        max_depth: int,
        width: int,
        noise: torch.Tensor | None = None,
    ) -> Draft:
        """
        One head forward.

        Args:
            newest_ids (`torch.Tensor`, (batch, seq)): The newest committed tokens of each sequence, the anchor last.
            positions (`torch.Tensor`, (batch,)): The anchors' absolute positions.
            max_depth (`int`): Depths to draft; 0 drafts nothing and leaves the head alone.
            width (`int`): Candidates per depth; re-scored branches use `config.branch_candidates` instead.
            noise (`torch.Tensor`, (batch, steps, vocab), *optional*): Of the next draws, see `noise.draft_noise`.

        Returns:
            [`Draft`]: Its candidates are (batch, max_depth, width), on the tokens' device.
        """
        anchor_ids = newest_ids[:, -1:]
        if max_depth == 0:
            shape = (len(anchor_ids), 0, width)
            logprobs = torch.empty(shape, device=newest_ids.device)
            return Draft(newest_ids, Candidates(anchor_ids.new_empty(shape), logprobs))
        features, context_position_ids = self._take_pending()
        with self.ranker.weights.in_use():
            rows = self.read_block(anchor_ids, positions, features, context_position_ids, self._cache, max_depth)
            self._cache.count_rows(features.shape[1])
            noise = None if noise is None else noise[:, :max_depth]
            return self.ranker.rank(rows, newest_ids, width, self._recycled, noise)

    @torch.no_grad()
    def draft(
        self,
        newest_ids: torch.Tensor,
        positions: torch.Tensor,
        plan: TreeLimits,
        limits: TreeLimits,
        noise: torch.Tensor | None = None,
    ) -> Draft | CapturedDraft:
        """
        The draft of a round: one captured function if the target's forward is compiled, `propose` otherwise.

        Args:
            plan ([`TreeLimits`]): Of this round's tree.
            limits ([`TreeLimits`]): Of all rounds' trees: a captured draft has one size, which fits all rounds.
            noise (`torch.Tensor`, (batch, limits.max_depth, vocab), *optional*): Of the next draws.
        """
        deepest = limits.max_depth + limits.max_continued
        if plan.max_depth == 0 or self._draft_tree is None or not self._fits(deepest):
            return self.propose(newest_ids, positions, plan.max_depth, plan.width, noise)
        assert isinstance(self._cache, StaticHeadCache)
        features, context_position_ids = self._take_pending()
        if self._fillers is None or features.shape[1] > self._max_path_rows:  # a prompt: all but its newest row
            self._read_ahead((newest_ids[:, -1:], positions), features[:, :-1], context_position_ids[:, :-1])
            features, context_position_ids = features[:, -1:], context_position_ids[:, -1:]
        assert self._fillers is not None
        front, behind = self._fillers
        newest_ids = torch.cat([front[:, newest_ids.shape[1] :], newest_ids[:, -front.shape[1] :]], dim=1)
        features = torch.cat([features, behind[:, features.shape[1] :]], dim=1)
        shape = limits.node_budget, limits.max_depth, limits.width, limits.max_continued
        unread = features, context_position_ids[0, :1]  # of one sequence, as always with a static cache
        recycled = self._fixed_recycled(limits.node_budget, newest_ids)
        outputs = self._draft_tree(self, newest_ids, positions, *unread, recycled, noise, self._cache, *shape)
        return as_draft(outputs, deepest)

    def _fixed_recycled(self, num_nodes: int, newest_ids: torch.Tensor) -> RecycledChoices | None:
        """The recycled choices in the one shape of a captured draft."""
        if not self._recycles:
            return None
        if self._recycled is None:
            return no_choices(len(newest_ids), num_nodes, newest_ids.device)
        return self._recycled.padded(num_nodes)

    @cached_property
    def _draft_tree(self) -> Callable | None:
        """`draft_tree` as one captured function; `None` if the target's forward is not compiled."""
        prefilled, is_static = self._prefilled, isinstance(self._cache, StaticHeadCache)
        if prefilled is None or not (prefilled.is_compiled and is_static and is_on_one_device(self.head, self.target)):
            return None
        self.ranker.prepare()
        return prefilled.captured(draft_tree)

    def _fits(self, depth: int) -> bool:
        """Whether the target has positions for nodes of this depth."""
        max_depth = None if self._prefilled is None else self._prefilled.max_depth
        return max_depth is None or depth <= max_depth

    def _read_ahead(self, anchors: tuple[torch.Tensor, ...], features: torch.Tensor, positions: torch.Tensor) -> None:
        """Cache context rows of any number, and check once per call that the head's numbers are finite."""
        if self._fillers is None:
            num_ids = MAX_SEARCHED if self.head.config.ngram_weights else 2
            shape = len(features), self._max_path_rows, features.shape[-1]
            self._fillers = anchors[0].new_full((len(features), num_ids), -1), features.new_zeros(shape)
        with self.ranker.weights.in_use():
            rows = self.read_block(anchors[0], anchors[1], features, positions, self._cache, 1)
        self._cache.count_rows(features.shape[1])
        self.ranker.warn_unless_finite(rows)

    def _take_pending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (batch, seq, taps x target_hidden) and positions (batch, seq) that the head has not read."""
        parts = [part for part in self._pending if part[0].shape[1]] or self._pending[:1]
        features, position_ids = (
            parts[0] if len(parts) == 1 else (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
        )
        self._pending = [(features[:, :0], position_ids[:, :0])]  # shapes and devices for a round without new states
        return features, position_ids

    def read_block(
        self,
        anchor_ids: torch.Tensor,
        positions: torch.Tensor,
        features: torch.Tensor,
        context_position_ids: torch.Tensor,
        cache: HeadCache,
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
        may_be_short = head.config.blocks_can_be_cut and isinstance(cache, GrowingHeadCache)
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

    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """
        The base class's chain view of `propose`: the best token of every depth behind `input_ids` (1, seq).

        No draft probabilities are returned: nothing is sampled from the head, and verification never needs them.
        """
        if self._newest_positions is None:
            raise ValueError("nothing was observed yet; call `observe` with the target's states of the prompt first")
        block_size = self.head.config.block_size
        draft = self.propose(input_ids, self._newest_positions[:, -1] + 1, block_size - 1, width=1)
        chain = draft.best_tree(block_size, width=1)
        return torch.cat([input_ids, chain.tokens[:, 1:]], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Nothing to update: the loop plans every round from scratch."""


def _path_features(states: TargetStates, paths: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (batch, length, taps x target_hidden) and positions (batch, length) of each sequence's path; shorter
    ones are padded with rows that no block sees."""
    taps, position_ids = states.taps, states.position_ids
    device = position_ids.device
    if len(paths) == 1:
        rows = to_device(paths[0], device)
        if must_not_wait(device):  # fewer launches, but more to copy
            return torch.cat(taps, dim=-1).index_select(1, rows), position_ids.index_select(1, rows)
        of_path = [tap.index_select(1, rows.to(tap.device)) for tap in taps]
        return torch.cat(of_path, dim=-1), position_ids[:, rows]
    length = max(len(path) for path in paths)
    rows = to_device([path + [-1] * (length - len(path)) for path in paths], device)
    is_pad, rows = rows < 0, rows.clamp_min(0)
    of_paths = [gather_rows(tap, rows.to(tap.device)) for tap in taps]
    return torch.cat(of_paths, dim=-1), position_ids.gather(1, rows).masked_fill_(is_pad, UNSEEN_POSITION)
