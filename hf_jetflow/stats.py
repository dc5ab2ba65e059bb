"""`GenerationStats`: what one `generate` call drafted and what the target accepted of it."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class GenerationStats:
    """
    Figures of one `generate` call; `head.last_stats` holds those of the thread's latest.

    A round is one draft and one verify; the prefill that yields the first token is not one. In a batch, every round
    counts once for each sequence that took part, so that all figures are those of a sequence on average.
    """

    num_rounds: int = 0  # rounds after the prefill, summed over sequences
    num_new_tokens: int = 0  # tokens emitted, the prefill's token included; 0 where the call was decoded plainly
    num_drafted: int = 0  # nodes drafted, roots excluded
    num_accepted: int = 0  # drafted tokens accepted, bonus tokens excluded
    # Rounds whose trees could reach depth 1, 2, ..., n-gram continuations included, and those that accepted a token
    # there. Off the CPU the host does not wait to learn whether the text had a match: all depths of one count.
    offered_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    rounds_by_nodes: dict[int, int] = field(default_factory=dict)  # rounds by nodes verified; 1 is a plain step
    # See `AutoPolicy.report`; of a batch, at its last size. {"plain": reason} where the call was decoded plainly.
    policy: dict[str, Any] = field(default_factory=dict)
    # Host seconds of "prefill" and of the rounds' "draft", "tree", "verify", "walk" and "commit". On an accelerator
    # the host runs ahead, and a step's time shows up where the host next waits.
    seconds_by_step: dict[str, float] = field(default_factory=dict)

    def count_round(self, num_drafted: int, tree_depth: int, num_accepted: Iterable[int]) -> None:
        """Add one round of sequences whose trees had `num_drafted` nodes down to `tree_depth` each, of which
        `num_accepted` were accepted."""
        for num_of_sequence in num_accepted:
            self._count_tree(num_drafted, tree_depth, num_of_sequence)

    def _count_tree(self, num_drafted: int, tree_depth: int, num_accepted: int) -> None:
        self.num_rounds += 1
        self.rounds_by_nodes[num_drafted + 1] = self.rounds_by_nodes.get(num_drafted + 1, 0) + 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        missing = tree_depth - len(self.offered_by_depth)
        self.offered_by_depth += [0] * missing
        self.accepted_by_depth += [0] * missing
        for depth in range(tree_depth):
            self.offered_by_depth[depth] += 1
            self.accepted_by_depth[depth] += depth < num_accepted

    def to_dict(self) -> dict[str, Any]:
        """
        The figures under the names of vLLM's per-request metrics (`metrics.speculative_decoding`), which AIPerf reads.

        Plain steps, which draft nothing, are left out. `acceptance_histogram[n]` counts the rounds that accepted `n`
        drafted tokens. `num_spec_tokens` is the deepest level that was drafted: a tree drafts more tokens than a path
        can hold, so `draft_acceptance_rate` is lower than that of a chain.
        """
        num_steps = self.num_rounds - self.rounds_by_nodes.get(1, 0)
        at_least = [num_steps, *self.accepted_by_depth, 0]  # rounds that accepted 0, 1, ... tokens or more
        return {
            "mean_acceptance_length": 1 + self.num_accepted / num_steps if num_steps else 1.0,
            "draft_acceptance_rate": self.num_accepted / self.num_drafted if self.num_drafted else 0.0,
            "acceptance_histogram": [more - fewer for more, fewer in itertools.pairwise(at_least)],
            "num_spec_steps": num_steps,
            "num_accepted_draft_tokens": self.num_accepted,
            "num_draft_tokens": self.num_drafted,
            "num_spec_tokens": len(self.accepted_by_depth),
        }

    @property
    def tokens_per_round(self) -> float:
        """Tokens gained per round, the bonus token included (the papers' tau); 1 without rounds, as when plain."""
        return (self.num_accepted + self.num_rounds) / self.num_rounds if self.num_rounds else 1.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of the rounds whose trees could reach depth 1, 2, ... which accepted a token there."""
        return [
            accepted / offered for accepted, offered in zip(self.accepted_by_depth, self.offered_by_depth, strict=True)
        ]
