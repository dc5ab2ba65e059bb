"""The random draws of plain sampling, for sequences that are at different steps, and for steps ahead.

A draw is the argmax of log-probabilities plus Gumbel noise, and the noise of the next steps is known before their
tokens are: drafts use it. Daliri et al. (arXiv 2408.07978) couple draft and target by such noise, token by token.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from ..trees.walk import Draws


MAX_NOISE_BYTES = 2**28
# The head's scores only resemble the target's: 1 gives 1 to 3 % fewer tokens per round, and 0.7 up to 1 %.
NOISE_WEIGHT = 0.85
SMALLEST_NOISE = 1e-30


class Noise:
    """
    The noise of a generation's draws.

    `torch.multinomial` divides all rows' probabilities by exponential noise of their shape and takes the greatest. So
    a step's noise does not depend on the probabilities: it is drawn when the first sequence asks for the step, and
    stored for the others. What no longer fits into memory is drawn again from the generator's state before that step.

    Args:
        num_sequences (`int`): Sequences of the batch.
    """

    def __init__(self, num_sequences: int):
        self._num_sequences = num_sequences
        self._num_drawn = 0
        self._states: dict[int, torch.Tensor] = {}  # of the device's default generator, before each step
        self._newest_state = torch.empty(0)  # behind the newest step
        self._noise: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._kind = torch.empty(0)  # no rows, with vocabulary, type and device of the probabilities

    def at_step(self, step: int, probs: torch.Tensor | None = None) -> torch.Tensor:
        """The step's noise (batch, vocab), like probabilities (..., vocab) of it or, without any, of a step before."""
        if step in self._noise:
            return self._noise[step]
        if probs is not None:
            self._kind = probs[:0]
        device = self._kind.device
        noise = self._kind.new_empty(self._num_sequences, self._kind.shape[-1])
        if step == self._num_drawn:
            self._num_drawn += 1
            self._states[step] = _random_state(device)
            noise.exponential_(1)
            self._newest_state = _random_state(device)
        else:
            generator = torch.Generator(device)
            generator.set_state(self._states[step])
            noise.exponential_(1, generator=generator)
        self._noise[step] = noise
        if len(self._noise) > max(MAX_NOISE_BYTES // noise.nbytes, 1):
            self._noise.popitem(last=False)
        return noise

    def is_at_hand(self, step: int) -> bool:
        """Whether the step's noise is stored, or was not drawn yet."""
        return step in self._noise or step >= self._num_drawn

    def rewind(self, num_steps: int) -> None:
        """Reset the generator to its state after `num_steps`, if more were drawn. If something else has drawn since,
        such as another thread, it would get the same numbers again: then the generator is left alone."""
        device = self._kind.device
        if num_steps < self._num_drawn and torch.equal(_random_state(device), self._newest_state):
            _set_random_state(device, self._states[num_steps])

    def forget(self, step: int) -> None:
        """Drop what a sequence alone needs no more once it has drawn `step`."""
        if self._num_sequences == 1:
            self._noise.pop(step, None)
            self._states.pop(step, None)


class SequenceNoise:
    """
    The draws of one sequence.

    Args:
        noise ([`Noise`]): Shared by the sequences of the batch.
        index (`int`): The sequence's.
    """

    def __init__(self, noise: Noise, index: int):
        self._noise, self._index = noise, index
        self._step = 0

    def draw(self, probs: torch.Tensor) -> int:
        """The next token, whose probabilities are (1, vocab)."""
        if not torch.isfinite(probs).all():
            return int(torch.multinomial(probs, num_samples=1))  # raises what plain decoding raises
        noise = self._noise.at_step(self._step, probs)[self._index]
        self.advance()
        return int((probs[0] / noise).argmax())

    def ahead(self, num_steps: int) -> list[torch.Tensor]:
        """The noise (vocab,) of each of the next steps, behind the first draw; `advance` counts a use."""
        return [self._noise.at_step(step)[self._index] for step in range(self._step, self._step + num_steps)]

    def is_at_hand(self, num_steps: int) -> bool:
        """Whether the noise of the next steps need not be drawn a second time."""
        return all(self._noise.is_at_hand(step) for step in range(self._step, self._step + num_steps))

    def advance(self) -> None:
        """Count a draw, such as one that was made with noise of `ahead`."""
        self._noise.forget(self._step)
        self._step += 1


def draft_noise(draws: Sequence[Draws], num_steps: int, temperature: float) -> torch.Tensor | None:
    """
    What the next draws of each sequence add to the scores of tokens, as far as a draft should rely on it.

    Args:
        draws: Of each sequence; at least one token was drawn.
        temperature (`float`): The target's logits are divided by it before the draw.

    Returns:
        `torch.Tensor`, (sequences, num_steps, vocab): In units of the logits, 0 for a sequence whose noise would have
        to be drawn again; `None` if that holds for all.
    """
    rows = [torch.stack(each.ahead(num_steps)) if each.is_at_hand(num_steps) else None for each in draws]
    known = next((row for row in rows if row is not None), None)
    if known is None:
        return None
    noise = torch.stack([torch.ones_like(known) if row is None else row for row in rows])
    return noise.clamp_min_(SMALLEST_NOISE).log_().mul_(-NOISE_WEIGHT * temperature)


def _random_state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
