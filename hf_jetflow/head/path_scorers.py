"""Step scorers of single layouts: TreeFlash's correction, Domino's recurrent one and XPress's refiner."""

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from .configuration_jetflow import JetFlowConfig
from .scorers import Memory, StepScorer, first_rows, in_blocks


TREEFLASH_EPS = 1e-6  # fixed in TreeFlash's code


class TreeFlashCorrection(StepScorer):
    """
    TreeFlash's correction: a gated layer reads the parent's embedding and the row, and its output is added to the row
    before the final norm. The row is normed again, so the shift is the difference of two normed rows.

    Args:
        norm (`nn.Module`): The head's final norm. The tensors are the head's: they are saved there only.
    """

    def __init__(self, config: JetFlowConfig, norm: nn.Module):
        super().__init__(config)
        assert config.branch_intermediate_size is not None
        self.hidden, width = config.hidden_size, config.branch_intermediate_size
        self.norm = Qwen3RMSNorm(self.hidden, eps=TREEFLASH_EPS)
        self.ug = nn.Linear(2 * self.hidden, 2 * width)
        self.d = nn.Linear(width, self.hidden, bias=False)
        self._final_norm = (norm,)  # in a tuple: it is no part of this module

    def row_features(self, rows: torch.Tensor, residual: torch.Tensor, num_rows: int) -> torch.Tensor:
        return torch.cat([rows, residual], dim=-1)

    def project_rows(self, rows: torch.Tensor) -> torch.Tensor:
        projected = nn.functional.linear(rows[..., : self.hidden], self.ug.weight[:, self.hidden :], self.ug.bias)
        return torch.cat([rows, projected], dim=-1)

    def project_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.norm(tokens), self.ug.weight[:, : self.hidden])

    def read(
        self, depth: int, row: torch.Tensor, tokens: torch.Tensor, recalled: Memory | None
    ) -> tuple[torch.Tensor, Memory]:
        row, residual, projected = row.split([self.hidden, self.hidden, tokens.shape[-1]], dim=-1)
        up, gate = (projected + tokens).chunk(2, dim=-1)
        return self._final_norm[0](residual + self.d(nn.functional.silu(gate) * up)) - row, ()


class RecurrentCorrection(StepScorer):
    """Domino's correction: a GRU reads the embeddings of a branch, and a layer reads its state and the row."""

    def __init__(self, config: JetFlowConfig):
        super().__init__(config)
        assert config.branch_rank is not None
        assert config.branch_state_size is not None
        self.hidden, self.state_size, rank = config.hidden_size, config.branch_state_size, config.branch_rank
        self.input_proj = nn.Linear(self.hidden, 3 * self.state_size, bias=False)
        self.state_proj = nn.Linear(self.state_size, 3 * self.state_size, bias=False)
        self.joint_proj = nn.Linear(self.hidden + self.state_size, rank, bias=False)
        self.readout = nn.Linear(rank, config.draft_vocab_size or config.vocab_size, bias=False)

    @property
    def output_weight(self) -> torch.Tensor:
        return self.readout.weight

    def project_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, self.joint_proj.weight[:, : self.hidden])

    def project_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.input_proj(tokens)

    def recall(self, memory: Memory) -> Memory:
        return memory[0], self.state_proj(memory[0])

    def read(
        self, depth: int, row: torch.Tensor, tokens: torch.Tensor, recalled: Memory | None
    ) -> tuple[torch.Tensor, Memory]:
        reset, update, content = tokens.chunk(3, dim=-1)  # the order of torch's GRU
        if recalled is None:
            state = (1 - torch.sigmoid(update)) * torch.tanh(content)
        else:
            of_reset, of_update, of_content = recalled[1].chunk(3, dim=-1)
            update = torch.sigmoid(update + of_update)
            content = torch.tanh(content + torch.sigmoid(reset + of_reset) * of_content)
            state = (1 - update) * content + update * recalled[0]
        inner = row + nn.functional.linear(state, self.joint_proj.weight[:, self.hidden :])
        return nn.functional.silu(inner), (state,)


class Refiner(StepScorer):
    """
    XPress's refiner: a latent per row and token, mixed with those of all rows before it, and a gated layer.

    It is published as passes over the whole chain, whose fixed point is the chain read token by token, as here.
    """

    reads_embeddings = False

    def __init__(self, config: JetFlowConfig):
        super().__init__(config)
        assert config.branch_rank is not None
        assert config.branch_intermediate_size is not None
        hidden, rank, width = config.hidden_size, config.branch_rank, config.branch_intermediate_size
        self.rank = rank
        self.token_embed = nn.Embedding(config.vocab_size, rank)
        self.down_h = nn.Linear(hidden, rank, bias=False)
        self.down_g = nn.Linear(hidden, rank, bias=False)
        self.in_proj = nn.Linear(3 * rank, rank, bias=False)
        self.mix_l = nn.Parameter(torch.zeros(rank, config.num_rows, config.num_rows))
        self.mlp_gate = nn.Linear(rank, width, bias=False)
        self.mlp_up = nn.Linear(rank, width, bias=False)
        self.mlp_down = nn.Linear(width, rank, bias=False)
        self.readout = nn.Linear(rank, config.draft_vocab_size or config.vocab_size, bias=False)

    @property
    def output_weight(self) -> torch.Tensor:
        return self.readout.weight

    @property
    def starts_before_anchor(self) -> bool:
        """Whether the anchor's row predicts nothing; it then stands for the anchor, behind the token before."""
        return not self.config.anchor_predicts

    def row_features(self, rows: torch.Tensor, residual: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Each row, the mean row of its block, and the anchor's row if that predicts nothing."""
        blocks = in_blocks(rows, num_rows)
        means = blocks.mean(dim=2, keepdim=True).expand_as(blocks).flatten(1, 2)
        return torch.cat([rows, means, *([first_rows(rows, num_rows)] if self.starts_before_anchor else [])], dim=-1)

    def _weights(self) -> tuple[torch.Tensor, ...]:
        """The weights (rank, rank) on the row, on the mean and on the token."""
        return self.in_proj.weight.split(self.rank, dim=1)

    def project_rows(self, rows: torch.Tensor) -> torch.Tensor:
        row, mean, *first = rows.split(self.down_h.in_features, dim=-1)
        of_row, of_mean, _ = self._weights()
        shared = nn.functional.linear(self.down_g(mean), of_mean)
        return torch.cat([nn.functional.linear(self.down_h(part), of_row) + shared for part in (row, *first)], dim=-1)

    def project_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.token_embed(tokens), self._weights()[2])

    def start(self, row: torch.Tensor, tokens: torch.Tensor) -> Memory | None:
        return ((row[..., self.rank :] + tokens).unsqueeze(-2),) if self.starts_before_anchor else None

    def read(
        self, depth: int, row: torch.Tensor, tokens: torch.Tensor, recalled: Memory | None
    ) -> tuple[torch.Tensor, Memory]:
        latent = row[..., : self.rank] + tokens
        latents = latent.unsqueeze(-2)  # (..., branches, rows, rank)
        if recalled is not None:
            latents = torch.cat([recalled[0], latents], dim=-2)
        index = latents.shape[-2] - 1  # of the row in the block
        mixed = latent + (latents * self.mix_l[:, index, : index + 1].T).sum(-2)
        gated = nn.functional.silu(self.mlp_gate(mixed)) * self.mlp_up(mixed)
        return mixed + self.mlp_down(gated), (latents,)
