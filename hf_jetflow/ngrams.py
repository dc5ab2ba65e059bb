"""Context n-grams: what followed a branch's last tokens earlier in the text, as evidence for its next ones.

The block is drafted in one forward, so its rows cannot look up what came after the tokens of a branch; the text itself
can be asked, at hardly any cost. Prompt lookup decoding drafts from such matches alone; here they shift the draft
head's scores, node by node, and go on where the block ends.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from .tree import Candidates, DraftTree, trim_tree


MAX_CONTEXT = 2048  # newest tokens that are searched
SHORT_SEARCH = 16_384  # branches x places of a depth
MAX_MATCH = 32  # tokens of a match that are counted


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
        self._lengths = torch.arange(1, longest + 1, dtype=torch.int16, device=device)[:, None]
        matches = torch.zeros_like(self._ids, dtype=torch.int16)
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
            before = pad(self._matches.gather(-2, places), (1, 0))[..., :-1]
            self._matches = (before + 1) * (self._ids.unsqueeze(-2) == tokens[..., None])
        matches, next_ids = self._matches, self._next_ids
        # Few places match. Off the CPU the host would have to wait for them, and in a short text it is not worth it.
        if matches.device.type == "cpu" and matches.numel() > SHORT_SEARCH:
            places = matches.flatten(0, -2).any(0).nonzero()[:, 0]
            matches, next_ids = matches[..., places], next_ids[..., places]
        is_match = (matches.unsqueeze(-2) >= self._lengths).float()  # (..., branches, lengths, places)
        shares = self._weights / is_match.sum(-1).clamp_min(1)
        votes = (shares.unsqueeze(-2) @ is_match).squeeze(-2)
        follows = next_ids.unsqueeze(-1) == self._tokens[..., depth, :].unsqueeze(-2)
        return votes @ follows.float()


def continue_tree(
    tree: DraftTree, context_ids: torch.Tensor, node_budget: int, max_continued: int, least_logprob: float = -math.inf
) -> DraftTree:
    """
    The best nodes of a tree and of a continuation below its deepest level, where it has no candidates.

    The best node of that level is followed by what came after the longest match of its branch earlier in the text.
    Of a match of `n` tokens the next one is taken to follow with probability `n / (n + 2)`: in 600 greedy answers of
    SmolLM2-135M-Instruct it did in 65, 74, 85 and 98 % of the cases for 3, 5, 10 and 16 tokens or more. Works on the
    host, as what reads the tree next does.

    Args:
        tree ([`~tree.DraftTree`]): Of one sequence; others are returned as they are.
        context_ids (`torch.Tensor`, (..., seq)): All committed tokens, the anchor last.
        node_budget (`int`): Most nodes of the result, the root included.
        max_continued (`int`): Most levels that are added.
        least_logprob (`float`): No node below it is added.
    """
    if max_continued < 1 or tree.max_depth < 1 or tree.tokens.numel() != tree.num_nodes:
        return tree
    tokens, parents, depths, scores = (
        values.flatten().tolist() for values in (tree.tokens, tree.parents, tree.depths, tree.logprobs)
    )
    if depths[-1] < tree.max_depth:  # nodes come in order of depth
        return tree
    leaf = max((node for node, depth in enumerate(depths) if depth == depths[-1]), key=scores.__getitem__)
    floor = max(least_logprob, min(scores) if tree.num_nodes == node_budget else -math.inf)
    if scores[leaf] <= floor:
        return tree
    text = context_ids.flatten()[-MAX_CONTEXT:].tolist() + [tokens[node] for node in _path_to(leaf, parents)]
    length, place = _longest_match(text)
    parent, score = leaf, scores[leaf]
    for level in range(1, max_continued + 1):
        if not length or (score := score + math.log(length / (length + 2))) <= floor:
            break
        text.append(text[place])
        tokens.append(text[place])
        parents.append(parent)
        depths.append(tree.max_depth + level)
        scores.append(score)
        parent, place, length = len(tokens) - 1, place + 1, length + 1
    if parent == leaf:
        return tree
    return trim_tree(_with_nodes(tree, tokens, parents, depths, scores), node_budget)


def _path_to(node: int, parents: list[int]) -> list[int]:
    """Nodes from the root's child down to `node`."""
    path = []
    while node > 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def _longest_match(text: list[int]) -> tuple[int, int]:
    """How many tokens at the end of a text are the same as somewhere earlier, `MAX_MATCH` at most, and the place
    behind them there; the latest of equal ones."""
    best, place, last = 0, 0, len(text) - 1
    for end in range(last - 1, -1, -1):
        if text[end] == text[last]:
            length = 1
            while length <= min(end, MAX_MATCH - 1) and text[end - length] == text[last - length]:
                length += 1
            if length > best:
                best, place = length, end + 1
                if best == MAX_MATCH:
                    break
    return best, place


def _with_nodes(
    tree: DraftTree, tokens: list[int], parents: list[int], depths: list[int], scores: list[float]
) -> DraftTree:
    """A tree that has grown to these nodes; its ancestor mask is still the old one."""
    shape, device = (*tree.tokens.shape[:-1], len(tokens)), tree.tokens.device
    return DraftTree(
        tokens=torch.tensor(tokens, device=device).view(shape),
        parents=torch.tensor(parents, device=device).view(shape),
        depths=torch.tensor(depths, device=device).view(shape),
        logprobs=torch.tensor(scores, dtype=torch.float32, device=device).view(shape),
        ancestor_mask=tree.ancestor_mask,
        max_depth=tree.max_depth,
    )
