"""Average the weights of heads of one layout: of several runs that started from one head, say.

    python examples/average_heads.py --heads runs/first runs/second --shares 0.25 0.75 --output runs/mean

The mean of models that were trained from one can be better than each (arXiv 2203.05482). The configuration and the
draft vocabulary are those of the last head.
"""

import argparse
from pathlib import Path

import torch

from hf_jetflow import JetFlowHead


LIST = "d2t"  # the draft vocabulary: token ids, which have no mean


def average(heads: list[JetFlowHead], shares: list[float]) -> JetFlowHead:
    """
    The last head, with the mean of all heads' weights, computed in float32.

    Raises:
        ValueError: If the heads are of different layouts.
    """
    states, mean = [head.state_dict() for head in heads], heads[-1].state_dict()
    shapes = [{name: tensor.shape for name, tensor in state.items() if name != LIST} for state in states]
    if any(shape != shapes[-1] for shape in shapes):
        raise ValueError("the heads have different tensors; average heads that were trained from one head")
    for name in shapes[-1]:
        parts = [share * state[name].float() for share, state in zip(shares, states, strict=True)]
        mean[name] = torch.stack(parts).sum(0).to(mean[name].dtype)
    heads[-1].load_state_dict(mean)
    return heads[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", required=True, help="Hub ids or folders")
    parser.add_argument("--shares", type=float, nargs="+", help="of each head in the mean; equal ones if not given")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new head")
    args = parser.parse_args()
    shares = args.shares or [1 / len(args.heads)] * len(args.heads)
    if len(shares) != len(args.heads) or abs(sum(shares) - 1) > 1e-6:
        parser.error(f"--shares needs {len(args.heads)} numbers whose sum is 1, one for each head")
    try:
        head = average([JetFlowHead.from_pretrained(name) for name in args.heads], shares)
    except ValueError as error:
        parser.error(str(error))
    head.save_pretrained(args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
