"""Gain of drafts that know the noise of sampling: tokens per round and speed with and without it, same seeds.

Both answer every prompt in turn, so that both meet the same speed of the machine, and draw with the same noise. In
bfloat16 near-ties may still go either way, after which the texts differ.

    python examples/noise_gain.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --json noise.json
"""

import argparse
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from replayed import load_pair
from transformers import PreTrainedModel

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.bench.runs import padded_inputs
from hf_jetflow.decoding.session import DecodingSession
from hf_jetflow.files import write_json
from hf_jetflow.prompts import encode_chat, read_prompts


def sample(
    target: PreTrainedModel, head: JetFlowHead, ids: list[int], seed: int, temperature: float, max_new_tokens: int
) -> tuple[Counter[str], float]:
    """Rounds and accepted tokens of one answer, and its tokens per second."""
    inputs = padded_inputs(target, [ids])
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = target.generate(
        **inputs,
        assistant_model=head,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=max_new_tokens,
    )
    rate = (output.shape[1] - len(ids)) / (time.perf_counter() - start)
    stats = head.last_stats
    return Counter(rounds=stats.num_rounds, accepted=stats.num_accepted), rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="Hub id, folder or .gguf file")
    parser.add_argument("--head", required=True, help="Hub id or folder")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSON lines files")
    parser.add_argument("--num-prompts", type=int, default=8, help="prompts taken from each file")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0, 1.5])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    args = parser.parse_args()

    target, tokenizer, head = load_pair(args)
    without = patch.object(DecodingSession, "_noise_ahead", lambda _session: None)
    rows = []
    for path in args.prompts:
        prompts = [encode_chat(tokenizer, prompt["messages"]) for prompt in read_prompts([path])[: args.num_prompts]]
        for temperature in args.temperatures:
            totals, ratios = {True: Counter[str](), False: Counter[str]()}, []
            for seed, ids in enumerate([prompts[0], *prompts]):  # the first one twice: warm-up
                rates = {}
                for knows_noise in totals:
                    with nullcontext() if knows_noise else without:
                        counts, rates[knows_noise] = sample(target, head, ids, seed, temperature, args.max_new_tokens)
                    if seed:
                        totals[knows_noise].update(counts)
                if seed:
                    ratios.append(rates[True] / rates[False])
            figures = [1 + total["accepted"] / total["rounds"] for total in totals.values()]
            rows.append(
                {
                    "prompts": path.stem,
                    "num_prompts": len(prompts),
                    "temperature": temperature,
                    "tokens_per_round": round(figures[0], 3),
                    "without": round(figures[1], 3),
                    "speed_with_over_without": round(statistics.median(ratios), 3),
                }
            )
            print(
                f"{path.stem}, temperature {temperature:g}: {figures[0]:.2f} tokens per round, {figures[1]:.2f} "
                f"without; {100 * statistics.median(ratios) - 100:+.1f} % speed",
                flush=True,
            )
    settings = {"max_new_tokens": args.max_new_tokens, "node_budget": head.generation_config.node_budget, "top_k": 0}
    write_json({"environment": environment(head), "head": args.head, "settings": settings, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
