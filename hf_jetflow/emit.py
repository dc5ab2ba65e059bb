"""What leaves the loop: committed ids, the streamer, the end of generation, the return object."""

from typing import Any

import torch
from transformers import Cache, EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .target import TargetStates
from .walk import Chooser


class Emitter:
    """
    Commits tokens one by one, exactly as plain decoding would see them.

    Args:
        input_ids (`torch.Tensor`, (1, seq)): The prompt; seq may be 0 when the prompt was given as embeddings.
        stopping_criteria (`StoppingCriteriaList`): Asked after every token.
        streamer (*optional*): Gets every token.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        chooser: Chooser,
    ):
        self._length = input_ids.shape[1]
        self._ids = torch.cat([input_ids, input_ids.new_empty(1, 64)], dim=1)
        self._streamer = streamer
        self._chooser = chooser
        # Length and EOS are decided on the host; every other criterion sees the ids as in plain decoding.
        self._max_length = min([c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria], default=None)
        self._eos_ids = {
            int(i) for c in stopping_criteria if type(c) is EosTokenCriteria for i in c.eos_token_id.flatten()
        }
        self._criteria = [c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        self._hidden_states: list[tuple[torch.Tensor, ...]] = []
        self._attentions: list[tuple[torch.Tensor, ...]] = []
        self.num_new_tokens = 0
        self.is_finished = False

    def committed_ids(self) -> torch.Tensor:
        """All ids so far, (1, seq): a view that later tokens do not change."""
        return self._ids[:, : self._length]

    @property
    def anchor_id(self) -> torch.Tensor:
        """The newest committed token, (1,)."""
        return self._ids[0, self._length - 1 : self._length]

    @property
    def num_remaining(self) -> int | None:
        """Tokens that may still be emitted; `None` without a length limit."""
        return None if self._max_length is None else self._max_length - self._length

    def push(self, token: int) -> bool:
        """Commit one token; returns whether generation ends with it."""
        if self._length == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.empty_like(self._ids)], dim=1)
        self._ids[0, self._length] = token
        self._length += 1
        self.num_new_tokens += 1
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token]))
        self.is_finished = token in self._eos_ids or (
            self._max_length is not None and self._length >= self._max_length
        )
        for criterion in self._criteria:
            self.is_finished |= bool(criterion(self.committed_ids(), self._chooser.scores).all())
        return self.is_finished

    def record_prompt(self, states: TargetStates) -> None:
        """Keep the prefill's hidden states and attentions, if the caller wants them."""
        self._hidden_states.append(states.hidden_states)
        self._attentions.append(states.attentions)

    def record_path(self, states: TargetStates, path: list[int], windows: list[int | None]) -> None:
        """Keep those of the path's nodes, one entry per token as in plain decoding, whose caches have `windows`."""
        nodes = len(states.logits)
        for place, node in enumerate(path):
            if states.hidden_states:
                self._hidden_states.append(tuple(layer[:, node : node + 1] for layer in states.hidden_states))
            entry = []
            for layer, window in zip(states.attentions, windows, strict=False):
                in_cache = layer.shape[-1] - nodes
                columns = list(range(in_cache)) + [in_cache + seen for seen in path[: place + 1]]
                if window is not None:  # plain decoding returns no more columns than the window is wide
                    columns = columns[-window:]
                entry.append(layer[:, :, node : node + 1, columns])
            self._attentions.append(tuple(entry))

    def finish(self, cache: Cache, wants: dict[str, Any]) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """End the stream and assemble what `generate` returns."""
        if self._streamer is not None:
            self._streamer.end()
        sequences = self.committed_ids().clone()
        if not wants["return_dict_in_generate"]:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._chooser.scores,
            logits=self._chooser.logits,
            attentions=tuple(self._attentions) if wants["output_attentions"] else None,
            hidden_states=tuple(self._hidden_states) if wants["output_hidden_states"] else None,
            past_key_values=cache,
        )
