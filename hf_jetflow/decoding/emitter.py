"""What leaves the loop: committed ids, the streamer, the end of generation, the return object."""

from typing import Any

import torch
from transformers import Cache, EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .._compat import CACHE_NAME
from ..target.caches import cache_windows
from ..target.target import TargetStates
from ..trees.ngrams import MAX_CONTEXT
from ..trees.walk import Chooser


class Emitter:
    """
    Commits tokens one by one, exactly as plain decoding would see them.

    Args:
        input_ids (`torch.Tensor`, (batch, seq)): The prompts; seq may be 0 when they were given as embeddings.
        stopping_criteria (`StoppingCriteriaList`): Asked after every token, for one sequence at a time.
        streamer (*optional*): Gets every token; of a batch, the tokens of all sequences as soon as each has one.
        pad_token_id (`int`, *optional*): Follows the end of a sequence while others go on.
        attention_mask (`torch.Tensor`, (batch, at least seq), *optional*): 0 for the padding in front of prompts.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None = None,
        pad_token_id: int | None = None,
        attention_mask: torch.Tensor | None = None,
    ):
        batch, self._prompt_length = input_ids.shape
        self._num_padding = [0] * batch
        if batch > 1 and attention_mask is not None and attention_mask.dim() == 2:
            is_padding = attention_mask[:, attention_mask.shape[1] - self._prompt_length :].cumsum(1) == 0
            self._num_padding = is_padding.sum(1).tolist()
        self._lengths = [self._prompt_length] * batch
        self._ids = torch.cat([input_ids, input_ids.new_empty(batch, 64)], dim=1)
        self._streamer = streamer
        self._num_streamed = 0
        self._pad_token_id = pad_token_id
        # Length and EOS are decided on the host; every other criterion sees the ids as in plain decoding.
        self._max_length = min([c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria], default=None)
        self._eos_ids = {
            int(i) for c in stopping_criteria if type(c) is EosTokenCriteria for i in c.eos_token_id.flatten()
        }
        self._criteria = [c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        self._hidden_states: list[tuple[torch.Tensor, ...]] = []
        self._attentions: list[tuple[torch.Tensor, ...]] = []
        self.rows = list(range(batch))  # the sequence decoded at each place of the batch
        self._finished_rows: set[int] = set()

    def committed_ids(self, row: int = 0) -> torch.Tensor:
        """All ids of a sequence so far, (1, seq): a view that later tokens do not change."""
        return self._ids[row : row + 1, : self._lengths[row]]

    @property
    def newest_ids(self) -> torch.Tensor:
        """What is searched for n-grams at each place, (places, up to `MAX_CONTEXT`); -1 in front of shorter texts."""
        if len(self._lengths) == 1:
            return self.committed_ids()[:, -MAX_CONTEXT:]
        lengths, starts = (
            torch.tensor([counts[row] for row in self.rows])[:, None] for counts in (self._lengths, self._num_padding)
        )
        columns = (lengths + torch.arange(-min(int((lengths - starts).max()), MAX_CONTEXT), 0)).to(self._ids.device)
        ids = self._ids[self.rows].gather(1, columns.clamp_min(0))
        return ids.masked_fill_(columns < starts.to(columns.device), -1)

    @property
    def num_remaining(self) -> int | None:
        """Tokens that some sequence may still emit; `None` without a length limit."""
        return None if self._max_length is None else self._max_length - min(self._lengths[row] for row in self.rows)

    @property
    def num_new_tokens(self) -> int:
        """Tokens emitted, over all sequences."""
        return sum(self._lengths) - len(self._lengths) * self._prompt_length

    def push(self, row: int, token: int, scores: tuple[torch.Tensor, ...] | None = None) -> bool:
        """Commit one token of a sequence; returns whether it ends with it. `scores` are for the criteria."""
        length = self._lengths[row]
        if length == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.empty_like(self._ids)], dim=1)
        self._ids[row, length] = token
        self._lengths[row] = length = length + 1
        is_finished = token in self._eos_ids or (self._max_length is not None and length >= self._max_length)
        for criterion in self._criteria:
            is_finished |= bool(criterion(self.committed_ids(row), scores).all())
        if is_finished:
            self._finished_rows.add(row)
        self._stream()
        return is_finished

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        return len(self._finished_rows) == len(self._lengths)

    @property
    def finished_places(self) -> list[int]:
        """Places whose sequence has ended, the last one first."""
        return [place for place, row in reversed(list(enumerate(self.rows))) if row in self._finished_rows]

    def retire(self, place: int) -> None:
        """Go on without the sequence at `place`; the last one takes its place."""
        self.rows[place] = self.rows[-1]
        self.rows.pop()

    def _stream(self) -> None:
        if self._streamer is None:
            return
        open_lengths = [length for row, length in enumerate(self._lengths) if row not in self._finished_rows]
        end = min(open_lengths, default=max(self._lengths))
        while self._prompt_length + self._num_streamed < end:
            place = self._prompt_length + self._num_streamed
            self._streamer.put(self._padded_ids(place, place + 1)[:, 0].cpu())
            self._num_streamed += 1

    def _padded_ids(self, start: int, end: int) -> torch.Tensor:
        """Ids (batch, end - start) at these places, behind the end of a sequence the padding token."""
        ids = self._ids[:, start:end].clone()
        for row, known in enumerate(self._lengths):
            if known < end:
                assert self._pad_token_id is not None  # `generate` sees to it where there is an EOS token
                ids[row, max(known - start, 0) :] = self._pad_token_id
        return ids

    @property
    def length(self) -> int:
        """Of the longest sequence, prompt included."""
        return max(self._lengths)

    def rest_ids(self) -> torch.Tensor:
        """What plain decoding goes on to read where a sequence has ended: its last token, then padding. (batch, rest),
        as long as the one that ended first needs."""
        rest = torch.full((len(self._lengths), self.length - min(self._lengths)), self._pad_token_id or 0)
        rest[:, :1] = torch.cat([self.committed_ids(row)[:, -1:] for row in range(len(rest))])[:, : rest.shape[1]]
        return rest

    def record_prompt(self, states: TargetStates) -> None:
        """Keep the prefill's hidden states and attentions, if the caller wants them."""
        self._hidden_states.append(states.hidden_states)
        self._attentions.append(states.attentions)

    def record_path(self, states: TargetStates, path: list[int], cache: Cache) -> None:
        """Keep those of the path's nodes, whose keys and values are in the cache, one entry per token as in plain
        decoding."""
        if not (states.hidden_states or states.attentions):
            return
        nodes, windows = states.logits.shape[1], cache_windows(cache)
        for place, node in enumerate(path):
            if states.hidden_states:
                self._hidden_states.append(tuple(layer[..., node : node + 1, :] for layer in states.hidden_states))
            entry = []
            for layer, window in zip(states.attentions, windows, strict=False):
                in_cache = layer.shape[-1] - nodes
                columns = list(range(in_cache)) + [in_cache + seen for seen in path[: place + 1]]
                if window is not None:  # plain decoding returns no more columns than the window is wide
                    columns = columns[-window:]
                entry.append(layer[:, :, node : node + 1, columns])
            self._attentions.append(tuple(entry))

    def finish(
        self, cache: Cache, wants: dict[str, Any], chooser: Chooser
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """End the stream and assemble what `generate` returns."""
        if self._streamer is not None:
            self._streamer.end()
        sequences = self._padded_ids(0, self.length)
        if not wants["return_dict_in_generate"]:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=chooser.scores,
            logits=chooser.logits,
            attentions=tuple(self._attentions) if wants["output_attentions"] else None,
            hidden_states=tuple(self._hidden_states) if wants["output_hidden_states"] else None,
            **{CACHE_NAME: cache},
        )
