"""Teacher-forced blocks: many anchors of whole sequences in one head forward.

Training learns from them, and the agreement of head and target is counted on them, depth by depth.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import JetFlowError
from ..head.modeling_jetflow import JetFlowHead
from ..target.target import Target
from .losses import IDENTITY, KLResult, LogitShape, chunked_forward_kl, correction_kl


@dataclass
class Blocks:
    """Block rows of a batch, (batch, anchors x block_size) each."""

    position_ids: torch.Tensor  # absolute position of each row
    anchor_position_ids: torch.Tensor  # position of its anchor; negative for a missing block
    depths: torch.Tensor  # slot in the block, 0 = anchor
    is_drafted: torch.Tensor  # bool: has a target (not an anchor, not past the end)


def make_blocks(inputs: dict[str, Any], block_size: int) -> Blocks:
    """The blocks that start at `inputs["anchors"]` (batch, anchors), -1 for a missing one; `lengths` is (batch,)."""
    anchors = inputs["anchors"]
    # Missing anchors get distinct negative positions, so that their rows see no other block either.
    filler = -(1 + torch.arange(anchors.shape[1], device=anchors.device)) * block_size
    anchors = torch.where(anchors < 0, filler, anchors)
    slots = torch.arange(block_size, device=anchors.device)
    position_ids = (anchors[..., None] + slots).flatten(1)
    anchor_position_ids = anchors.repeat_interleave(block_size, dim=1)
    depths = slots.repeat(anchors.shape[1]).expand_as(position_ids)
    is_drafted = (depths > 0) & (anchor_position_ids >= 0) & (position_ids < inputs["lengths"][:, None])
    return Blocks(position_ids, anchor_position_ids, depths, is_drafted)


def forward_blocks(
    model: nn.Module,
    head: JetFlowHead,
    target: Target,
    input_ids: torch.Tensor,
    blocks: Blocks,
    features: torch.Tensor,
    parent_embeds: torch.Tensor | None = None,
) -> Any:
    """
    One forward of `model` (the head, or its wrapper) over all blocks; returns the output of `JetFlowHead.forward`.

    Raises:
        JetFlowError: If the head has its own embedding or LM head, scaled logits, or an anchor row that predicts.
    """
    if not head.config.is_plain:
        raise JetFlowError(
            "the head has parts of another layout (its own embedding or LM head, scaled logits, an anchor row that "
            "predicts, or another layout's scorer or layers); such heads draft in `generate`, but cannot be trained: "
            "leave these fields of the config at their defaults"
        )
    anchors = input_ids.gather(1, blocks.anchor_position_ids.clamp_min(0))
    embeddings, is_anchor = target.embeddings, blocks.depths == 0
    has_mask_token = head.config.mask_token_id is not None
    embeds = embeddings.embed_block(anchors, is_anchor, None) if has_mask_token else embeddings.embed(anchors)
    return model(
        inputs_embeds=embeds,
        is_mask=None if has_mask_token else ~is_anchor,
        features=features,
        position_ids=blocks.position_ids,
        context_position_ids=torch.arange(features.shape[1], device=features.device).expand(features.shape[:2]),
        anchor_position_ids=blocks.anchor_position_ids,
        parent_embeds=parent_embeds,
    )


@dataclass
class DraftedRows:
    """The drafted rows of all blocks, block by block and depth by depth: rows = blocks x (block_size - 1)."""

    rows: torch.Tensor  # (rows, hidden), the head's
    shifts: torch.Tensor | None  # (rows, hidden), the branch correction's, along the true path
    teacher: torch.Tensor  # (rows, hidden), the target's normed last states at the same predictions
    tokens: torch.Tensor  # (rows,), the true tokens
    depths: torch.Tensor  # (rows,), from 1
    has_target: torch.Tensor  # (rows,), bool


def draft_blocks(
    model: nn.Module,
    head: JetFlowHead,
    target: Target,
    inputs: dict[str, Any],
    features: torch.Tensor,
    last_states: torch.Tensor,
) -> DraftedRows:
    """
    One head forward over all blocks of a batch.

    Slots without a target are returned too: with shapes that change from batch to batch, the CPU's matrix kernels
    would be compiled again for each batch.

    Args:
        model (`nn.Module`): The head, or its wrapper for training on several devices.
        head ([`JetFlowHead`]): The head itself.
        inputs: `input_ids` (batch, seq), `lengths` (batch,) and `anchors` (batch, anchors).
        features (`torch.Tensor`, (batch, seq, taps x target_hidden)), last_states (`torch.Tensor`, (batch, seq,
            target_hidden)): The target's states of the sequences.
    """
    blocks = make_blocks(inputs, head.config.block_size)
    input_ids, last = inputs["input_ids"], inputs["input_ids"].shape[1] - 1
    before = (blocks.position_ids - 1).clamp(0, last)
    parent_embeds = None if head.branch_correction is None else target.embeddings.embed(input_ids.gather(1, before))
    outputs = forward_blocks(model, head, target, input_ids, blocks, features, parent_embeds)
    rows, shifts = (outputs, None) if parent_embeds is None else outputs
    is_slot = blocks.depths > 0
    return DraftedRows(
        rows=rows[is_slot],
        shifts=None if shifts is None else shifts[is_slot],
        teacher=last_states.gather(1, before[..., None].expand(-1, -1, last_states.shape[-1]))[is_slot],
        tokens=input_ids.gather(1, blocks.position_ids.clamp(0, last))[is_slot],
        depths=blocks.depths[is_slot],
        has_target=blocks.is_drafted[is_slot],
    )


@dataclass
class Agreement:
    """
    How often the head ranks the target's token first, by depth, before and after the branch correction.

    Counted for all rows, on the greedy spine (every earlier token was the head's first choice), and after an accepted
    sibling (the parent was another candidate).
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)  # (depths,) each

    def add(
        self,
        drafted: DraftedRows,
        kl: KLResult,
        is_top1_corrected: torch.Tensor | None,
        draft_token_ids: torch.Tensor | None,
        num_depths: int,
    ) -> None:
        """Count the rows of one batch; `draft_token_ids` are the target ids of the head's draft vocabulary."""
        candidates = kl.candidates if draft_token_ids is None else draft_token_ids[kl.candidates]
        is_true = candidates == drafted.tokens[:, None]
        counted = drafted.has_target.view(-1, num_depths).float()
        is_first, is_candidate = is_true[:, 0].view(-1, num_depths), is_true.any(1).view(-1, num_depths)
        on_spine = torch.cat([torch.ones_like(is_first[:, :1]), is_first[:, :-1].cumprod(1).bool()], dim=1)
        after_sibling = torch.cat([torch.zeros_like(is_first[:, :1]), (is_candidate & ~is_first)[:, :-1]], dim=1)
        measures = {"top1": kl.is_top1, "kl": kl.divergence, "corrected_top1": is_top1_corrected}
        for group, members in (("", counted), ("spine_", on_spine * counted), ("sibling_", after_sibling * counted)):
            self._add(f"{group}count", members)
            for name, values in measures.items():
                if values is not None and not (group and name == "kl"):
                    self._add(f"{group}{name}", values.view(-1, num_depths) * members)

    def _add(self, name: str, values: torch.Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + values.detach().sum(0)

    def rates(self) -> dict[str, list[float]]:
        """Means by depth: `kl`, `top1`, `corrected_top1`, and the latter two with prefix `spine_` or `sibling_`."""
        rates = {}
        for name, sums in self.sums.items():
            if not name.endswith("count"):
                group = next((group for group in ("spine_", "sibling_") if name.startswith(group)), "")
                rates[name] = (sums / self.sums[f"{group}count"].clamp_min(1)).tolist()
        return rates


def score_candidates(
    drafted: DraftedRows,
    projection: torch.Tensor,
    temperature: float,
    num_candidates: int,
    teacher_shape: LogitShape = IDENTITY,
) -> tuple[KLResult, torch.Tensor | None, torch.Tensor | None]:
    """KL of the rows and, if there are shifts, divergence (rows,) and top-1 agreement (rows,) after the correction."""
    num_candidates = min(num_candidates, len(projection))
    kl = chunked_forward_kl(
        drafted.rows,
        drafted.teacher,
        projection,
        temperature,
        num_candidates=num_candidates,
        teacher_shape=teacher_shape,
    )
    if drafted.shifts is None:
        return kl, None, None
    # Of the corrected scores, which are those of the rows moved by the shifts, the rows learn as well.
    shifts = drafted.shifts + drafted.rows - drafted.rows.detach()
    return kl, *correction_kl(kl, shifts, projection)


@torch.no_grad()
def measure_agreement(target: Target, head: JetFlowHead, sequences: Iterable[tuple[Sequence[int], int]]) -> Agreement:
    """
    Agreement on texts of the target, with every answer token as anchor.

    Args:
        sequences: Token ids of each text, and the length of its prompt.

    Raises:
        JetFlowError: If the target's output embedding is not a plain matrix.
    """
    agreement = Agreement()
    projection = target.embeddings.plain_output_rows(head.draft_token_ids)
    for ids, num_prompt in sequences:
        input_ids = torch.tensor([list(ids)], device=target.model.device)
        inputs = {
            "input_ids": input_ids,
            "lengths": torch.tensor([len(ids)], device=input_ids.device),
            "anchors": torch.arange(num_prompt, len(ids) - 1, device=input_ids.device)[None],
        }
        if inputs["anchors"].shape[1]:
            features, last_states = target.states(input_ids)
            drafted = draft_blocks(head, head, target, inputs, features.to(head.dtype), last_states)
            kl, _, is_top1 = score_candidates(drafted, projection, 1.0, head.config.branch_candidates)
            agreement.add(drafted, kl, is_top1, head.draft_token_ids, head.config.block_size - 1)
    return agreement
