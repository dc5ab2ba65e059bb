"""Milliseconds and host waits of a round by node budget, context and cache, with random weights of one shape.

    python examples/round_times.py --caches dynamic compiled --nodes 1 16 64 127 256 --json rounds.json

Random weights accept nothing, so each walk does its work and then accepts `--accept` nodes of the deepest branch. Rows
that the JSON holds already are not measured again, and `--seconds` ends a run early: call it again to go on.
"""

import argparse
import collections
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.bench.runs import cache_kwargs, synchronize
from hf_jetflow.decoding import session
from hf_jetflow.decoding.session import DecodingSession
from hf_jetflow.files import read_json, write_json
from hf_jetflow.target import split_attention


WIDE = dict(vocab_size=151936, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
SHAPES: dict[str, dict[str, int]] = {
    "qwen3-8b": dict(**WIDE, hidden_size=4096, intermediate_size=12288),
    "qwen3-4b": dict(**WIDE, hidden_size=2560, intermediate_size=9728),
    "tiny": dict(
        vocab_size=500,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        hidden_size=64,
        intermediate_size=96,
    ),
}
STEPS = ("draft", "best_tree", "verify", "walk", "commit")
SHARPNESS = 6.0  # random logits are flat, and trees of flat scores have one level


def build_pair(args: argparse.Namespace) -> tuple[PreTrainedModel, JetFlowHead]:
    """A random target and a random head, on the GPU in bfloat16 or on the CPU in float32."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    settings = dict(max_position_embeddings=40960, tie_word_embeddings=False, pad_token_id=0, eos_token_id=None)
    config = Qwen3Config(**SHAPES[args.shape], **settings)
    of_head = dict(num_hidden_layers=args.head_layers, block_size=args.block, mask_token_id=0)
    of_head["branch_correction"] = args.correction
    if not args.ngrams:
        of_head["ngram_weights"] = []
    torch.manual_seed(0)
    with torch.device(device):
        target = Qwen3ForCausalLM._from_config(config, dtype=dtype).eval()
        head = JetFlowHead._from_config(JetFlowConfig.for_target(config, **of_head), dtype=dtype).eval()
    head.config.logit_scale = SHARPNESS
    return target, head


@contextmanager
def accepting(num_accepted: int) -> Iterator[None]:
    """Inside, a walk reads what a greedy walk reads, then takes the first nodes of the deepest branch."""

    def walk(tree: Any, logits: torch.Tensor, _choosers: Any, committer: Any) -> list[list[int]]:
        choices, tokens, parents = torch.stack([logits.argmax(dim=-1), tree.tokens, tree.parents]).tolist()
        branch, node = [], len(parents[0]) - 1  # nodes come in order of depth
        while node > 0:
            branch.append(node)
            node = parents[0][node]
        path = [0]
        for node in branch[::-1][:num_accepted]:
            if committer.push(0, tokens[0][node]):
                return [path]
            path.append(node)
        committer.push(0, choices[0][path[-1]])
        return [path]

    original, session.walk_trees = session.walk_trees, walk
    try:
        yield
    finally:
        session.walk_trees = original


@contextmanager
def timed_steps(model: PreTrainedModel) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of each step of each round inside; the device is awaited before and after."""
    times: dict[str, list[float]] = {step: [] for step in STEPS}
    originals = {step: getattr(DecodingSession, step) for step in STEPS}

    def timed(step: str) -> Callable:
        def run(*args: Any) -> Any:
            synchronize(model)
            start = time.perf_counter()
            result = originals[step](*args)
            synchronize(model)
            times[step].append(1e3 * (time.perf_counter() - start))
            return result

        return run

    for step in STEPS:
        setattr(DecodingSession, step, timed(step))
    try:
        yield times
    finally:
        for step, original in originals.items():
            setattr(DecodingSession, step, original)


def waits_by_line(run: Callable[[], Any]) -> dict[str, int]:
    """Source lines that make the host wait, and how often, as CUDA reports them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = (
        f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}" for each in caught if "synchroniz" in str(each)
    )
    return dict(collections.Counter(lines).most_common())


def measure(
    target: PreTrainedModel, head: JetFlowHead, cache: str, nodes: int, context: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One row. Nodes 0 is plain decoding."""
    prompt = torch.randint(3, target.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(1))
    prompt = prompt.to(target.device)
    kwargs = dict(attention_mask=torch.ones_like(prompt), do_sample=False, **cache_kwargs(cache, context + args.new))
    if nodes:
        head.generation_config.node_budget = nodes
        kwargs["assistant_model"] = head

    def run(num_tokens: int = args.new) -> float:
        synchronize(target)
        start = time.perf_counter()
        target.generate(prompt, max_new_tokens=num_tokens, **kwargs)
        synchronize(target)
        return 1e3 * (time.perf_counter() - start)

    start = time.perf_counter()
    run(), run()  # compiles and records
    row: dict[str, Any] = dict(cache=cache, nodes=nodes, context=context, warm_up_seconds=time.perf_counter() - start)
    first = statistics.median(run(1) for _ in range(args.repeats))  # the prompt
    decoding = statistics.median(run() for _ in range(args.repeats)) - first
    if not nodes:
        return row | dict(round_ms=decoding / (args.new - 1), tokens_per_round=1.0)
    rounds = head.last_stats.num_rounds
    row |= dict(round_ms=decoding / rounds, tokens_per_round=head.last_stats.tokens_per_round)
    with timed_steps(target) as times:
        run()
    row["step_ms"] = {step: statistics.median(values) for step, values in times.items()}
    if torch.cuda.is_available():
        waits = waits_by_line(run)
        row |= dict(waits_per_round=sum(waits.values()) / rounds, wait_lines=waits)
    if nodes in args.profile:
        row["profile"] = profiled(run, rounds)
    return row


def profiled(run: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Calls of the CUDA runtime per round, the device's busy share, and the kernels that take most time."""
    from torch.profiler import profile

    with profile() as profiler:
        milliseconds = run()
    events = profiler.key_averages()
    calls = {each.key: each.count / rounds for each in events if each.key.startswith("cu")}
    busy = sum(getattr(each, "self_device_time_total", 0) for each in events) / 1e3
    table = events.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60)
    return dict(calls_per_round=calls, busy_share=busy / milliseconds, table=table.splitlines())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b", choices=SHAPES)
    parser.add_argument("--caches", nargs="+", default=["dynamic"], choices=["dynamic", "static", "compiled"])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 16, 64, 127, 256])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1000])
    parser.add_argument("--accept", type=int, default=6, help="nodes accepted in each round")
    parser.add_argument("--new", type=int, default=200, help="new tokens of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--head-layers", type=int, default=5)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--correction", choices=["parent", "path"])
    parser.add_argument("--ngrams", action="store_true")
    parser.add_argument("--profile", nargs="+", type=int, default=[], help="node budgets to profile")
    parser.add_argument("--min-prefix", type=int, help="cached tokens from which attention splits off the prefix")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after that time")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args, start = parse_args(), time.perf_counter()
    names = ("shape", "accept", "new", "head_layers", "block", "correction", "ngrams", "min_prefix")
    settings = {name: getattr(args, name) for name in names}
    result: dict[str, Any] = {"environment": environment(), "settings": settings, "rows": []}
    if args.json and args.json.exists():
        result = read_json(args.json)
        if result["settings"] != settings:
            raise SystemExit(f"error: {args.json} was made with {result['settings']}; give another --json")
    known = {(row["cache"], row["nodes"], row["context"]) for row in result["rows"]}
    wanted = [
        (cache, nodes, context) for context in args.contexts for cache in args.caches for nodes in (0, *args.nodes)
    ]
    wanted = [each for each in wanted if each not in known]
    if not wanted:
        return
    target, head = build_pair(args)
    if args.min_prefix is not None:
        split_attention.MIN_PREFIX = args.min_prefix
    for cache, nodes, context in wanted:
        if time.perf_counter() - start > args.seconds:
            raise SystemExit(f"{len(wanted) - len(result['rows']) + len(known)} rows are left: run this again")
        with accepting(args.accept):
            row = measure(target, head, cache, nodes, context, args)
        result["rows"].append(row)
        print(json.dumps({name: value for name, value in row.items() if name not in ("wait_lines", "profile")}))
        if args.json:
            write_json(result, args.json)


if __name__ == "__main__":
    main()
