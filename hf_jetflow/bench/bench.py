"""Measure heads and rivals against plain decoding on the user's machine, through the public `generate`.

Every prompt is answered by all methods in turn, in one process, one or more times over; speedups are ratios of
neighbouring runs, and the table quotes their median and quartiles.
"""

import copy
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..files import atomic_write
from ..head.modeling_jetflow import JetFlowHead
from ..target.target import Target
from ..training.blocks import measure_agreement
from .forward_times import time_forwards, usual_node_counts
from .log import BenchLog
from .prompts import PromptSet, make_prompt_sets
from .rivals import RIVALS, is_rival, rival_kwargs
from .rows import make_row
from .runs import CACHES, Run, Variant, timed_run


METHODS = ("plain", "jetflow", "chain", *RIVALS)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BenchSettings:
    """
    What is measured.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    methods: Sequence[str] = ("plain", "jetflow", "chain")
    node_budgets: Sequence[int | str] = (16, 32, 64, "auto")  # of the method `jetflow`
    temperatures: Sequence[float] = (0.0,)  # 0 for greedy
    context_lengths: Sequence[int] = ()  # tokens that prompts are padded to; none: prompts as they are
    batch_sizes: Sequence[int] = (1,)  # prompts answered at a time
    max_new_tokens: int = 128
    num_prompts: int = 20  # prompts taken from each file
    repeats: int = 1  # passes over the prompts
    cache: str = "dynamic"  # one of `CACHES`

    def __post_init__(self) -> None:
        make_variants(self.methods, self.node_budgets)
        if self.cache not in CACHES:
            raise ValueError(f"the cache is {self.cache!r}; choose from {', '.join(CACHES)}")
        rivals = [method for method in self.methods if is_rival(method)]
        if rivals and self.cache != "dynamic":
            raise ValueError(
                f"{', '.join(rivals)} cannot use a {self.cache} cache; leave them out, or the cache dynamic"
            )
        counts = {"max_new_tokens": self.max_new_tokens, "num_prompts": self.num_prompts, "repeats": self.repeats}
        if rivals and set(self.batch_sizes) != {1}:
            raise ValueError(f"{', '.join(rivals)} cannot answer batches; leave them out, or the batch size 1")
        for name in ("context_lengths", "batch_sizes"):
            counts |= {name: min(getattr(self, name), default=1)}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"`{name}` is {value}, but at least 1 is needed")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"the temperatures are {list(self.temperatures)}, but 0 (greedy) or more is needed")


def make_variants(methods: Sequence[str], node_budgets: Sequence[int | str]) -> list[Variant]:
    """
    Plain first, then a chain, the rivals, and a tree for every node budget.

    Raises:
        ValueError: If a method is unknown or a node budget is neither `"auto"` nor a number of rows.
    """
    unknown = sorted(method for method in methods if method not in METHODS[:3] and not is_rival(method))
    if unknown:
        raise ValueError(f"unknown methods {unknown}; choose from {', '.join(METHODS)}")
    bad = [budget for budget in node_budgets if budget != "auto" and (isinstance(budget, str) or budget < 1)]
    if bad:
        raise ValueError(f"the node budgets {bad} are not usable; 'auto' or at least 1 is needed")
    variants = [Variant("plain")]
    if "chain" in methods:
        variants.append(Variant("chain"))
    variants += [Variant(method) for method in dict.fromkeys(methods) if is_rival(method)]
    if "jetflow" in methods:
        variants += [Variant("jetflow", budget) for budget in dict.fromkeys(node_budgets)]
    return variants


def run_bench(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: JetFlowHead,
    prompts: Sequence[Path],
    *,
    log_path: Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """
    Answer prompts with every method in turn.

    Args:
        prompts: JSON lines files of prompts; each is a row group of the result.
        log_path (`Path`, *optional*): Where finished measurements are kept while the bench runs. If it is killed, the
            same call with the same settings goes on where it stopped. Delete the file when the result is safe.
        progress: Called with (runs done, runs in all, what runs).
        settings: Fields of [`BenchSettings`].

    Returns:
        `dict`: `environment`, `settings` and `rows`, as described in docs/benchmarks.md, and `agreement`: by prompt
            set and depth, how often the head ranks the target's token first on plain greedy texts (see
            [`~blocks.Agreement`]).

    Raises:
        ValueError: If a setting, a rival or a prompt file is not usable, or `log_path` holds other measurements.
        OSError: If a file or an assistant is not there, or the log cannot be written.
    """
    plan = BenchSettings(**settings)
    prompt_sets = make_prompt_sets(
        target,
        tokenizer,
        prompts,
        num_prompts=plan.num_prompts,
        context_lengths=plan.context_lengths,
        batch_sizes=plan.batch_sizes,
        max_new_tokens=plan.max_new_tokens,
    )
    rivals = {
        method: rival_kwargs(method, target, tokenizer, head)
        for method in dict.fromkeys(plan.methods)
        if is_rival(method)
    }
    facts = {
        **asdict(plan),
        "target": target.name_or_path,
        "dtype": _dtype_name(target),
        "head": weights_hash(head),
        "prompts": {each.label: each.content_hash for each in prompt_sets},
        **environment(),
    }
    log = BenchLog(log_path, facts)
    bench = _Bench(target, head, plan, rivals, log, progress, prompt_sets)
    with _settings_kept(head):
        rows = [
            row
            for prompt_set in prompt_sets
            for temperature in plan.temperatures
            for row in bench.measure(prompt_set, temperature)
        ]
        agreement = {} if 0 not in plan.temperatures else {each.label: bench.agreement(each) for each in prompt_sets}
    return {
        "environment": environment(),
        "settings": {
            **asdict(plan),
            "target": _public_name(target.name_or_path),
            "head": _public_name(head.name_or_path),
        },
        "rows": rows,
        "agreement": agreement,
    }


class _Bench:
    """All measurements of one `run_bench`; those in the log already are not made again."""

    def __init__(
        self,
        target: PreTrainedModel,
        head: JetFlowHead,
        plan: BenchSettings,
        rivals: dict[str, dict[str, Any]],
        log: BenchLog,
        progress: Progress | None,
        prompt_sets: Sequence[PromptSet],
    ):
        self._target, self._head, self._plan, self._rivals, self._log = target, head, plan, rivals, log
        self._progress = progress
        self._variants = make_variants(plan.methods, plan.node_budgets)
        num_batches = sum(len(prompt_set.batches) for prompt_set in prompt_sets)
        self._total = plan.repeats * len(plan.temperatures) * len(self._variants) * num_batches
        self._done = 0

    def measure(self, prompt_set: PromptSet, temperature: float) -> list[dict[str, Any]]:
        """One row for every variant."""
        plan, is_warm = self._plan, False
        runs: list[list[Run]] = [[] for _ in self._variants]
        forwards: list[list[list[float]]] = []
        for repeat in range(plan.repeats):
            for number in range(len(prompt_set.batches)):
                place = (*prompt_set.place, temperature, f"run {repeat} {number}")
                if self._log.get(*place) is None:
                    if not is_warm:
                        self._warm_up(prompt_set, temperature)
                        is_warm = True
                    answers = self._answer(prompt_set, number, temperature, repeat)
                    self._log.add([asdict(run) for run in answers], *place)
                for of_variant, fields in zip(runs, self._log.get(*place), strict=True):
                    of_variant.append(Run(**fields))
                forwards.append(self._forwards(prompt_set, temperature, number, [of[-1] for of in runs]))
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
            {**facts, **make_row(variant, of_variant, runs[0], forwards)}
            for variant, of_variant in zip(self._variants, runs, strict=True)
        ]

    def _answer(self, prompt_set: PromptSet, number: int, temperature: float, repeat: int) -> list[Run]:
        """Answer one batch with each variant; who begins changes from batch to batch."""
        batch = prompt_set.batches[number]
        runs: list[Run | None] = [None] * len(self._variants)
        first = (number + repeat) % len(self._variants)
        for place in [*range(first, len(runs)), *range(first)]:
            runs[place] = self._run(self._variants[place], batch, temperature, seed=repeat * 1000 + number)
            self._report(prompt_set, sum(run is not None for run in runs))
        return [run for run in runs if run is not None]

    def _run(self, variant: Variant, batch: list[list[int]], temperature: float, **limits: int) -> Run:
        return timed_run(
            self._target,
            self._head,
            variant,
            batch,
            rival=self._rivals.get(variant.method),
            cache=self._plan.cache,
            temperature=temperature,
            **{"max_new_tokens": self._plan.max_new_tokens, **limits},
        )

    def _warm_up(self, prompt_set: PromptSet, temperature: float) -> None:
        """Let every variant answer a prompt in part, uncounted; "auto" tries what it chooses from meanwhile.

        With a static cache it is the longest in whole, so that the cache, and what was compiled for it, stays.
        """
        plan = self._plan
        is_static = plan.cache != "dynamic"
        batches = prompt_set.batches
        batch = max(batches, key=lambda prompts: max(map(len, prompts))) if is_static else batches[0]
        for variant in self._variants:
            tokens = 64 if variant.node_budget == "auto" else 16
            limit = plan.max_new_tokens if is_static else min(plan.max_new_tokens, tokens)
            self._run(variant, batch, temperature, max_new_tokens=limit)

    def _forwards(self, prompt_set: PromptSet, temperature: float, number: int, runs: list[Run]) -> list[list[float]]:
        """What `time_forwards` finds on a prompt with the first half of its plain answer, given its runs; for growing
        caches of one sequence only."""
        if self._plan.cache != "dynamic" or prompt_set.batch_size > 1:
            return []
        place = (*prompt_set.place, temperature, f"forwards {number}")
        if self._log.get(*place) is None:
            context_ids = prompt_set.prompt_ids[number] + runs[0].new_ids[: len(runs[0].new_ids) // 2]
            node_counts = usual_node_counts(runs)
            self._log.add(time_forwards(self._target, self._head, context_ids, node_counts), *place)
        return self._log.get(*place)

    def agreement(self, prompt_set: PromptSet) -> dict[str, list[float]]:
        """Agreement of head and target on the plain greedy answers of the first pass."""
        view = Target(self._target, self._head.config)
        # Rows under a packed output embedding, or under one of the head's own, cannot be compared with the target's.
        is_comparable = view.output_rows(None) is not None and self._head.config.is_plain
        if not is_comparable or prompt_set.batch_size > 1:
            return {}
        texts = [
            (ids + self._log.get(*prompt_set.place, 0.0, f"run 0 {number}")[0]["new_ids"], len(ids))
            for number, ids in enumerate(prompt_set.prompt_ids)
        ]
        rates = measure_agreement(view, self._head, texts).rates()
        return {name: [round(value, 4) for value in values] for name, values in rates.items()}

    def _report(self, prompt_set: PromptSet, num_more: int = 0) -> None:
        if self._progress is not None:
            self._progress(self._done + num_more, self._total, prompt_set.label)


@contextmanager
def _settings_kept(head: JetFlowHead) -> Iterator[None]:
    """Undo what the variants set in the head's generation config."""
    settings = copy.deepcopy(head.generation_config)
    try:
        yield
    finally:
        head.generation_config = settings


def weights_hash(head: JetFlowHead) -> str:
    """Tells whether two heads have the same weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _public_name(name: str) -> str:
    """A Hub id as it is, of a local path the last part: results are shown to others."""
    return Path(name).name if os.path.exists(name) else name


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


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


def read_json(path: Path) -> dict[str, Any]:
    """
    A result that `write_json` wrote.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); give the file that `hf-jetflow bench --json` wrote"
        ) from error
    if not isinstance(result, dict) or not {"environment", "rows"} <= result.keys():
        raise ValueError(f"{path} is not the result of a bench; give the file that `hf-jetflow bench --json` wrote")
    return result


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write the result atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
