"""Speed of draft trees on random hybrid targets, compared with chains whose accepted tokens are read again.

    python examples/time_hybrid.py --json examples/results/hybrid.json

The targets have 12 layers of width 512 in float32, the head's first choice is right half of the time, and the methods
answer in turn. Chains are what a target with recurrent layers of unknown classes gets. One round's cost is a verify of
64 nodes over a plain forward of as many rows behind the same cache.

Times are processor seconds of one thread, so that other programs matter little. Memory is the peak of resident memory
during an answer, less that before it (Linux only).
"""

import argparse
import copy
import ctypes
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow._compat import CACHE_NAME
from hf_jetflow.bench.environment import environment
from hf_jetflow.files import write_json
from hf_jetflow.target import mixer_plans
from hf_jetflow.target.adapters import AdapterNames
from hf_jetflow.target.slots import BatchSlots
from hf_jetflow.target.target import Target
from hf_jetflow.trees.tree import Candidates, build_tree


VOCAB, PROMPT = 8192, 64
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=False,
)
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": dict(
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 3,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    ),
    "falcon_h1": dict(mamba_d_ssm=1024, mamba_n_heads=16, mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1),
}
METHODS: dict[str, dict[str, int] | None] = {
    "plain": None,
    "chain": dict(node_budget=8),
    "tree of 8": dict(node_budget=8),
    "tree of 16": dict(node_budget=16),
    "tree of 32": dict(node_budget=32),
}


class HalfRight(JetFlowHead):
    """
    Knows the text; at every other position its first choice is another token.

    Args:
        text (`torch.Tensor`, (1, seq)): What the target writes.
    """

    def __init__(self, target: PreTrainedModel, text: torch.Tensor):
        super().__init__(JetFlowConfig.for_target(target.config, num_hidden_layers=1, block_size=8, mask_token_id=0))
        weight = target.get_output_embeddings().weight.detach()
        generator = torch.Generator().manual_seed(0)
        is_wrong = torch.rand(text.shape[1], 1, generator=generator) < 0.5
        decoys = weight[torch.randint(VOCAB, (text.shape[1],), generator=generator)]
        scale = 20 / weight.square().sum(-1).mean()
        self._rows = scale * (weight[text[0]] + torch.where(is_wrong, 1.05, 0.8) * decoys)

    def forward(self, inputs_embeds: torch.Tensor, features: Any, position_ids: torch.Tensor, **_: Any) -> Any:
        return self._rows[position_ids.clamp(max=len(self._rows) - 1)]


def build(name: str) -> PreTrainedModel:
    """A target whose text depends on the whole context."""
    torch.manual_seed(1)
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **COMMON, **SHAPES[name])).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return target


def prompt() -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(4))


@contextmanager
def as_method(method: str) -> Iterator[None]:
    """For chains, no class of a recurrent layer is known."""
    known = mixer_plans.planned_functions
    with patch.object(mixer_plans, "planned_functions", (lambda _: None) if method == "chain" else known):
        yield


def answer(target: PreTrainedModel, method: str, head: JetFlowHead | None, num_tokens: int) -> torch.Tensor:
    settings = METHODS[method]
    if settings is None:
        head = None
    elif head is not None:
        head.generation_config.update(**settings)
    with as_method(method):
        return target.generate(
            prompt(),
            assistant_model=head,
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )


def resident_mebibytes(field: str) -> float:
    """`VmRSS`, now, or `VmHWM`, the peak since it was reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def measure(target: PreTrainedModel, num_tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Tokens per second and MiB, medians over answers in turn; tokens per round."""
    text = answer(target, "plain", None, num_tokens)
    head = HalfRight(target, text).eval()
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    peaks: dict[str, list[float]] = {method: [] for method in METHODS}
    rounds = {}
    for repeat in range(repeats + 1):
        for method in METHODS:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what earlier answers left
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before, start = resident_mebibytes("VmRSS"), time.process_time()
            is_same = torch.equal(answer(target, method, head, num_tokens), text)
            took, peak = time.process_time() - start, resident_mebibytes("VmHWM") - before
            assert is_same, f"{method} changed the text"
            if repeat:  # the first answers are warm-up
                seconds[method].append(took)
                peaks[method].append(peak)
            if METHODS[method]:
                rounds[method] = {"tokens_per_round": round(head.last_stats.tokens_per_round, 2)}
    return {
        method: {
            "tokens_per_second": round(num_tokens / statistics.median(seconds[method]), 2),
            "peak_mebibytes": round(statistics.median(peaks[method]), 1),
            **rounds.get(method, {}),
        }
        for method in METHODS
    }


@torch.no_grad()
def round_cost(target: PreTrainedModel, num_nodes: int, repeats: int) -> dict[str, float]:
    """Milliseconds of verifying a tree and of a plain forward over as many rows, medians, and their ratio."""
    ids = prompt()
    kwargs = {
        CACHE_NAME: DynamicCache(config=target.config),
        "attention_mask": torch.ones_like(ids),
        "use_cache": True,
    }
    kwargs["position_ids"] = torch.arange(PROMPT)[None]
    reader = Target(target, JetFlowConfig.for_target(target.config, mask_token_id=0))
    context, _ = reader.prefill(ids, GenerationConfig(), kwargs, BatchSlots(1, AdapterNames(target)))
    scores = 3 * torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(1))
    best = torch.log_softmax(scores, dim=-1).topk(num_nodes - 1)
    tree = build_tree(torch.tensor([[1]]), Candidates(best.indices[None], best.values[None]), num_nodes)
    rows = tree.tokens
    untouched = copy.deepcopy(context.cache)
    context.strategy.open()

    def verify() -> Callable[[], Any]:
        return functools.partial(context.verify, tree)

    def plain() -> Callable[[], Any]:
        cache = copy.deepcopy(untouched)
        return lambda: target(rows, use_cache=True, output_hidden_states=True, **{CACHE_NAME: cache})

    times: dict[str, list[float]] = {"verify": [], "plain": []}
    for repeat in range(repeats + 1):
        for name, prepare in (("verify", verify), ("plain", plain)):
            run = prepare()
            start = time.process_time()
            run()
            if repeat:
                times[name].append(1e3 * (time.process_time() - start))
            if name == "verify":
                context.strategy.commit(tree, [[]])
    took = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return took | {"ratio": round(took["verify"] / took["plain"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--nodes", type=int, default=64, help="of the tree whose round is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in SHAPES:
        target = build(name)
        methods = measure(target, args.max_new_tokens, args.repeats)
        results[name] = {"methods": methods, "round": round_cost(target, args.nodes, 3 * args.repeats)}
        print(json.dumps({name: results[name]}, indent=2), flush=True)
    if args.json:
        write_json({"environment": environment(), "settings": COMMON, "targets": results}, args.json)


if __name__ == "__main__":
    main()
