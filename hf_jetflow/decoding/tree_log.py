"""What observers of a generation see of its rounds, and the observer that records draft trees as plain data."""

from collections.abc import Callable
from dataclasses import dataclass

from ..head.modeling_jetflow import JetFlowHead
from ..stats import GenerationStats
from ..trees.tree import DraftTree


@dataclass
class TreeRound:
    """
    One round of one sequence: the verified tree, what the target accepted of it, and its times.

    Nodes stand in order of depth, every parent before its children; node 0 is the root, the newest token before the
    round.
    """

    tokens: list[int]  # token id of each node
    parents: list[int]  # index of each node's parent; -1 for the root
    depths: list[int]  # 0 for the root
    probabilities: list[float]  # the head's, of the path from the root to each node; 1 for the root
    path: list[int]  # nodes that the target accepted, root first
    bonus_id: int  # the target's own token after the path
    max_depth: int  # deepest level that was drafted; the tree need not reach it
    row: int  # index of the sequence in the batch
    seconds_by_step: dict[str, float]  # host seconds of the steps, as in `GenerationStats.seconds_by_step`

    @property
    def num_accepted(self) -> int:
        """Accepted drafted tokens, the bonus token excluded."""
        return len(self.path) - 1

    @property
    def new_ids(self) -> list[int]:
        """Tokens that the round added to the text: the accepted ones and the bonus token."""
        return [self.tokens[node] for node in self.path[1:]] + [self.bonus_id]

    @property
    def seconds(self) -> float:
        """Host seconds of all steps together."""
        return sum(self.seconds_by_step.values())


@dataclass
class Round:
    """A round that is over, as observers see it. Tensors have one entry for each active sequence."""

    tree: DraftTree
    paths: list[list[int]]  # accepted nodes of each sequence, root first
    sequences: list[int]  # of the batch, in the order of the trees
    bonus_ids: list[int]  # the target's own token after each path
    stats: GenerationStats  # of the generation so far


RoundObserver = Callable[[Round], None]


class TreeLog:
    """
    Fills `head.last_trees` with a [`TreeRound`] for every round of one generation, or leaves it `None`.

    Args:
        head ([`JetFlowHead`]): Its `record_trees` decides.
        stats ([`GenerationStats`]): Of the same generation, the prefill's time already counted.
    """

    def __init__(self, head: JetFlowHead, stats: GenerationStats):
        self._rounds: list[TreeRound] = []
        self._seconds_before = dict(stats.seconds_by_step)
        head.last_trees = self._rounds if head.record_trees else None
        self.observers: tuple[RoundObserver, ...] = (self._record,) if head.record_trees else ()

    def _record(self, finished: Round) -> None:
        """Record a round for each sequence that took part."""
        before, self._seconds_before = self._seconds_before, dict(finished.stats.seconds_by_step)
        seconds = {step: total - before.get(step, 0.0) for step, total in self._seconds_before.items()}
        del seconds["prefill"]
        tree = finished.tree
        for index, (path, sequence) in enumerate(zip(finished.paths, finished.sequences, strict=True)):
            self._rounds.append(
                TreeRound(
                    tokens=tree.tokens[index].tolist(),
                    parents=tree.parents[index].tolist(),
                    depths=tree.depths[index].tolist(),
                    probabilities=tree.logprobs[index].exp().tolist(),
                    path=path,
                    bonus_id=finished.bonus_ids[index],
                    max_depth=tree.max_depth,
                    row=sequence,
                    seconds_by_step=seconds,
                )
            )
