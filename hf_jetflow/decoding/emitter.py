"""What leaves the loop: committed ids, the streamer, the end of generation, the return object."""

import torch
from transformers import Cache, EosTokenCriteria, GenerationConfig, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .._compat import CACHE_NAME
from ..buffers import grown
from ..target.caches import cache_windows
from ..target.prefilled import TargetStates
from ..target.slots import BatchSlots
from ..transfer import to_device
from ..trees.ngrams import MAX_SEARCHED
from ..trees.walk import Chooser
from .batching import split_criteria, stops_each


class Emitter:
    """
    Commits tokens to the text one by one, and hands them on, exactly as plain decoding would.

    A stopping criterion may look at the whole batch, and may remember earlier calls. So it is called as in plain
    decoding: once for each step that every sequence has reached, with all sequences up to that step. Sequences that
    are ahead lose what lies behind the step at which they end. Criteria that look at one sequence are called at once.

    Args:
        input_ids (`torch.Tensor`, (batch, seq)): The prompts; seq may be 0 when they were given as embeddings.
        stopping_criteria (`StoppingCriteriaList`): Called after every token.
        slots ([`BatchSlots`]): Tells which sequences are active.
        streamer (*optional*): Gets every token; of a batch, the tokens of all sequences as soon as each has one.
        pad_token_id (`int`, *optional*): Follows the end of a sequence while others go on.
        attention_mask (`torch.Tensor`, (batch, at least seq), *optional*): 0 for the padding in front of prompts.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        stopping_criteria: StoppingCriteriaList,
        slots: BatchSlots,
        streamer: BaseStreamer | None = None,
        pad_token_id: int | None = None,
        attention_mask: torch.Tensor | None = None,
    ):
        batch, self._prompt_length = input_ids.shape
        self._slots = slots
        self._num_padding = [0] * batch
        if batch > 1 and attention_mask is not None and attention_mask.dim() == 2:
            is_padding = attention_mask[:, attention_mask.shape[1] - self._prompt_length :].cumsum(1) == 0
            self._num_padding = is_padding.sum(1).tolist()
        self._lengths = [self._prompt_length] * batch
        # New tokens stay on the host until the ids are asked for: one copy takes all of a round along.
        self._new_ids: list[list[int]] = [[] for _ in range(batch)]
        self._num_written = [0] * batch
        self._pad_token_id = pad_token_id or 0  # `generate` sets one wherever a sequence can end before others
        # Padding lies behind each sequence; new tokens are int64.
        self._ids = grown(input_ids.long(), self._prompt_length, dim=1, fill=self._pad_token_id)
        self._streamer = streamer
        self._num_streamed = 0
        # Length and EOS are decided on the host; every other criterion sees the ids as in plain decoding.
        self._max_length = min([c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria], default=None)
        self._eos_ids = {
            int(i) for c in stopping_criteria if type(c) is EosTokenCriteria for i in c.eos_token_id.flatten()
        }
        self._stops_each = batch == 1 or stops_each(stopping_criteria)
        self._sequence_criteria, self._batch_criteria = split_criteria(stopping_criteria, batch)
        self._num_checked = self._prompt_length  # tokens of each sequence that the criteria of the batch have seen
        self._stopped: set[int] = set()  # by the criteria of the batch
        self._hidden_states: list[tuple[torch.Tensor, ...]] = []
        self._attentions: list[tuple[torch.Tensor, ...]] = []
        self._finished: set[int] = set()

    def committed_ids(self, sequence: int = 0) -> torch.Tensor:
        """All ids of a sequence so far, (1, seq): a view that later tokens do not change."""
        return self._write_new_ids()[sequence : sequence + 1, : self._lengths[sequence]]

    def _write_new_ids(self) -> torch.Tensor:
        """Write the tokens that are on the host only; returns the ids of all sequences, (batch, at least seq)."""
        if (width := self._ids.shape[1]) < self.length:
            self._ids = grown(self._ids, self.length, dim=1, fill=self._pad_token_id)
            width = self._ids.shape[1]
        offsets: list[int] = []
        tokens: list[int] = []
        for sequence, (new_ids, start) in enumerate(zip(self._new_ids, self._num_written, strict=True)):
            first = sequence * width + self._prompt_length
            offsets += range(first + start, first + len(new_ids))
            tokens += new_ids[start:]
        if tokens:
            offsets_and_tokens = to_device([offsets, tokens], self._ids.device)
            self._ids.view(-1).index_copy_(0, *offsets_and_tokens.unbind())
            self._num_written = [len(new_ids) for new_ids in self._new_ids]
        return self._ids

    @property
    def newest_ids(self) -> torch.Tensor:
        """Newest tokens of the active sequences, for n-grams: (active, up to `MAX_SEARCHED`), -1 in front."""
        if len(self._lengths) == 1:
            return self.committed_ids()[:, -MAX_SEARCHED:]
        sequences, lengths, starts = (
            torch.tensor([values[sequence] for sequence in self.active], device="cpu")[:, None]
            for values in (range(len(self._lengths)), self._lengths, self._num_padding)
        )
        newest = torch.arange(-min(int((lengths - starts).max()), MAX_SEARCHED), 0, device="cpu")
        ids = self._write_new_ids()
        sequences, starts, columns = to_device(
            torch.cat([sequences, starts, lengths + newest], dim=1), ids.device
        ).split([1, 1, len(newest)], dim=1)
        return ids[sequences, columns.clamp_min(0)].masked_fill_(columns < starts, -1)

    @property
    def num_remaining(self) -> int | None:
        """Maximum number of tokens that an active sequence may still emit; `None` without a length limit."""
        return None if self._max_length is None else self._max_length - min(self._lengths[i] for i in self.active)

    @property
    def num_new_tokens(self) -> int:
        """Tokens emitted, over all sequences."""
        return sum(self._lengths) - len(self._lengths) * self._prompt_length

    @property
    def num_steps(self) -> int:
        """Steps of plain decoding up to here. A streamer that fails ends it at the token that it was given."""
        num_steps = self._num_reached - self._prompt_length
        return num_steps if self._streamer is None else min(num_steps, self._num_streamed + 1)

    def push(self, sequence: int, token: int, scores: tuple[torch.Tensor, ...] | None = None) -> bool:
        """Commit one token; a finished sequence ignores it. Returns whether the sequence is finished. The criteria get
        `scores`."""
        if sequence in self._finished:  # by a criterion of the batch, since the round began
            return True
        self._new_ids[sequence].append(token)
        self._lengths[sequence] = length = self._lengths[sequence] + 1
        is_finished = token in self._eos_ids or (self._max_length is not None and length >= self._max_length)
        if not is_finished and self._sequence_criteria:
            is_finished = bool(_stopped_by(self._sequence_criteria, self.committed_ids(sequence), scores))
        if is_finished:
            self._finished.add(sequence)
        if self._batch_criteria:
            self._check_batch_criteria(scores)
        self._stream()
        return sequence in self._finished

    def _check_batch_criteria(self, scores: tuple[torch.Tensor, ...] | None) -> None:
        """Ask the criteria of the batch about every step that all sequences have reached, in order."""
        while self._num_checked < self._num_reached:
            self._num_checked = end = self._num_checked + 1
            self._stopped |= _stopped_by(self._batch_criteria, self._write_new_ids()[:, :end].contiguous(), scores)
            if not self._stops_each and len(self._stopped) < len(self._lengths):
                continue
            for sequence in self._stopped:
                if self._lengths[sequence] >= end:
                    self._ids[sequence, end:] = self._pad_token_id
                    self._lengths[sequence] = end
                    del self._new_ids[sequence][end - self._prompt_length :]
                    self._num_written[sequence] = len(self._new_ids[sequence])
                    self._finished.add(sequence)

    @property
    def _num_reached(self) -> int:
        """Tokens that every sequence has, padding behind its end included."""
        return min((n for i, n in enumerate(self._lengths) if i not in self._finished), default=self.length)

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        return len(self._finished) == len(self._lengths)

    @property
    def active(self) -> list[int]:
        """The active sequences, by batch slot."""
        return self._slots.active

    @property
    def finished_slots(self) -> list[int]:
        """Slots of finished sequences, the last one first."""
        return [slot for slot, sequence in reversed([*enumerate(self.active)]) if sequence in self._finished]

    def _stream(self) -> None:
        if self._streamer is None:
            return
        while self._prompt_length + self._num_streamed < self._num_reached:
            index = self._num_streamed
            ids = [new[index] if index < len(new) else self._pad_token_id for new in self._new_ids]
            self._streamer.put(torch.tensor(ids, device="cpu"))
            self._num_streamed += 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt included."""
        return list(self._lengths)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, prompt included."""
        return max(self._lengths)

    def rest_ids(self) -> torch.Tensor:
        """Tokens that plain decoding would still feed for finished sequences: the last token, then padding. Shape
        (batch, rest); rest is what the shortest sequence lacks."""
        shape = (len(self._lengths), self.length - min(self._lengths))
        rest = torch.full(shape, self._pad_token_id, device="cpu")
        rest[:, :1] = torch.cat([self.committed_ids(i)[:, -1:] for i in range(len(rest))])[:, : rest.shape[1]]
        return rest

    def record_prompt(self, states: TargetStates) -> None:
        """Record the prefill's hidden states and attentions, if the caller wants them."""
        self._hidden_states.append(states.hidden_states)
        self._attentions.append(states.attentions)

    def record_path(self, states: TargetStates, path: list[int], cache: Cache) -> None:
        """Record hidden states and attentions of the path, one entry per token. Runs before the commit, while all
        nodes are cached."""
        if not (states.hidden_states or states.attentions):
            return
        nodes, windows = states.logits.shape[1], cache_windows(cache)
        for index, node in enumerate(path):
            if states.hidden_states:
                # Copies: a compiled forward may overwrite its outputs the next time.
                rows = tuple(layer[..., node : node + 1, :].clone() for layer in states.hidden_states)
                self._hidden_states.append(rows)
            entry = []
            for layer, window in zip(states.attentions, windows, strict=False):
                in_cache = layer.shape[-1] - nodes
                columns = list(range(in_cache)) + [in_cache + seen for seen in path[: index + 1]]
                if window is not None:  # plain decoding returns no more columns than the window is wide
                    columns = columns[-window:]
                entry.append(layer[:, :, node : node + 1, columns])
            self._attentions.append(tuple(entry))

    def finish(
        self, cache: Cache, config: GenerationConfig, chooser: Chooser
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """End the stream and assemble what `generate` returns."""
        if self._streamer is not None:
            self._streamer.end()
        sequences = self._write_new_ids()[:, : self.length].clone()
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=chooser.scores,
            logits=chooser.logits,
            attentions=tuple(self._attentions) if config.output_attentions else None,
            hidden_states=tuple(self._hidden_states) if config.output_hidden_states else None,
            **{CACHE_NAME: cache},
        )


def _stopped_by(
    criteria: StoppingCriteriaList, input_ids: torch.Tensor, scores: tuple[torch.Tensor, ...] | None
) -> set[int]:
    """Indices of the sequences (batch, seq) that the criteria stop, whatever they return: one answer for each
    sequence, or one for all."""
    is_open = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device) & ~criteria(input_ids, scores)
    return {index for index, flag in enumerate(is_open.flatten().tolist()) if not flag}
