"""Concurrent `generate` calls that take turns round by round, so that all see the same speed of the machine.

Needs `pip install greenlet`.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from greenlet import getcurrent, greenlet
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.runs import synchronize
from hf_jetflow.decoding import loop as decoding


class Turns(BaseStreamer):
    """
    One `generate` call for one prompt, paused before each round, or before each token of plain decoding.

    Args:
        prompt: Token ids.
        head: `None` for plain decoding.
        node_budget: Node budget of the head, set when the call starts.
        seed: Seed of the call's own random numbers, on a CPU.
        settings: Keywords of `generate`.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        prompt: Sequence[int],
        head: JetFlowHead | None = None,
        node_budget: Any = None,
        seed: int = 0,
        **settings: Any,
    ):
        self._target, self._prompt, self._settings = target, list(prompt), settings
        self._head, self._node_budget = head, node_budget
        self._random = torch.Generator().manual_seed(seed).get_state()
        self._work = greenlet(self._generate)
        self._has_prompt = False
        self.num_tokens = 0  # generated so far
        self.num_rounds = 0  # after the prefill
        self.seconds = 0.0
        self.new_ids: list[int] = []
        self.stats: Any = None  # the head's

    @property
    def is_finished(self) -> bool:
        return self._work.dead

    def resume(self) -> None:
        """Run until the next pause, and add the time taken to `seconds`."""
        random = torch.get_rng_state()
        torch.set_rng_state(self._random)
        with patch.object(decoding, "choose_policy", self._pausing(decoding.choose_policy)):
            synchronize(self._target)
            start = time.perf_counter()
            self._work.switch()
            synchronize(self._target)
            self.seconds += time.perf_counter() - start
        self._random = torch.get_rng_state()
        torch.set_rng_state(random)

    def _generate(self) -> None:
        if self._head is not None:
            self._head.generation_config.node_budget = self._node_budget
        prompt = torch.tensor([self._prompt], device=self._target.device)
        mask = torch.ones_like(prompt)
        settings = {"attention_mask": mask, "assistant_model": self._head, "streamer": self, **self._settings}
        output = self._target.generate(prompt, **settings)
        self.new_ids = output[0, len(self._prompt) :].tolist()
        self._save_stats()

    def _save_stats(self) -> None:
        """Save the head's statistics before another call replaces them."""
        if self._head is not None and self.stats is None:
            self.stats = self._head.last_stats

    def _pause(self) -> None:
        getcurrent().parent.switch()

    def _pausing(self, choose_policy: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(*args: Any) -> Any:
            policy = choose_policy(*args)
            plan = policy.plan

            def plan_after_pause(*limits: Any) -> Any:
                self._save_stats()
                self._pause()
                self.num_rounds += 1
                return plan(*limits)

            policy.plan = plan_after_pause
            return policy

        return chosen

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:  # `generate` streams the prompt first
            self._has_prompt = True
            return
        self.num_tokens += value.numel()
        if self._head is None:
            self.num_rounds = self.num_tokens - 1
            self._pause()

    def end(self) -> None:
        pass


@torch.no_grad()  # each call restores the gradient mode that it found, which may be another call's
def take_turns(calls: Sequence[Turns]) -> None:
    """Run all calls to the end; the call with the fewest tokens is next."""
    while waiting := [call for call in calls if not call.is_finished]:
        min(waiting, key=lambda call: call.num_tokens).resume()
