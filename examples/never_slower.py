"""Speed of `node_budget="auto"` relative to plain decoding, where drafting gains little or nothing.

Four cases: a head with random weights, sampling at temperature 1.5, prompts unlike the head's training data, and
answers of one token. For every prompt, plain decoding and the head run concurrently, one round at a time, so that both
see the same speed of the machine; they take turns in starting. Needs `pip install greenlet`.

    python examples/never_slower.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts math.jsonl code.jsonl chat.jsonl --json examples/results/never_slower.json
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from replayed import load_pair
from smollm2 import HEAD, gguf_path
from transformers import PreTrainedModel
from turns import Turns, take_turns

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.files import write_json
from hf_jetflow.prompts import encode_chat, read_prompts


WARM_UP_TOKENS = 64  # of an answer that is not counted, during which "auto" takes its first measurements
UNFAMILIAR = (
    "Erkläre in drei Sätzen, warum der Mond Phasen hat.",
    "¿Qué debo tener en cuenta antes de adoptar un perro mayor?",
    "Écris un court poème sur la pluie à Brest.",
    "Come si prepara un risotto allo zafferano per quattro persone?",
    "Opisz krótko, jak działa lodówka.",
    "Decode this base64 text and explain what it says: VGhlIHRpZGUgdHVybnMgYXQgc2l4Lg==",
)


def random_copy(head: JetFlowHead) -> JetFlowHead:
    """A copy of the head with random weights."""
    head = copy.deepcopy(head)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return head


def answer(target: PreTrainedModel, head: JetFlowHead, prompt: list[int], number: int, **settings: Any) -> list[Turns]:
    """Answer a prompt plainly and with the head; the head starts if `number` is odd."""
    settings["do_sample"] = "temperature" in settings
    if settings["do_sample"]:
        settings |= {"top_k": 0, "top_p": 1.0}
    calls = [Turns(target, prompt, each, "auto", number, **settings) for each in (None, head)]
    take_turns(calls[::-1] if number % 2 else calls)
    return calls


def measure(
    target: PreTrainedModel, head: JetFlowHead, prompts: list[list[int]], repeats: int, **settings: Any
) -> dict[str, Any]:
    """Tokens per second relative to plain decoding, and the share of rounds that drafted."""
    pairs = [answer(target, head, prompt, number, **settings) for number, prompt in enumerate(prompts * repeats)]
    ratios = [len(o.new_ids) / o.seconds / (len(p.new_ids) / p.seconds) for p, o in pairs]
    low, median, high = (round(float(each), 3) for each in np.percentile(ratios, (25, 50, 75)))
    plain, ours = zip(*pairs, strict=True)
    rounds = [count for call in ours for count in call.stats.rounds_by_nodes.items()]
    num_rounds = sum(count for _, count in rounds)
    return {
        "num_runs": len(pairs),
        "num_new_tokens": sum(len(call.new_ids) for call in ours),
        "speedup": median,
        "speedup_spread": [low, high],
        "tokens_per_second": {
            name: round(sum(len(call.new_ids) for call in calls) / sum(call.seconds for call in calls), 2)
            for name, calls in (("plain", plain), ("jetflow", ours))
        },
        "drafted_share": round(sum(count for nodes, count in rounds if nodes > 1) / max(num_rounds, 1), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=None, help="Hub id, folder or .gguf file")
    parser.add_argument("--head", default=str(HEAD), help="Hub id or folder")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSON lines files")
    parser.add_argument("--num-prompts", type=int, default=8, help="prompts taken from each file")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument(
        "--repeats", type=int, default=1, help="passes over the prompts; three times as many for one-token answers"
    )
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    args = parser.parse_args()
    args.target = args.target or gguf_path()

    target, tokenizer, head = load_pair(args)
    own = {
        path.stem: [encode_chat(tokenizer, each["messages"]) for each in read_prompts([path])[: args.num_prompts]]
        for path in args.prompts
    }
    messages = [[{"role": "user", "content": text}] for text in UNFAMILIAR]
    unfamiliar = {"unfamiliar": [encode_chat(tokenizer, each) for each in messages]}
    long = dict(max_new_tokens=args.max_new_tokens)
    cases = (
        ("random head", random_copy(head), own, args.repeats, long),
        ("temperature 1.5", copy.deepcopy(head), own, args.repeats, {**long, "temperature": 1.5}),
        ("unfamiliar prompts", copy.deepcopy(head), unfamiliar, args.repeats, long),
        ("one token", copy.deepcopy(head), own, 3 * args.repeats, dict(max_new_tokens=1)),
    )
    rows = []
    for case, case_head, sets, repeats, settings in cases:
        answer(target, case_head, next(iter(sets.values()))[0], 0, **{**settings, "max_new_tokens": WARM_UP_TOKENS})
        for name, prompts in sets.items():
            row = measure(target, case_head, prompts, repeats, **settings)
            rows.append({"case": case, "prompts": name, **settings, **row})
            low, high = row["speedup_spread"]
            print(
                f"{case:16} {name:10} {row['speedup']:.3f} ({low:.3f} - {high:.3f}) of plain decoding's speed",
                end=", ",
            )
            print(f"{100 * row['drafted_share']:.1f} % of the rounds drafted", flush=True)
    write_json({"environment": environment(head), "head": Path(args.head).name, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
