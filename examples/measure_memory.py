"""How much more memory generation takes with a draft head than without, at its peak.

    python examples/measure_memory.py --json examples/results/memory.json

Every way of decoding answers the same prompt in a process of its own, whose greatest resident memory is read at the
end (on a CUDA device: the greatest allocated memory). All processes load both models, so that the difference to plain
decoding is what drafting needs besides the head's weights.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from smollm2 import gguf_path

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.bench import environment, write_json
from hf_jetflow.target.loading import fast_dtype, load_target


HEAD = Path(__file__).parent / "heads" / "smollm2-135m-instruct"


def peak_megabytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def decode(args: argparse.Namespace, node_budget: str) -> float:
    """Peak memory of one answer, in MiB."""
    target, _ = load_target(args.target or gguf_path(), fast_dtype())
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
    for way in ("plain", *map(str, args.node_budgets)):
        done = subprocess.run(
            [sys.executable, *sys.argv, "--only", way], stdout=subprocess.PIPE, check=True, text=True
        )
        peaks[way] = round(json.loads(done.stdout.splitlines()[-1]), 1)
        print(f"{way:>6}: {peaks[way]:.0f} MiB ({peaks[way] - peaks['plain']:+.0f} MiB)", flush=True)
    if args.json:
        settings = {"prompt": args.prompt, "max_new_tokens": args.max_new_tokens}
        write_json({"environment": environment(), **settings, "peak_mebibytes": peaks}, args.json)


if __name__ == "__main__":
    main()
