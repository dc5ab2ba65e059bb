"""Measure heads against plain decoding on the user's machine, through the public `generate`.

Every prompt is answered by all methods in turn, in one process, one or more times over; speedups are ratios of
neighbouring runs, and the table quotes their median and quartiles.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import __version__
from .blocks import measure_agreement
from .data import encode_chat, read_prompts
from .modeling_jetflow import JetFlowHead
from .stats import GenerationStats
from .target import Target


METHODS = ("plain", "jetflow", "chain")


@dataclass
class Variant:
    """One way to decode: a method and, where it applies, a node budget."""

    method: str
    node_budget: int | str | None = None
    seconds: list[float] = field(default_factory=list)  # one entry per run
    ratios: list[float] = field(default_factory=list)  # plain time per token / own time per token, run by run
    num_tokens: int = 0
    num_identical: int = 0
    stats: list[GenerationStats] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.method if self.node_budget is None else f"{self.method} {self.node_budget}"


def make_variants(methods: Sequence[str], node_budgets: Sequence[int | str]) -> list[Variant]:
    """Plain first, then every method with every node budget (a chain takes none)."""
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ValueError(f"unknown methods {unknown}; choose from {', '.join(METHODS)}")
    variants = [Variant("plain")]
    if "chain" in methods:
        variants.append(Variant("chain"))
    if "jetflow" in methods:
        variants += [Variant("jetflow", budget) for budget in node_budgets]
    return variants


def run_bench(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: JetFlowHead,
    prompts: Sequence[Path],
    *,
    methods: Sequence[str] = METHODS,
    node_budgets: Sequence[int | str] = (16, 32, 64, "auto"),
    temperatures: Sequence[float] = (0.0,),
    max_new_tokens: int = 128,
    num_prompts: int = 20,
    repeats: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """
    Answer prompts with every method in turn.

    Args:
        prompts: JSON lines files of prompts; each is a row group of the result.
        num_prompts (`int`): Prompts taken from each file.
        repeats (`int`): Passes over the prompts.
        progress: Called with (runs done, runs in all, what runs).

    Returns:
        `dict`: `environment` and `rows`, as described in the README, and `agreement`: by prompt set and depth, how
            often the head ranks the target's token first on plain greedy texts (see [`~blocks.Agreement`]).
    """
    groups = [(path.stem, read_prompts([path])[:num_prompts]) for path in prompts]
    rows: list[dict[str, Any]] = []
    agreement: dict[str, dict[str, list[float]]] = {}
    num_variants = len(make_variants(methods, node_budgets))
    total = repeats * len(temperatures) * num_variants * sum(len(group) for _, group in groups)
    done = 0
    for name, group in groups:
        encoded = [
            torch.tensor([encode_chat(tokenizer, prompt["messages"])], device=target.device) for prompt in group
        ]
        for temperature in temperatures:
            variants = make_variants(methods, node_budgets)
            for variant in variants:  # warm-up, not counted
                tokens = 64 if variant.node_budget == "auto" else 16  # "auto" tries what it chooses from
                _timed_run(target, head, variant, encoded[0], temperature, min(max_new_tokens, tokens), seed=0)
            texts: list[tuple[list[int], int]] = []
            for repeat in range(repeats):
                for index, input_ids in enumerate(encoded):
                    plain_ids = _measure_prompt(
                        target, head, variants, input_ids, temperature, max_new_tokens, seed=repeat * 1000 + index
                    )
                    texts.append((input_ids[0].tolist() + plain_ids, input_ids.shape[1]))
                    done += len(variants)
                    if progress is not None:
                        progress(done, total, name)
            rows += [_row(name, variant, target, temperature, len(group)) for variant in variants]
            if temperature == 0:
                agreement[name] = _agreement(target, head, texts[: len(group)])
    return {"environment": environment(), "rows": rows, "agreement": agreement}


def _agreement(
    target: PreTrainedModel, head: JetFlowHead, texts: list[tuple[list[int], int]]
) -> dict[str, list[float]]:
    view = Target(target, head.config)
    # Rows under a packed output embedding, or under one of the head's own, cannot be compared with the target's.
    if view.output_rows(None) is None or not head.config.is_plain:
        return {}
    rates = measure_agreement(view, head, texts).rates()
    return {name: [round(value, 4) for value in values] for name, values in rates.items()}


def _measure_prompt(
    target: PreTrainedModel,
    head: JetFlowHead,
    variants: list[Variant],
    input_ids: torch.Tensor,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[int]:
    """Answer one prompt with each variant in turn, add the figures to the variants; returns the plain answer."""
    plain_ids: list[int] = []
    plain_seconds = 1.0
    for variant in variants:
        seconds, new_ids = _timed_run(target, head, variant, input_ids, temperature, max_new_tokens, seed)
        if variant.method == "plain":
            plain_ids, plain_seconds = new_ids, seconds
        elif head.last_stats is not None:
            variant.stats.append(head.last_stats)
        variant.seconds.append(seconds)
        variant.num_tokens += len(new_ids)
        variant.num_identical += new_ids == plain_ids
        variant.ratios.append((plain_seconds / len(plain_ids)) / (seconds / len(new_ids)))
    return plain_ids


def _timed_run(
    target: PreTrainedModel,
    head: JetFlowHead,
    variant: Variant,
    input_ids: torch.Tensor,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> tuple[float, list[int]]:
    """Seconds of one `generate` call and the ids it added."""
    kwargs: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        kwargs |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    if variant.method != "plain":
        config = head.generation_config
        depth = head.config.block_size - 1
        config.max_depth, config.width = depth, 1 if variant.method == "chain" else None
        config.node_budget = depth + 1 if variant.method == "chain" else variant.node_budget
        kwargs["assistant_model"] = head
    torch.manual_seed(seed)
    _synchronize(target)
    start = time.perf_counter()
    output = target.generate(input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)
    _synchronize(target)
    return time.perf_counter() - start, output[0, input_ids.shape[1] :].tolist()


def _synchronize(target: PreTrainedModel) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize()


def _row(name: str, variant: Variant, target: PreTrainedModel, temperature: float, num_prompts: int) -> dict[str, Any]:
    rounds = sum(stats.num_rounds for stats in variant.stats)
    accepted = sum(stats.num_accepted for stats in variant.stats)
    steps: dict[str, float] = {}
    for stats in variant.stats:
        for step, seconds in stats.seconds_by_step.items():
            steps[step] = steps.get(step, 0.0) + seconds
    quartiles = statistics.quantiles(variant.ratios, n=4) if len(variant.ratios) > 1 else [variant.ratios[0]] * 3
    return {
        "prompts": name,
        "method": variant.method,
        "node_budget": variant.node_budget,
        "dtype": str(target.dtype).removeprefix("torch."),
        "temperature": temperature,
        "num_prompts": num_prompts,
        "num_new_tokens": variant.num_tokens,
        "tokens_per_round": round((accepted + rounds) / rounds, 3) if rounds else 1.0,
        "tokens_per_second": round(variant.num_tokens / sum(variant.seconds), 2),
        "speedup": round(statistics.median(variant.ratios), 3),
        "speedup_spread": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "identical_to_plain": round(variant.num_identical / len(variant.seconds), 4),
        "round_seconds": {step: round(steps[step] / rounds, 6) for step in steps if step != "prefill"}
        if rounds
        else {},
        "acceptance_by_depth": _acceptance(variant.stats),
    }


def _acceptance(all_stats: list[GenerationStats]) -> list[float]:
    """Acceptance by depth over many calls."""
    depth = max((len(stats.offered_by_depth) for stats in all_stats), default=0)
    offered, accepted = [0] * depth, [0] * depth
    for stats in all_stats:
        for level, (of_level, kept) in enumerate(zip(stats.offered_by_depth, stats.accepted_by_depth, strict=True)):
            offered[level] += of_level
            accepted[level] += kept
    return [round(kept / of_level, 4) for kept, of_level in zip(accepted, offered, strict=True)]


def environment() -> dict[str, Any]:
    """What the figures depend on: versions, processor, threads."""
    facts: dict[str, Any] = {
        "hf_jetflow": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor_name(),
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        facts["cuda_device"] = torch.cuda.get_device_name()
    return facts


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write the result in one step, so that a killed run leaves no half file."""
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
