"""Context n-grams: what followed a branch's last tokens earlier in the text, as evidence for its next ones.

The block is drafted in one forward, so its rows cannot look up what came after the tokens of a branch; the text itself
can be asked, at hardly any cost. Prompt lookup decoding drafts from such matches alone; here they shift the draft
head's scores, node by node.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from .tree import Candidates


MAX_CONTEXT = 2048  # newest tokens that are searched


class ContextNgrams:
    """
    Logit changes of candidates after each branch of a tree.

    A place of the text matches a branch by `n` tokens when the `n` tokens that end there are the branch's last ones,
    committed tokens before the anchor included. For each `n` the candidates share `weights[n - 1]`, by how often each
    of them came next at the places that match by `n` tokens or more.

    Args:
        context_ids (`torch.Tensor`, (..., seq)): All committed tokens, the anchor last.
        candidates ([`~tree.Candidates`]): Proposals per depth.
        weights (`Sequence[float]`): One for each length of match, from 1.
    """

    def __init__(self, context_ids: torch.Tensor, candidates: Candidates, weights: Sequence[float]):
        device, longest = candidates.tokens.device, len(weights)
        ids = context_ids[..., -MAX_CONTEXT:].to(device)
        self._ids, self._next_ids = ids[..., :-1], ids[..., 1:]
        self._tokens = candidates.tokens
        self._weights = torch.tensor(weights, dtype=torch.float32, device=device)
        self._lengths = torch.arange(1, longest + 1, dtype=torch.int8, device=device)[:, None]
        matches = torch.zeros_like(self._ids, dtype=torch.int8)
        for back in reversed(range(min(longest, ids.shape[-1]))):
            earlier = pad(self._ids, (back, 0), value=-1)[..., : self._ids.shape[-1]]
            matches = (matches + 1) * (earlier == ids[..., -1 - back, None])
        self._matches = matches.unsqueeze(-2)  # (..., branches, places): tokens that match there

    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """
        Logit changes (..., branches, width) of a depth's candidates.

        Args:
            parents (`torch.Tensor`, (..., branches)): Each branch's place among the branches of the depth before.
            tokens (`torch.Tensor`, (..., branches)): Their last tokens.
        """
        if depth:
            places = parents[..., None].expand(*parents.shape, self._ids.shape[-1])
            before = pad(self._matches.gather(-2, places), (1, 0))[..., :-1].clamp_max(len(self._weights) - 1)
            self._matches = (before + 1) * (self._ids.unsqueeze(-2) == tokens[..., None])
        matches, next_ids = self._matches, self._next_ids
        if matches.device.type == "cpu":  # elsewhere the host would have to wait for the places
            places = matches.flatten(0, -2).any(0).nonzero()[:, 0]
            matches, next_ids = matches[..., places], next_ids[..., places]
        is_match = (matches.unsqueeze(-2) >= self._lengths).float()  # (..., branches, lengths, places)
        shares = self._weights / is_match.sum(-1).clamp_min(1)
        votes = (shares.unsqueeze(-2) @ is_match).squeeze(-2)
        follows = next_ids.unsqueeze(-1) == self._tokens[..., depth, :].unsqueeze(-2)
        return votes @ follows.float()
