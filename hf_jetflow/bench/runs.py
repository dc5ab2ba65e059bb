"""One timed `generate` call, measured the same way for every method.

A streamer records when tokens arrive, which separates prefill from decoding. A hook counts the target's forwards.
Plain decoding has both too, so that the overhead is equal for all methods.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..decoding.settings import read_node_budget
from ..head.modeling_jetflow import JetFlowHead
from ..head.settings import head_settings
from ..target.caches import STATIC_ROWS
from .settings import LOOP_METHODS, BenchSettings, is_rival


def cache_kwargs(cache: str, num_tokens: int) -> dict[str, Any]:
    """Keywords of `generate` for one of `CACHES`; a static one holds `num_tokens` and the largest tree behind them."""
    if cache == "dynamic":
        return {}
    most = STATIC_ROWS[-1]
    num_slots = most * (2 + num_tokens // most)  # few sizes, so that little is compiled again
    config = CompileConfig()
    config._compile_all_devices = True  # transformers would skip a CPU
    kwargs = {"cache_implementation": "static", "disable_compile": cache == "static", "compile_config": config}
    return kwargs | {"max_cache_len": num_slots}


@dataclass(frozen=True)
class Variant:
    """One way to decode: a method and, for trees, a node budget."""

    method: str
    node_budget: int | str | None = None

    def head_settings(self, head: JetFlowHead) -> dict[str, Any]:
        """A tree within the node budget, or a chain, of the head's full depth; nothing for other methods."""
        depth = head.config.block_size - 1
        if self.method == "chain":
            return {"node_budget": depth + 1, "max_depth": depth, "width": 1}
        if self.method == "jetflow":
            return {"node_budget": self.node_budget, "max_depth": depth, "width": None}
        return {}


def make_variants(settings: BenchSettings) -> list[Variant]:
    """Plain decoding first, then a chain, the rivals, and a tree for each node budget."""
    variants = [Variant("plain")]
    if "chain" in settings.methods:
        variants.append(Variant("chain"))
    variants += [Variant(method) for method in dict.fromkeys(settings.methods) if is_rival(method)]
    if "jetflow" in settings.methods:
        variants += [Variant("jetflow", read_node_budget(each)) for each in dict.fromkeys(settings.node_budgets)]
    return variants


@dataclass
class Run:
    """Times and tokens of one call."""

    method: str
    node_budget: int | str | None
    seconds: float  # the whole call
    prefill_seconds: float  # until the first token
    new_ids: list[int]  # of all sequences of the batch, concatenated
    num_first: int  # tokens that arrived first: one per sequence, or more if they were drafted
    num_forwards: int  # target forwards, prefill included
    stats: dict[str, Any] | None  # fields of `GenerationStats`; `None` for methods outside our loop
    num_sequences: int = 1

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.prefill_seconds

    @property
    def num_decoded(self) -> int:
        """Tokens after those of the prefill."""
        return len(self.new_ids) - self.num_first

    @property
    def num_rounds(self) -> int:
        """Target forwards after the prefill, summed over sequences."""
        if self.stats is None or "plain" in self.stats.get("policy", {}):
            return (self.num_forwards - 1) * self.num_sequences
        return self.stats["num_rounds"]


class TokenClock(BaseStreamer):
    """Records when the first tokens of an answer arrive, and how many there are."""

    def __init__(self) -> None:
        self._has_prompt = False
        self.first_time: float | None = None
        self.num_first = 0

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:  # `generate` streams the prompt first
            self._has_prompt = True
        elif self.first_time is None:
            self.first_time = time.perf_counter()
            self.num_first = value.numel()

    def end(self) -> None:
        pass


@contextmanager
def counted_forwards(model: PreTrainedModel) -> Iterator[list[int]]:
    """Count the model's forwards inside the block, in the only item of the list."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    handle = model.register_forward_hook(add)
    try:
        yield count
    finally:
        handle.remove()


def timed_run(
    target: PreTrainedModel,
    head: JetFlowHead,
    variant: Variant,
    prompts: Sequence[Sequence[int]],
    *,
    rival: dict[str, Any] | None = None,
    cache: str = "dynamic",
    temperature: float = 0.0,
    max_new_tokens: int,
    seed: int = 0,
) -> Run:
    """
    Answer a prompt, or several in one batch, once.

    Args:
        prompts: Token ids of the prompts; prompts of different lengths are padded on the left.
        rival: Keywords of `generate` for a method of `rivals.py`.
        cache: One of `CACHES`.
        temperature: 0 for greedy; otherwise the whole vocabulary is sampled from.
        seed: Seed of the sampling, the same for every method.
    """
    kwargs: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    width = max(map(len, prompts))
    kwargs |= {**cache_kwargs(cache, width + max_new_tokens), **(rival or {})}
    if temperature > 0:
        kwargs |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    is_ours = variant.method in LOOP_METHODS
    if is_ours:
        kwargs["assistant_model"] = head
    inputs = padded_inputs(target, prompts)
    clock = TokenClock()
    with head_settings(head, **variant.head_settings(head)), counted_forwards(target) as count:
        torch.manual_seed(seed)
        synchronize(target)
        start = time.perf_counter()
        output = target.generate(**inputs, streamer=clock, **kwargs)
        synchronize(target)
        seconds = time.perf_counter() - start
        stats = asdict(head.last_stats) if is_ours else None
    assert clock.first_time is not None
    return Run(
        method=variant.method,
        node_budget=variant.node_budget,
        seconds=seconds,
        prefill_seconds=clock.first_time - start,
        new_ids=[token for answer in new_answers(target, inputs, output) for token in answer],
        num_first=clock.num_first,
        num_forwards=count[0],
        stats=stats,
        num_sequences=len(prompts),
    )


def padded_inputs(target: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Inputs of `generate` for a batch of prompts, padded on the left."""
    width = max(map(len, prompts))
    pad_token_id = target.generation_config.pad_token_id or 0
    padded = [[pad_token_id] * (width - len(ids)) + list(ids) for ids in prompts]
    is_token = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return {
        "input_ids": torch.tensor(padded, device=target.device),
        "attention_mask": torch.tensor(is_token, device=target.device),
    }


def new_answers(target: PreTrainedModel, inputs: dict[str, torch.Tensor], output: torch.Tensor) -> list[list[int]]:
    """New ids of each sequence, up to and including its end token, without the padding after it."""
    ends = target.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: next((index + 1 for index, token in enumerate(ids) if token in ends), len(ids))] for ids in answers]


def synchronize(model: PreTrainedModel) -> None:
    """Wait until the device has finished all work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
