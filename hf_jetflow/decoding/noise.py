"""The random draws of plain sampling, for sequences that are at different steps, and for steps ahead."""

from collections import OrderedDict

import torch


MAX_NOISE_BYTES = 2**28


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
        self._noise: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._device = torch.device("cpu")  # of the probabilities

    def at_step(self, step: int, probs: torch.Tensor) -> torch.Tensor:
        """The step's noise (batch, vocab), like probabilities (..., vocab)."""
        if step in self._noise:
            return self._noise[step]
        noise = probs.new_empty(self._num_sequences, probs.shape[-1])
        if step == self._num_drawn:
            self._num_drawn += 1
            self._device = probs.device
            self._states[step] = _random_state(probs.device)
            noise.exponential_(1)
        else:
            generator = torch.Generator(probs.device)
            generator.set_state(self._states[step])
            noise.exponential_(1, generator=generator)
        self._noise[step] = noise
        if len(self._noise) > max(MAX_NOISE_BYTES // noise.nbytes, 1):
            self._noise.popitem(last=False)
        return noise

    def rewind(self, num_steps: int) -> None:
        """Reset the generator to its state after `num_steps`, if more were drawn."""
        if num_steps < self._num_drawn:
            _set_random_state(self._device, self._states[num_steps])

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

    def ahead(self, num_steps: int, probs: torch.Tensor) -> list[torch.Tensor]:
        """The noise (vocab,) of each of the next steps, for probabilities (..., vocab); `advance` counts a use."""
        steps = range(self._step, self._step + num_steps)
        return [self._noise.at_step(step, probs)[self._index] for step in steps]

    def advance(self) -> None:
        """Count a draw, such as one that was made with noise of `ahead`."""
        self._noise.forget(self._step)
        self._step += 1


def _random_state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
