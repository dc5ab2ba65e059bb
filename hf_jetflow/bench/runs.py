"""One timed `generate` call, measured the same way for every method.

A streamer notes when tokens come out, which parts prefill from decoding, and a hook on the target counts its forwards.
Both are there for plain decoding too, so that they weigh on no method more than on another.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..head.modeling_jetflow import JetFlowHead


LOOP_METHODS = ("jetflow", "chain")  # our own loop, which keeps `GenerationStats`


CACHES = ("dynamic", "static", "compiled")  # kinds of the target's cache; compiled is static, with compiled forwards


def cache_kwargs(cache: str) -> dict[str, Any]:
    """Keywords of `generate` for a kind of cache."""
    if cache == "dynamic":
        return {}
    config = CompileConfig()
    config._compile_all_devices = True  # transformers would leave a CPU out
    return {"cache_implementation": "static", "disable_compile": cache == "static", "compile_config": config}


@dataclass(frozen=True)
class Variant:
    """One way to decode: a method and, where it applies, a node budget."""

    method: str
    node_budget: int | str | None = None

    @property
    def name(self) -> str:
        return self.method if self.node_budget is None else f"{self.method} {self.node_budget}"


@dataclass
class Run:
    """What one call took and yielded."""

    method: str
    node_budget: int | str | None
    seconds: float  # of the whole call
    prefill_seconds: float  # until the first token came out
    new_ids: list[int]  # of a batch, one sequence's after another's
    num_first: (
        int  # tokens that came out at once with the first: one for each sequence, or more where they were drafted
    )
    num_forwards: int  # target forwards, the prefill's included
    stats: dict[str, Any] | None  # the fields of `GenerationStats`, for our own loop
    num_rows: int = 1  # sequences of the batch

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.prefill_seconds

    @property
    def num_decoded(self) -> int:
        """Tokens behind those of the prefill."""
        return len(self.new_ids) - self.num_first

    @property
    def num_rounds(self) -> int:
        """Target forwards behind the prefill, for each sequence."""
        if self.stats is None or "plain" in self.stats.get("policy", {}):
            return (self.num_forwards - 1) * self.num_rows
        return self.stats["num_rounds"]


class TokenClock(BaseStreamer):
    """Notes when the first tokens of an answer come out, and how many they are."""

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
    """Counts the model's forwards inside, in the one entry of a list."""
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
        prompts: Token ids of the prompts, padded on the left where they differ in length.
        rival: Keywords of `generate` for a method of `rivals.py`.
        cache: One of `CACHES`.
        temperature: 0 for greedy; else all tokens are sampled from.
        seed: Of the sampling; every method gets the same.
    """
    kwargs: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    kwargs |= {**cache_kwargs(cache), **(rival or {})}
    if temperature > 0:
        kwargs |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    is_ours = variant.method in LOOP_METHODS
    if is_ours:
        configure(head, variant)
        kwargs["assistant_model"] = head
    width = max(map(len, prompts))
    pad_token_id = target.generation_config.pad_token_id or 0
    padded = [[pad_token_id] * (width - len(ids)) + list(ids) for ids in prompts]
    is_token = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    input_ids, attention_mask = (torch.tensor(rows, device=target.device) for rows in (padded, is_token))
    clock = TokenClock()
    with counted_forwards(target) as count:
        torch.manual_seed(seed)
        synchronize(target)
        start = time.perf_counter()
        output = target.generate(input_ids, attention_mask=attention_mask, streamer=clock, **kwargs)
        synchronize(target)
        seconds = time.perf_counter() - start
    assert clock.first_time is not None
    return Run(
        method=variant.method,
        node_budget=variant.node_budget,
        seconds=seconds,
        prefill_seconds=clock.first_time - start,
        new_ids=[token for row in output[:, width:].tolist() for token in _answer(row, target)],
        num_first=clock.num_first,
        num_forwards=count[0],
        stats=asdict(head.last_stats) if is_ours else None,
        num_rows=len(prompts),
    )


def _answer(ids: list[int], target: PreTrainedModel) -> list[int]:
    """The ids up to the end of the answer, without the padding of a sequence that ended before others."""
    ends = target.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]


def configure(head: JetFlowHead, variant: Variant) -> None:
    """Set the head to a tree within the variant's node budget, or to a chain, as deep as it drafts."""
    config, depth = head.generation_config, head.config.block_size - 1
    is_chain = variant.method == "chain"
    config.max_depth, config.width = depth, 1 if is_chain else None
    config.node_budget = depth + 1 if is_chain else variant.node_budget


def synchronize(model: PreTrainedModel) -> None:
    """Wait until the device has done what was asked of it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
