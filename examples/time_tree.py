"""Time to build one draft tree, by node budget and depth.

python examples/time_tree.py --json examples/results/tree_building.json
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from hf_jetflow.bench.environment import environment
from hf_jetflow.decoding.policy import MAX_WIDTH
from hf_jetflow.files import write_json
from hf_jetflow.trees.tree import Candidates, build_tree


SHAPES = ((16, 7), (32, 7), (64, 7), (64, 15), (128, 15), (256, 15))  # node budget, depth


def milliseconds(node_budget: int, max_depth: int, runs: int) -> list[float]:
    """Build times of a tree over random candidates, as peaked as those of a trained head."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.log_softmax(3 * torch.randn(max_depth, 12288, generator=generator), dim=-1)
    best = logprobs.topk(min(MAX_WIDTH, node_budget - 1))
    candidates, anchor_id = Candidates(best.indices, best.values), torch.tensor([1])
    times = []
    for _ in range(runs + 3):  # the first three warm up
        start = time.perf_counter()
        build_tree(anchor_id, candidates, node_budget)
        times.append(1e3 * (time.perf_counter() - start))
    return times[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for node_budget, max_depth in SHAPES:
        quartiles = statistics.quantiles(milliseconds(node_budget, max_depth, args.runs), n=4)
        rows.append(
            {"node_budget": node_budget, "max_depth": max_depth, "milliseconds": [round(q, 3) for q in quartiles]}
        )
        print(
            f"{node_budget:4} nodes, depth {max_depth:2}: median {quartiles[1]:.2f} ms, "
            f"quartiles {quartiles[0]:.2f} and {quartiles[2]:.2f}"
        )
    if args.json:
        write_json({"environment": environment(), "rows": rows}, args.json)


if __name__ == "__main__":
    main()
