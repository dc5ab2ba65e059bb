"""The walk: follow the target's own choices through a verified tree.

No draft probability enters. The chooser picks every token as plain decoding would, on the true prefix, so the result
is exact for every logits processor and, with the same seed, the same sample path as plain decoding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList

from .tree import DraftTree


@dataclass
class Walk:
    """The accepted path of one round."""

    path: list[int]  # node ids, root first: the nodes whose logits were used
    bonus_id: int  # the target's own token after the path


class Chooser:
    """
    Picks tokens from target logits as plain decoding does: processors, then argmax or one multinomial draw.

    Args:
        logits_processor (`LogitsProcessorList`): The caller's processors and warpers, in order.
        do_sample (`bool`): Draw instead of taking the argmax.
        keep_scores (`bool`), keep_logits (`bool`): Record processed scores, raw logits of every choice.
    """

    def __init__(
        self,
        logits_processor: LogitsProcessorList,
        do_sample: bool,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ):
        self.logits_processor = logits_processor
        self.do_sample = do_sample
        self.scores: tuple[torch.Tensor, ...] | None = () if keep_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if keep_logits else None

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
        if self.do_sample:
            return int(torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1))
        return int(scores.argmax(dim=-1))


def walk_tree(
    tree: DraftTree,
    logits: torch.Tensor,
    chooser: Chooser,
    prefix_ids: Callable[[], torch.Tensor],
    push: Callable[[int], bool],
) -> Walk:
    """
    Walk from the root while a child holds the token the target chose.

    Args:
        tree (`DraftTree`): The verified tree.
        logits (`torch.Tensor`, (nodes, vocab)): The target's logits at every node.
        chooser (`Chooser`): Runs only at nodes of the path.
        prefix_ids: Yields all committed ids (1, seq) at the time of the call.
        push: Commits a token and says whether generation ends with it.

    Returns:
        `Walk`: The path and the token after it, all of them pushed.
    """
    choices: list[int] | None = None
    if chooser.is_plain_argmax and _transfer_is_dear(logits):
        choices, tokens, parents = torch.stack([logits.argmax(dim=-1), tree.tokens, tree.parents]).tolist()
    else:
        tokens, parents = torch.stack([tree.tokens, tree.parents]).tolist()
    children = {pair: node for node, pair in enumerate(zip(parents, tokens, strict=True))}
    path = [0]
    while True:
        node = path[-1]
        if choices is not None:
            token = choices[node]
        elif chooser.is_plain_argmax:
            token = int(logits[node].float().argmax())
        else:
            token = chooser.choose(logits[node : node + 1], prefix_ids())
        is_finished = push(token)
        child = children.get((node, token))
        if is_finished or child is None:
            return Walk(path, token)
        path.append(child)


def _transfer_is_dear(logits: torch.Tensor) -> bool:
    """Whether one argmax over all nodes and one transfer beat a choice at each node of the path."""
    return logits.device.type != "cpu"
