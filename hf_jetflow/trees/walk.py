"""The walk: follow the target's own choices through a verified tree.

No draft probability enters. The chooser picks every token as plain decoding would, on the true prefix, so the result
is exact for every logits processor and, with the same seed, the same sample path as plain decoding.
"""

from typing import Any, Protocol

import torch
from transformers import LogitsProcessorList

from .tree import DraftTree


# Maximum number of scores (sequences x nodes x vocab, float32) that are processed at once.
MAX_SCORES = 2**26


class Draws(Protocol):
    """The random draws of a sequence; [`SequenceNoise`] is one."""

    def draw(self, probs: torch.Tensor) -> int:
        """The next token, whose probabilities are (1, vocab)."""

    def ahead(self, num_steps: int) -> list[torch.Tensor]:
        """Exponential noise of each of the next steps, (vocab,): the token drawn is the argmax of probs / noise. At
        least one token was drawn."""

    def is_at_hand(self, num_steps: int) -> bool:
        """Whether the noise of the next steps need not be drawn a second time."""

    def advance(self) -> None:
        """Count a draw that was made with what `ahead` gave."""


class Chooser:
    """
    Picks tokens from target logits as plain decoding does: processors, then argmax or one multinomial draw.

    Args:
        logits_processor (`LogitsProcessorList`): The caller's processors and warpers, in order.
        do_sample (`bool`): Draw instead of taking the argmax.
        keep_scores (`bool`), keep_logits (`bool`): Record processed scores, raw logits of every choice.
        noise ([`Draws`], *optional*): Draws a token; `torch.multinomial` by default.
        is_text_blind (`bool`): The processors look at the scores alone, so that any node can be chosen at before it is
            known whether the path leads there.
    """

    def __init__(
        self,
        logits_processor: LogitsProcessorList,
        do_sample: bool,
        keep_scores: bool = False,
        keep_logits: bool = False,
        noise: Draws | None = None,
        is_text_blind: bool = False,
    ):
        self.logits_processor = logits_processor
        self.do_sample = do_sample
        self.noise = noise
        self.is_text_blind = is_text_blind
        self.scores: tuple[torch.Tensor, ...] | None = () if keep_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if keep_logits else None

    @property
    def chooses_ahead(self) -> bool:
        """Whether choices can be made before it is known which nodes are on the path."""
        is_recorded = self.scores is not None or self.logits is not None
        return self.is_text_blind and not is_recorded and (self.noise is not None or not self.do_sample)

    @property
    def is_plain_argmax(self) -> bool:
        """Whether every choice is the argmax of the raw logits and nothing is recorded."""
        return not (self.do_sample or self.logits_processor or self.scores is not None or self.logits is not None)

    def choose(self, logits: torch.Tensor, prefix_ids: torch.Tensor) -> int:
        """The token after `prefix_ids` (1, seq), given the target's logits (1, vocab) there."""
        raw = logits.to(copy=True, dtype=torch.float32, device=prefix_ids.device)
        scores = self.logits_processor(prefix_ids, raw)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        if not self.do_sample:
            return int(scores.argmax(dim=-1))
        probs = torch.softmax(scores, dim=-1)
        return self.noise.draw(probs) if self.noise else int(torch.multinomial(probs, num_samples=1))


class Committer(Protocol):
    """Where the walk commits tokens; [`Emitter`] is one."""

    @property
    def active(self) -> list[int]:
        """The sequence of each tree."""

    def committed_ids(self, sequence: int) -> torch.Tensor:
        """All committed ids of a sequence, (1, seq), at the time of the call."""

    def push(self, sequence: int, token: int, scores: tuple[torch.Tensor, ...] | None) -> bool:
        """Commit a token of a sequence; says whether the sequence ends with it."""


def walk_trees(
    tree: DraftTree, logits: torch.Tensor, choosers: list[Chooser], committer: Committer
) -> list[list[int]]:
    """
    Walk from each root while a child holds the token the target chose; all tokens chosen are pushed.

    Args:
        tree (`DraftTree`): Verified trees, one for each active sequence.
        logits (`torch.Tensor`, (active, nodes, vocab)): The target's logits at every node.
        choosers (`list[Chooser]`): One for each tree; called only at nodes of its path.
        committer ([`Committer`]): Receives the tokens; `active[i]` is the sequence of tree `i`.

    Returns:
        The paths: node ids, root first, whose logits were used.
    """
    all_choices: list[Any] = [None] * len(choosers)
    choices = _choices_ahead(tree, logits, choosers) if _reads_once(logits.device) else None
    if choices is None:
        tokens, parents = torch.stack([tree.tokens, tree.parents]).tolist()
    else:
        tokens, parents, all_choices = torch.stack([tree.tokens, tree.parents, choices]).tolist()
    paths = []
    for index, (chooser, sequence) in enumerate(zip(choosers, committer.active, strict=True)):
        children = {pair: node for node, pair in enumerate(zip(parents[index], tokens[index], strict=True))}
        paths.append(_walk(children, logits[index], all_choices[index], chooser, committer, sequence))
    return paths


def _choices_ahead(tree: DraftTree, logits: torch.Tensor, choosers: list[Chooser]) -> torch.Tensor | None:
    """
    The choice at every node as if it were on the path, (active, nodes), without waiting for the device.

    -1 where probabilities are not numbers; `None` where choices depend on the text, or are recorded.
    """
    first = choosers[0]  # all of a batch have its settings
    if first.is_plain_argmax:
        return logits.argmax(dim=-1)
    if not first.chooses_ahead or logits.numel() > MAX_SCORES:
        return None
    raw = logits.flatten(0, 1).to(copy=True, dtype=torch.float32, device=tree.tokens.device)
    scores = first.logits_processor(tree.tokens.reshape(-1, 1), raw).view(logits.shape)
    if not first.do_sample:
        return scores.argmax(dim=-1)
    probs = scores.softmax(dim=-1)
    # The noise of a draw belongs to its step, whichever node is on the path at its depth.
    num_steps = tree.max_depth + 1
    steps = [noise for chooser in choosers if chooser.noise for noise in chooser.noise.ahead(num_steps)]
    noise = torch.stack(steps).view(len(choosers), num_steps, -1)
    choices = (probs / noise.gather(1, tree.depths[..., None].expand_as(probs))).argmax(dim=-1)
    return choices.masked_fill_(probs[..., 0].isnan(), -1)  # softmax spreads what is not finite over the row


def _walk(
    children: dict[tuple[int, int], int],
    logits: torch.Tensor,
    choices: list[int] | None,
    chooser: Chooser,
    committer: Committer,
    sequence: int,
) -> list[int]:
    """The path of one tree, given its nodes by parent and token, the logits (nodes, vocab), and maybe all choices."""
    path = [0]
    while True:
        node = path[-1]
        if choices is not None and choices[node] >= 0:
            token = choices[node]
            if chooser.noise is not None:
                chooser.noise.advance()
        elif chooser.is_plain_argmax:
            # Only on the CPU: elsewhere these choices were made ahead. NumPy's argmax is about 2x faster than torch's
            # and breaks ties the same way.
            token = int(logits[node].float().numpy().argmax())
        else:
            token = chooser.choose(logits[node : node + 1], committer.committed_ids(sequence))
        is_finished = committer.push(sequence, token, chooser.scores)
        child = children.get((node, token))
        if is_finished or child is None:
            return path
        path.append(child)


def _reads_once(device: torch.device) -> bool:
    """Whether choices at all nodes and one transfer beat a choice at each node of the path."""
    return device.type != "cpu"
