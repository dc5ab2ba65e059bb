"""The draft trees of a generation as plain data, kept where `head.record_trees` asks for them."""

from dataclasses import dataclass

from ..head.modeling_jetflow import JetFlowHead
from ..stats import GenerationStats
from ..trees.tree import DraftTree
from .emitter import Emitter


@dataclass
class TreeRound:
    """
    One round of one sequence: the verified tree, what the target kept of it, and what the round took.

    Nodes stand in order of depth, every parent before its children; node 0 is the root, the newest token before the
    round.
    """

    tokens: list[int]  # token id of each node
    parents: list[int]  # index of each node's parent; -1 for the root
    depths: list[int]  # 0 for the root
    probabilities: list[float]  # that the text takes the way from the root to the node, by the head; 1 for the root
    path: list[int]  # nodes that the target kept, root first
    bonus_id: int  # the target's own token after the path
    max_depth: int  # deepest level that was drafted; the tree need not reach it
    row: int  # the sequence of the batch
    seconds_by_step: dict[str, float]  # host seconds of the steps, as in `GenerationStats.seconds_by_step`

    @property
    def num_accepted(self) -> int:
        """Drafted tokens kept, the bonus token excluded."""
        return len(self.path) - 1

    @property
    def new_ids(self) -> list[int]:
        """What the round added to the text: the accepted tokens and the bonus token."""
        return [self.tokens[node] for node in self.path[1:]] + [self.bonus_id]

    @property
    def seconds(self) -> float:
        """Host seconds of all steps together."""
        return sum(self.seconds_by_step.values())


class Trace:
    """
    Fills `head.last_trees` with a [`TreeRound`] for every round of one generation, or leaves it `None`.

    Args:
        head ([`JetFlowHead`]): Its `record_trees` decides.
        stats ([`GenerationStats`]): Of the same generation, the prefill's time already counted.
    """

    def __init__(self, head: JetFlowHead, stats: GenerationStats):
        self._rounds: list[TreeRound] | None = [] if head.record_trees else None
        head.last_trees = self._rounds
        self._seconds_by_step = stats.seconds_by_step
        self._before = dict(stats.seconds_by_step)

    def record(self, tree: DraftTree, paths: list[list[int]], emitter: Emitter) -> None:
        """Keep a round that is over, for each sequence that took part."""
        if self._rounds is None:
            return
        seconds = {step: total - self._before.get(step, 0.0) for step, total in self._seconds_by_step.items()}
        self._before = dict(self._seconds_by_step)
        del seconds["prefill"]
        for place, (path, row) in enumerate(zip(paths, emitter.rows, strict=True)):
            self._rounds.append(
                TreeRound(
                    tokens=tree.tokens[place].tolist(),
                    parents=tree.parents[place].tolist(),
                    depths=tree.depths[place].tolist(),
                    probabilities=tree.logprobs[place].exp().tolist(),
                    path=path,
                    bonus_id=int(emitter.committed_ids(row)[0, -1]),
                    max_depth=tree.max_depth,
                    row=row,
                    seconds_by_step=seconds,
                )
            )
