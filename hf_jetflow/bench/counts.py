"""Launches and host waits of a round, by step: what a CUDA device is asked to do, and what the host waits for."""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedModel

from ..decoding.drafter import JetFlowCandidateGenerator
from ..decoding.policy import AutoPolicy, FixedPolicy
from ..decoding.session import DecodingSession
from ..errors import JetFlowError
from ..head.modeling_jetflow import JetFlowHead
from .runs import Variant, timed_run
from .settings import BenchSettings


# Methods that are steps of a round. A captured draft reads the prompt once per call, which is no part of a round.
STEPS = ("draft", "best_tree", "verify", "walk", "commit", "end_round")
ONCE = "_read_ahead"
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")  # prefixes of the driver's calls


@dataclass
class StepCounts:
    """Launches and waits of all rounds of a call, by step."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    num_rounds: int = 0

    def per_round(self) -> dict[str, dict[str, float]]:
        """Launches and waits divided by the rounds, by step, and of all steps as "round"."""
        table = {step: {"launches": self.launches[step], "waits": self.waits[step]} for step in STEPS}
        table["round"] = {kind: sum(counts[kind] for counts in table.values()) for kind in ("launches", "waits")}
        rounds = max(self.num_rounds, 1)
        return {step: {kind: round(n / rounds, 2) for kind, n in counts.items()} for step, counts in table.items()}


@contextmanager
def watched_steps(watch: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Run every step of a round inside `watch(its name)`, and what is read of the prompt inside `watch("other")`."""
    methods: list[tuple[type, str, str]] = [(DecodingSession, name, name) for name in STEPS]
    methods += [(policy, name, "best_tree") for policy in (AutoPolicy, FixedPolicy) for name in ("trim", "record")]
    methods.append((JetFlowCandidateGenerator, ONCE, "other"))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in methods]
    for (owner, name, original), (_, _, step) in zip(originals, methods, strict=True):
        setattr(owner, name, _inside(watch, step, original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _inside(watch: Callable[[str], AbstractContextManager[Any]], step: str, method: Callable) -> Callable:
    @functools.wraps(method)
    def watched(*args: Any) -> Any:
        with watch(step):
            return method(*args)

    return watched


def check_device() -> None:
    """
    Raises:
        JetFlowError: If the machine has no CUDA device.
    """
    if not torch.cuda.is_available():
        raise JetFlowError(
            "`--count` counts the launches of a CUDA device, but torch sees none; run it on a machine with one, or "
            "count on a pretended device with `make launches`"
        )


def count_steps(
    target: PreTrainedModel,
    head: JetFlowHead,
    settings: BenchSettings,
    prompt_ids: Sequence[int],
    node_budget: int | str | None,
) -> StepCounts:
    """Counts of one answer to a prompt, after one that warms up."""

    def answer() -> Any:
        run = functools.partial(
            timed_run, temperature=settings.temperatures[0], max_new_tokens=settings.max_new_tokens
        )
        return run(target, head, Variant("jetflow", node_budget), [prompt_ids], cache=settings.cache)

    answer()
    counts, current = StepCounts(), ["other"]

    @contextmanager
    def watch(step: str) -> Iterator[None]:
        outer, current[0] = current[0], step
        with record_function(f"jetflow {step}"):
            yield
        current[0] = outer
        counts.num_rounds += step == "end_round"

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            counts.waits[current[0]] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with watched_steps(watch), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                answer()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    counts.launches = launches_by_step(profiler.events())
    return counts


def launches_by_step(events: Any) -> Counter[str]:
    """Launches inside the steps among a profiler's events; those inside two belong to the inner one."""
    ranges = [
        (event.time_range.start, event.time_range.end, event.name.removeprefix("jetflow "))
        for event in events
        if event.name.startswith("jetflow ") and event.device_type.name == "CPU"
    ]
    launches: Counter[str] = Counter()
    for event in events:
        if event.name.startswith(LAUNCHES):
            around = [each for each in ranges if each[0] <= event.time_range.start <= each[1]]
            launches[max(around)[2] if around else "other"] += 1
    return launches
