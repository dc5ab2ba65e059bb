"""The branch correction: re-scores a draft node given the tokens of its branch."""

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from .configuration_jetflow import JetFlowConfig
from .scorers import Memory, StepScorer


class ZeroLinear(nn.Linear):
    """A linear layer that is initialized to zero."""


class GatedUnit(nn.Module):
    def forward(self, projected: torch.Tensor) -> torch.Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


class BranchCorrection(StepScorer):
    """
    Conditions a node's scores on the tokens of its branch. The block cannot see them: it is
    all MASK after the anchor.

    A gated layer reads the hidden row of the node's depth and the embedding of its parent's token. With
    `branch_correction="path"` it also reads a state that is carried down the branch. It yields a shift of the hidden
    row, and the node's logits change by the shift times the output embedding. The last projection starts at zero, so
    an untrained correction changes nothing. This is the conditioning of arXiv 2606.18394, Eq. 5-7; the head published
    with that paper lacks it.
    """

    reads_anchor = False  # the block has read the anchor

    def __init__(self, config: JetFlowConfig):
        super().__init__(config)
        assert config.branch_intermediate_size is not None
        hidden, width = config.hidden_size, config.branch_intermediate_size
        self.slot_norm = Qwen3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.token_norm = Qwen3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.slot_proj = nn.Linear(hidden, 2 * width, bias=False)
        self.token_proj = nn.Linear(hidden, 2 * width, bias=False)
        self.gate = GatedUnit()  # (..., 2 x width), the sum of the projections, to (..., width)
        self.down_proj = ZeroLinear(width, hidden, bias=False)
        self.has_state = config.branch_correction == "path"
        if self.has_state:
            self.state_norm = Qwen3RMSNorm(hidden, eps=config.rms_norm_eps)
            self.state_proj = nn.Linear(hidden, 2 * width, bias=False)
            self.carry_proj = nn.Linear(width, hidden, bias=False)

    def project_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Project hidden rows, which all branches of a depth share: (..., hidden) to (..., 2 x width)."""
        return self.slot_proj(self.slot_norm(rows))

    def project_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Project embeddings of the branches' last tokens: (..., hidden) to (..., 2 x width)."""
        return self.token_proj(self.token_norm(tokens))

    def recall(self, memory: Memory) -> Memory:
        """The state behind a parent and its projection, from the parent's inner row and the state before it."""
        inner, *before = memory
        state = self.carry_proj(inner)
        if before:
            state = before[0] + state
        return state, self.state_proj(self.state_norm(state))

    def read(
        self, depth: int, row: torch.Tensor, tokens: torch.Tensor, recalled: Memory | None
    ) -> tuple[torch.Tensor, Memory]:
        projected = tokens + row
        if recalled is not None:
            projected += recalled[1]
        inner = self.gate(projected)
        # The inner row, then the state before it, unless the branch starts here.
        memory = () if not self.has_state else (inner,) if recalled is None else (inner, recalled[0])
        return self.down_proj(inner), memory
