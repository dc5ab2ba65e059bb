"""Two `generate` calls that take turns, plain and with a draft head, watched while they run."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.runs import synchronize
from hf_jetflow.decoding.tree_log import Round, TreeRound


class Stopped(Exception):
    """The reader left: the call ends at its next pause."""


@dataclass
class Progress:
    """What a call has generated so far."""

    ids: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)  # of each token: "plain", "accepted" or "bonus"
    rounds: list[TreeRound] = field(default_factory=list)
    seconds: float = 0.0  # of its own turns

    @property
    def tokens_per_second(self) -> float:
        return len(self.ids) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens per target forward after the first; plain decoding has 1."""
        return sum(len(each.new_ids) for each in self.rounds) / len(self.rounds) if self.rounds else 1.0


class Runner(BaseStreamer):
    """
    One `generate` call in a thread of its own, which stands still except in its turns.

    A thread, unlike a greenlet, may be resumed from any other: servers call a generator from several. Random numbers
    of its own make a sampled text independent of the other call.
    """

    def __init__(
        self, target: PreTrainedModel, prompt: torch.Tensor, head: JetFlowHead | None, settings: dict[str, Any]
    ):
        self.progress = Progress()
        self.is_finished = False
        self.error: BaseException | None = None
        self._target, self._head = target, head
        if head is not None:
            head.record_trees, head.round_observers = True, [self._end_round]
        self._call = {"inputs": prompt, "attention_mask": torch.ones_like(prompt), "assistant_model": head, **settings}
        self._is_stopped = False
        self._has_prompt = False
        self._turn, self._pause = threading.Semaphore(0), threading.Semaphore(0)
        self._random: list[torch.Tensor] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Let the call run until its next round, or token of plain decoding, is done."""
        self._turn.release()
        self._pause.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the call."""
        self._is_stopped = True
        while not self.is_finished:
            self._turn.release()
            self._pause.acquire()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._is_stopped:
                torch.manual_seed(0)
                self._start = time.perf_counter()
                self._target.generate(streamer=self, **self._call)
                self._stop_clock()
        except Stopped:
            pass
        except Exception as error:  # raised again in `step`
            self.error = error
        self.is_finished = True
        self._pause.release()

    def _stop_clock(self) -> None:
        synchronize(self._target)
        self.progress.seconds += time.perf_counter() - self._start

    def _wait(self) -> None:
        """Hand over, and go on in the next turn."""
        self._stop_clock()
        random = _random_state()
        self._pause.release()
        self._turn.acquire()
        if self._is_stopped:
            raise Stopped
        _restore(random)
        self._start = time.perf_counter()

    def _end_round(self, finished: Round) -> None:
        """Observer of the head; the tree was recorded before."""
        assert self._head is not None
        newest = self._head.last_trees[-1]
        self.progress.rounds.append(newest)
        kinds = [*self.progress.kinds, *["accepted"] * newest.num_accepted, "bonus"]
        self.progress.kinds = kinds[: len(self.progress.ids)]  # the answer may end within the path
        self._wait()

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:  # `generate` streams the prompt first
            self._has_prompt = True
            return
        ids = value.flatten().tolist()
        self.progress.ids += ids
        if self._head is None or not self.progress.kinds:  # the first token comes from reading the prompt
            self.progress.kinds += ["plain"] * len(ids)
            self._wait()

    def end(self) -> None:
        pass


def _random_state() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _restore(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
