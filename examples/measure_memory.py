"""Peak memory of generation with a draft head, compared with plain decoding.

    python examples/measure_memory.py --json examples/results/memory.json

Each setting answers the same prompt in its own process, whose peak resident memory is read at the end (on a CUDA
device: peak allocated memory). All processes load both models, so that the difference to plain decoding is the memory
of drafting without the head's weights.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from smollm2 import HEAD, gguf_path

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.files import write_json
from hf_jetflow.target.loading import load_target


def peak_megabytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def decode(args: argparse.Namespace, node_budget: str) -> float:
    """Peak memory of one answer, in MiB."""
    target, _ = load_target(args.target or gguf_path(), "auto")
    head = JetFlowHead.from_pretrained(args.head, dtype=target.dtype, device_map=target.device).eval()
    ids = torch.randint(100, 40000, (1, args.prompt), generator=torch.Generator().manual_seed(0)).to(target.device)
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, do_sample=False)
    if node_budget != "plain":
        head.generation_config.node_budget = int(node_budget)
        settings["assistant_model"] = head
    target.generate(ids, eos_token_id=None, **settings)
    return peak_megabytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="Hub id, folder or .gguf file; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--head", default=str(HEAD))
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--node-budgets", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(decode(args, args.only)))
        return
    peaks = {}
    for budget in ("plain", *map(str, args.node_budgets)):
        command = [sys.executable, *sys.argv, "--only", budget]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        peaks[budget] = round(json.loads(done.stdout.splitlines()[-1]), 1)
        print(f"{budget:>6}: {peaks[budget]:.0f} MiB ({peaks[budget] - peaks['plain']:+.0f} MiB)", flush=True)
    if args.json:
        settings = {"prompt": args.prompt, "max_new_tokens": args.max_new_tokens}
        head = JetFlowHead.from_pretrained(args.head)
        write_json({"environment": environment(head), **settings, "peak_mebibytes": peaks}, args.json)


if __name__ == "__main__":
    main()
