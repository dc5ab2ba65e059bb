"""Branch scorers: they re-score the candidates of a depth after each branch of a draft tree.

A block drafts all depths in one forward and cannot see the tokens of a branch. A scorer turns them into changes of the
next depth's logits. A [`TableScorer`] depends on the depth and the parent's token alone, so all pairs of a draft are
scored at once. A [`StepScorer`] is asked depth by depth and may carry memory down a branch.
"""

import torch
from torch import nn

from .configuration_jetflow import JetFlowConfig


Memory = tuple[torch.Tensor, ...]


class CandidateLogits(nn.Module):
    """The output embedding, restricted to some tokens."""

    def forward(self, shifts: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Logit changes (..., branches, width): products of shifts (..., branches, hidden) and the rows `indices`
        (..., width) of a weight (vocab, hidden)."""
        rows = nn.functional.embedding(indices, weight)
        if rows.shape[:-2].numel() == 1:  # one sequence: a plain product is faster than a batch of one
            return nn.functional.linear(shifts, rows.view(rows.shape[-2:]))
        return shifts @ rows.transpose(-1, -2)


class BranchScorer(nn.Module):
    """What all branch scorers share."""

    def __init__(self, config: JetFlowConfig):
        super().__init__()
        self.config = config

    def row_features(self, rows: torch.Tensor, residual: torch.Tensor, num_rows: int) -> torch.Tensor:
        """
        What the scorer reads of each row of a block, (batch, rows, features), the row itself first.

        Args:
            rows (`torch.Tensor`, (batch, rows, hidden)): The rows of one or more blocks, after the final norm.
            residual (`torch.Tensor`, (batch, rows, hidden)): The same rows before it.
            num_rows (`int`): Rows of one block.
        """
        return rows


class TableScorer(BranchScorer):
    """A scorer whose changes depend on the depth and the parent's token alone."""

    def table(
        self,
        rows: torch.Tensor,
        parents: torch.Tensor,
        tokens: torch.Tensor,
        indices: torch.Tensor,
        logprobs: torch.Tensor,
    ) -> torch.Tensor:
        """
        Logit changes (..., depth, parents, width) of all candidates after all possible parents.

        Args:
            rows (`torch.Tensor`, (..., depth, features)): `row_features` of the drafted rows.
            parents (`torch.Tensor`, (..., depth, parents)): Possible parents of each depth, as target ids.
            tokens (`torch.Tensor`, (..., depth, width)): Candidates, as target ids.
            indices (`torch.Tensor`, (..., depth, width)): The same candidates, as indices into the draft vocabulary.
            logprobs (`torch.Tensor`, (..., depth, width)): Their scores before any correction.
        """
        raise NotImplementedError


class StepScorer(BranchScorer):
    """
    A scorer that is asked depth by depth.

    What branches share is computed once: `project_rows` for all branches of a depth, `project_tokens` for a token
    wherever it ends a branch, `recall` for the children of one parent.
    """

    reads_embeddings = True  # `project_tokens` takes embeddings of the target, otherwise token ids
    reads_anchor = True  # the memory starts with the anchor, even if depth 0 is not corrected

    def __init__(self, config: JetFlowConfig):
        super().__init__(config)
        self.candidate_logits = CandidateLogits()  # turns shifts into logit changes of candidates

    @property
    def starts_before_anchor(self) -> bool:
        """Whether `start` takes the token before the anchor instead of the anchor."""
        return False

    @property
    def output_weight(self) -> torch.Tensor | None:
        """What turns shifts into logit changes, (draft_vocab, shift); `None` for the output embedding."""
        return None

    def project_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Project row features (..., features) of a depth."""
        raise NotImplementedError

    def project_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Project the embeddings (..., hidden) or ids (...) of the branches' last tokens."""
        raise NotImplementedError

    def start(self, row: torch.Tensor, tokens: torch.Tensor) -> Memory | None:
        """What the only branch of depth 0 recalls, from the projections of its row and of its first token."""
        return None

    def recall(self, memory: Memory) -> Memory:
        """What the children of branches recall, from the memory (branches, ...) of these branches."""
        return memory

    def read(
        self, depth: int, row: torch.Tensor, tokens: torch.Tensor, recalled: Memory | None
    ) -> tuple[torch.Tensor, Memory]:
        """
        Read one depth.

        Args:
            row (`torch.Tensor`, (..., 1, features)), tokens (`torch.Tensor`, (..., branches, features)): Projections
                of the depth's row and of the branches' last tokens.
            recalled (*optional*): What each branch recalls; `None` if nothing.

        Returns:
            Shifts (..., branches, shift), and what the branches remember, (..., branches, ...) each.
        """
        raise NotImplementedError


class Selector(TableScorer):
    """
    DFlash 2's candidate selector: U(b) + <P[a] * W h, Q[b]> for parent a and child b.

    It is trained through a softmax over the best `branch_top_k` candidates, so its values are fixed up to a constant
    per parent. Here it shares out the probability of these candidates and leaves that of all others alone.
    """

    def __init__(self, config: JetFlowConfig):
        super().__init__(config)
        assert config.branch_rank is not None
        assert config.branch_top_k is not None
        self.top_k, self.num_selectable = config.branch_top_k, config.branch_vocab_size or config.vocab_size
        self.predecessor_codebook = nn.Parameter(torch.zeros(config.vocab_size, config.branch_rank))
        self.successor_codebook = nn.Parameter(torch.zeros(config.vocab_size, config.branch_rank))
        self.hidden_projection = nn.Linear(config.hidden_size, config.branch_rank, bias=False)

    def table(
        self,
        rows: torch.Tensor,
        parents: torch.Tensor,
        tokens: torch.Tensor,
        indices: torch.Tensor,
        logprobs: torch.Tensor,
    ) -> torch.Tensor:
        scores = logprobs.masked_fill(tokens >= self.num_selectable, -torch.inf)
        best = scores.topk(min(self.top_k, scores.shape[-1])).indices  # the candidates that are re-scored
        scores = scores.gather(-1, best).unsqueeze(-2)
        queries = self.predecessor_codebook[parents] * self.hidden_projection(rows).unsqueeze(-2)
        changes = (queries @ self.successor_codebook[tokens.gather(-1, best)].transpose(-1, -2)).float()
        gains = (scores + changes).logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True)
        changes = (changes - gains).masked_fill(scores.isneginf(), 0.0)
        table = changes.new_zeros(*changes.shape[:-1], tokens.shape[-1])
        return table.scatter_(-1, best.unsqueeze(-2).expand_as(changes), changes)


class Markov(TableScorer):
    """DSpark's Markov head: U(b) + <f, W2[b]>. The vanilla kind has f = W1[a], the gated one also reads the row."""

    def __init__(self, config: JetFlowConfig):
        super().__init__(config)
        assert config.branch_rank is not None
        rank, num_scored = config.branch_rank, config.draft_vocab_size or config.vocab_size
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)  # by target ids
        self.markov_w2 = nn.Linear(rank, num_scored, bias=False)  # by indices into the draft vocabulary
        is_gated = config.branch_correction == "gated"
        self.gate_proj = nn.Linear(config.hidden_size + rank, rank) if is_gated else None

    def table(
        self,
        rows: torch.Tensor,
        parents: torch.Tensor,
        tokens: torch.Tensor,
        indices: torch.Tensor,
        logprobs: torch.Tensor,
    ) -> torch.Tensor:
        factors = self.markov_w1(parents)
        if self.gate_proj is not None:
            of_rows, of_tokens = self.gate_proj.weight.split([rows.shape[-1], factors.shape[-1]], dim=1)
            gates = nn.functional.linear(rows, of_rows, self.gate_proj.bias).unsqueeze(-2)
            factors = factors * torch.sigmoid(gates + nn.functional.linear(factors, of_tokens))
        return factors @ self.markov_w2.weight[indices].transpose(-1, -2)


class RecurrentMarkov(StepScorer):
    """DSpark's recurrent Markov head: a gated state of `branch_rank` values reads each token of a branch."""

    reads_embeddings = False

    def __init__(self, config: JetFlowConfig):
        super().__init__(config)
        assert config.branch_rank is not None
        self.rank = config.branch_rank
        self.markov_w1 = nn.Embedding(config.vocab_size, self.rank)
        self.markov_w2 = nn.Linear(self.rank, config.draft_vocab_size or config.vocab_size, bias=False)
        self.joint_proj = nn.Linear(2 * self.rank + config.hidden_size, 3 * self.rank)

    @property
    def output_weight(self) -> torch.Tensor:
        return self.markov_w2.weight

    @property
    def has_anchor_row(self) -> bool:
        """Whether the anchor's row predicts nothing; the state then starts by reading it."""
        return not self.config.anchor_predicts

    def row_features(self, rows: torch.Tensor, residual: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Each row, and the anchor's row if that predicts nothing."""
        return torch.cat([rows, first_rows(rows, num_rows)], dim=-1) if self.has_anchor_row else rows

    def _weights(self) -> tuple[torch.Tensor, ...]:
        """The weights (3 x rank, ...) on the state, on the token and on the row."""
        weight = self.joint_proj.weight
        return weight.split([self.rank, self.rank, weight.shape[1] - 2 * self.rank], dim=1)

    def project_rows(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self._weights()[2]
        rows = rows.unflatten(-1, (-1, weight.shape[1]))
        return nn.functional.linear(rows, weight, self.joint_proj.bias).flatten(-2)

    def project_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.markov_w1(tokens), self._weights()[1])

    def start(self, row: torch.Tensor, tokens: torch.Tensor) -> Memory | None:
        if not self.has_anchor_row:
            return None
        _, state = self._step(row[..., 3 * self.rank :] + tokens, None)
        return self.recall((state,))

    def recall(self, memory: Memory) -> Memory:
        return memory[0], nn.functional.linear(memory[0], self._weights()[0])

    def read(
        self, depth: int, row: torch.Tensor, tokens: torch.Tensor, recalled: Memory | None
    ) -> tuple[torch.Tensor, Memory]:
        shifts, state = self._step(row[..., : 3 * self.rank] + tokens, recalled)
        return shifts, (state,)

    def _step(self, projected: torch.Tensor, recalled: Memory | None) -> tuple[torch.Tensor, torch.Tensor]:
        if recalled is not None:
            projected = projected + recalled[1]
        gate, content, output = projected.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        state = (1 - gate) * torch.tanh(content)
        return torch.tanh(output), state if recalled is None else state + gate * recalled[0]


def first_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The first row of each row's block, (batch, rows, hidden)."""
    blocks = in_blocks(rows, num_rows)
    return blocks[:, :, :1].expand_as(blocks).flatten(1, 2)


def in_blocks(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows (batch, blocks, rows, hidden) of whole blocks, or of one block that was cut."""
    return rows.unflatten(1, (-1, num_rows if rows.shape[1] % num_rows == 0 else rows.shape[1]))
