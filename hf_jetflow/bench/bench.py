"""Measure heads and rivals against plain decoding, through the public `generate`.

All methods answer each prompt in turn, in one process. Speedups are ratios of neighboring runs; the table shows their
median and quartiles.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import write_json
from ..head.modeling_jetflow import JetFlowHead
from ..target.loading import load_pair
from ..target.settings import PairSettings
from ..target.target import Target
from ..training.blocks import measure_agreement
from .environment import environment
from .forward_times import time_forwards, usual_node_counts
from .log import BenchLog
from .plots import draw_bench
from .prompts import PromptSet, make_prompt_sets
from .rivals import rival_kwargs
from .rows import CONTROL_BATCH, make_row
from .runs import Run, Variant, cache_kwargs, make_variants, new_answers, padded_inputs, timed_run
from .settings import BenchSettings, is_rival


Progress = Callable[[int, int, str], None]


def bench_pair(pair: PairSettings, settings: BenchSettings, progress: Progress | None = None) -> dict[str, Any]:
    """
    Load a target and a head, run the bench, and write the files that the settings ask for.

    Returns:
        As `run_bench`.
    """
    log_path = settings.partial_path
    result = run_bench(*load_pair(pair), settings, log_path=log_path, progress=progress)
    if settings.json is not None and log_path is not None:
        write_json(result, settings.json)
        log_path.unlink()
    if settings.plot is not None:
        draw_bench(result, settings.plot)
    return result


def run_bench(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: JetFlowHead,
    settings: BenchSettings,
    *,
    log_path: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """
    Answer prompts with every method in turn.

    Args:
        settings: The options; `json` and `plot` are not written here.
        log_path (`Path`, *optional*): Log of finished measurements. After a kill, the same call with the same
            settings continues from it. Delete the file once the result is stored.
        progress: Called with (runs done, runs in total, prompt set).

    Returns:
        `dict`: `environment`, `settings` and `rows`, as described in docs/benchmarks.md; `agreement`: by prompt set
            and depth, how often the head ranks the target's token first on plain greedy texts (see
            [`~blocks.Agreement`]); `control`: by prompt set, the share of plain greedy texts that stay the same in a
            batch of four.

    Raises:
        JetFlowError: If a rival or a prompt file is not usable, or `log_path` holds other measurements.
        OSError: If an assistant does not exist.
    """
    prompt_sets = make_prompt_sets(target, tokenizer, settings)
    facts = settings.facts
    measured_with = environment(head)
    log_facts = {
        **facts,
        "target": target.name_or_path,
        "dtype": _dtype_name(target),
        "prompts": {each.label: each.content_hash for each in prompt_sets},
        **{name: value for name, value in measured_with.items() if name != "date"},
    }
    rivals = {
        method: rival_kwargs(method, target, tokenizer, head)
        for method in dict.fromkeys(settings.methods)
        if is_rival(method)
    }
    log = BenchLog(log_path, log_facts)
    bench = _Bench(target, head, settings, rivals, log, progress, prompt_sets)
    rows = [
        row
        for prompt_set in prompt_sets
        for temperature in settings.temperatures
        for row in bench.measure(prompt_set, temperature)
    ]
    greedy_sets = prompt_sets if 0 in settings.temperatures else []
    names = {"target": _public_name(target.name_or_path), "head": _public_name(head.name_or_path)}
    return {
        "environment": measured_with,
        "settings": {**facts, **names},
        "rows": rows,
        "agreement": {each.label: bench.agreement(each) for each in greedy_sets},
        "control": {each.label: bench.control(each) for each in greedy_sets},
    }


class _Bench:
    """The measurements of one `run_bench`; those found in the log are not repeated."""

    def __init__(
        self,
        target: PreTrainedModel,
        head: JetFlowHead,
        settings: BenchSettings,
        rivals: dict[str, dict[str, Any]],
        log: BenchLog,
        progress: Progress | None,
        prompt_sets: Sequence[PromptSet],
    ):
        self._target, self._head, self._settings, self._rivals, self._log = target, head, settings, rivals, log
        self._progress = progress
        self._variants = make_variants(settings)
        num_batches = sum(len(prompt_set.batches) for prompt_set in prompt_sets)
        self._total = settings.repeats * len(settings.temperatures) * len(self._variants) * num_batches
        if 0 in settings.temperatures:
            singles = [prompt_set for prompt_set in prompt_sets if prompt_set.batch_size == 1]
            self._total += sum(len(each.prompt_ids) // CONTROL_BATCH for each in singles)
        self._done = 0

    def measure(self, prompt_set: PromptSet, temperature: float) -> list[dict[str, Any]]:
        """One row per variant."""
        is_warm = False
        runs: list[list[Run]] = [[] for _ in self._variants]
        forwards: list[list[list[float]]] = []
        for repeat in range(self._settings.repeats):
            for number in range(len(prompt_set.batches)):
                key = (*prompt_set.key, temperature, f"run {repeat} {number}")
                if self._log.get(*key) is None:
                    if not is_warm:
                        self._warm_up(prompt_set, temperature)
                        is_warm = True
                    answers = self._answer(prompt_set, number, temperature, repeat)
                    self._log.add([asdict(run) for run in answers], *key)
                for variant_runs, fields in zip(runs, self._log.get(*key), strict=True):
                    variant_runs.append(Run(**fields))
                latest = [variant_runs[-1] for variant_runs in runs]
                forwards.append(self._forwards(prompt_set, temperature, number, latest))
                self._done += len(self._variants)
                self._report(prompt_set)
        facts = {
            "prompts": prompt_set.name,
            "context_length": prompt_set.context_length,
            "batch_size": prompt_set.batch_size,
            "dtype": _dtype_name(self._target),
            "temperature": temperature,
            "num_prompts": len(prompt_set.prompt_ids),
            "prompt_tokens": prompt_set.median_length,
        }
        return [
            {**facts, **make_row(variant, variant_runs, runs[0], forwards)}
            for variant, variant_runs in zip(self._variants, runs, strict=True)
        ]

    def _answer(self, prompt_set: PromptSet, number: int, temperature: float, repeat: int) -> list[Run]:
        """Answer one batch with each variant; the variant that starts rotates from batch to batch."""
        batch = prompt_set.batches[number]
        runs: dict[int, Run] = {}
        first = (number + repeat) % len(self._variants)
        for index in [*range(first, len(self._variants)), *range(first)]:
            runs[index] = self._run(self._variants[index], batch, temperature, seed=repeat * 1000 + number)
            self._report(prompt_set, len(runs))
        return [runs[index] for index in sorted(runs)]

    def _run(self, variant: Variant, batch: list[list[int]], temperature: float, **limits: int) -> Run:
        return timed_run(
            self._target,
            self._head,
            variant,
            batch,
            rival=self._rivals.get(variant.method),
            cache=self._settings.cache,
            temperature=temperature,
            **{"max_new_tokens": self._settings.max_new_tokens, **limits},
        )

    def _warm_up(self, prompt_set: PromptSet, temperature: float) -> None:
        """
        Start an answer with each variant, not counted; "auto" takes its first measurements meanwhile.

        With a static cache the longest batch is answered to the end, so that the cache and its compiled forwards are
        not built again.
        """
        is_static = self._settings.cache != "dynamic"
        batches = prompt_set.batches
        batch = max(batches, key=lambda prompts: max(map(len, prompts))) if is_static else batches[0]
        most = self._settings.max_new_tokens
        for variant in self._variants:
            tokens = 64 if variant.node_budget == "auto" else 16
            self._run(variant, batch, temperature, max_new_tokens=most if is_static else min(most, tokens))

    def _forwards(self, prompt_set: PromptSet, temperature: float, number: int, runs: list[Run]) -> list[list[float]]:
        """`time_forwards` after a prompt and the first half of its plain answer; dynamic caches and batch 1 only."""
        if self._settings.cache != "dynamic" or prompt_set.batch_size > 1:
            return []
        key = (*prompt_set.key, temperature, f"forwards {number}")
        if self._log.get(*key) is None:
            context_ids = prompt_set.prompt_ids[number] + runs[0].new_ids[: len(runs[0].new_ids) // 2]
            node_counts = usual_node_counts(runs)
            self._log.add(time_forwards(self._target, self._head, context_ids, node_counts), *key)
        return self._log.get(*key)

    def agreement(self, prompt_set: PromptSet) -> dict[str, list[float]]:
        """Agreement of head and target on the plain greedy answers of the first pass."""
        view = Target(self._target, self._head.config)
        # Logits of a packed output embedding, or of the head's own, cannot be compared with the target's.
        is_comparable = view.embeddings.output_rows(None) is not None and self._head.config.is_plain
        if not is_comparable or prompt_set.batch_size > 1:
            return {}
        answers = self._plain_answers(prompt_set)
        texts = [(ids + new_ids, len(ids)) for ids, new_ids in zip(prompt_set.prompt_ids, answers, strict=True)]
        what = f"agreement of head and target, {prompt_set.label}"
        say = self._progress or (lambda *_: None)
        say(0, len(texts), what)
        rates = measure_agreement(view, self._head, texts).rates()
        say(len(texts), len(texts), what)
        return {name: [round(value, 4) for value in values] for name, values in rates.items()}

    def control(self, prompt_set: PromptSet) -> float | None:
        """
        Share of plain greedy texts that stay the same when plain decoding answers four prompts in one batch.

        It says how much rounding alone changes, without any draft. Prompts beyond the last whole batch are left out.
        """
        if prompt_set.batch_size > 1 or len(prompt_set.prompt_ids) < CONTROL_BATCH:
            return None
        alone, same = self._plain_answers(prompt_set), []
        for start in range(0, len(alone) - CONTROL_BATCH + 1, CONTROL_BATCH):
            key = (*prompt_set.key, 0.0, f"control {start}")
            batch = slice(start, start + CONTROL_BATCH)
            if self._log.get(*key) is None:
                self._log.add(self._batched(prompt_set.prompt_ids[batch]), *key)
            same += [together == ids for together, ids in zip(self._log.get(*key), alone[batch], strict=True)]
            self._done += 1
            self._report(prompt_set)
        return round(sum(same) / len(same), 4)

    def _plain_answers(self, prompt_set: PromptSet) -> list[list[int]]:
        """New ids of the plain greedy answers of the first pass; batch 1 only."""
        numbers = range(len(prompt_set.prompt_ids))
        return [self._log.get(*prompt_set.key, 0.0, f"run 0 {number}")[0]["new_ids"] for number in numbers]

    def _batched(self, prompts: list[list[int]]) -> list[list[int]]:
        """New ids of plain greedy answers to the prompts in one batch."""
        inputs = padded_inputs(self._target, prompts)
        limits = {"max_new_tokens": self._settings.max_new_tokens, "do_sample": False}
        num_tokens = inputs["input_ids"].shape[1] + self._settings.max_new_tokens
        output = self._target.generate(**inputs, **limits, **cache_kwargs(self._settings.cache, num_tokens))
        return new_answers(self._target, inputs, output)

    def _report(self, prompt_set: PromptSet, num_more: int = 0) -> None:
        if self._progress is not None:
            self._progress(self._done + num_more, self._total, f"answers, {prompt_set.label}")


def _public_name(name: str) -> str:
    """A Hub id unchanged, a local path without its folders: results are published."""
    return Path(name).name if os.path.exists(name) else name


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
