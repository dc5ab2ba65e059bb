"""Time to verify a draft tree by context length, compared with as many rows without a mask.

    python examples/time_verify.py --json examples/results/verify_context.json

For each number of cached tokens, three forwards of the target run in turn: the tree as the loop verifies it; as many
rows with full attention, without masks or copies; and the tree with transformers' own attention function, which
repeats keys and values for every query head. The result has medians and their ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from smollm2 import gguf_path
from transformers import AttentionInterface, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_jetflow import JetFlowConfig
from hf_jetflow._compat import CACHE_NAME
from hf_jetflow.bench.environment import environment
from hf_jetflow.bench.runs import synchronize
from hf_jetflow.files import write_json
from hf_jetflow.target.adapters import AdapterNames
from hf_jetflow.target.loading import load_target
from hf_jetflow.target.prefilled import PrefilledTarget
from hf_jetflow.target.slots import BatchSlots
from hf_jetflow.target.target import Target
from hf_jetflow.trees.tree import Candidates, DraftTree, build_tree


def see_everything(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Attention of all rows to all keys: the lower bound for a forward over so many rows."""
    return sdpa_attention_forward(module, query, key, value, None, **{**kwargs, "is_causal": False})


AttentionInterface.register("see_everything", see_everything)
AttentionInterface.register("repeating", sdpa_attention_forward)


def prefilled(target: Target, num_cached: int) -> PrefilledTarget:
    ids = torch.randint(3, vocab_size(target), (1, num_cached), generator=torch.Generator().manual_seed(0))
    ids = ids.to(target.device)
    cache = DynamicCache(config=target.model.config)
    kwargs = {CACHE_NAME: cache, "use_cache": True}
    kwargs["position_ids"] = torch.arange(num_cached, device=target.device)[None]
    slots = BatchSlots(1, AdapterNames(target.model))
    return target.prefill(ids, GenerationConfig(prefill_chunk_size=1024), kwargs, slots)[0]


def vocab_size(target: Target) -> int:
    return target.model.config.get_text_config(decoder=True).vocab_size


def some_tree(target: Target, num_nodes: int) -> DraftTree:
    scores = 3 * torch.randn(7, vocab_size(target), generator=torch.Generator().manual_seed(1))
    logprobs = torch.log_softmax(scores, dim=-1).topk(num_nodes - 1)
    candidates = Candidates(logprobs.indices[None].to(target.device), logprobs.values[None].to(target.device))
    return build_tree(torch.tensor([[1]], device=target.device), candidates, num_nodes)


def medians(model: PreTrainedModel, runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each function; the functions run in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            synchronize(model)
            start = time.perf_counter()
            run()
            synchronize(model)
            if repeat:  # the first run is warm-up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def measure(target: Target, num_cached: int, num_nodes: int, repeats: int) -> dict[str, Any]:
    context, tree = prefilled(target, num_cached), some_tree(target, num_nodes)

    def verify(attention: str) -> None:
        target.model.config._attn_implementation = attention
        context.verify(tree)
        context.cache.crop(-num_nodes)

    kinds = {"verify": "sdpa", "no_mask": "see_everything", "repeating": "repeating"}
    took = medians(target.model, {name: lambda kind=kind: verify(kind) for name, kind in kinds.items()}, repeats)
    target.model.config._attn_implementation = "sdpa"
    row = {"cached": num_cached, "nodes": num_nodes, "milliseconds": took}
    return row | {"verify_over_no_mask": round(took["verify"] / took["no_mask"], 3)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="Hub id, folder or .gguf file; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cached", type=int, nargs="+", default=[256, 1024, 4096, 8000])
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, _ = load_target(args.target or gguf_path(), args.dtype)
    target = Target(model, JetFlowConfig.for_target(model.config, mask_token_id=0))
    rows = []
    for num_cached in args.cached:
        for num_nodes in args.nodes:
            rows.append(measure(target, num_cached, num_nodes, args.repeats))
            took = rows[-1]["milliseconds"]
            print(
                f"{num_cached:5} cached, {num_nodes:3} nodes: verify {took['verify']:.1f} ms, no mask "
                f"{took['no_mask']:.1f} ms (ratio {rows[-1]['verify_over_no_mask']:.2f}), repeating "
                f"{took['repeating']:.1f} ms",
                flush=True,
            )
    if args.json:
        write_json({"environment": environment(), "rows": rows}, args.json)


if __name__ == "__main__":
    main()
