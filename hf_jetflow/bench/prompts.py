"""The prompts of a bench: one set per file, context length and batch size."""

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import JetFlowError
from ..prompts import encode_chat, read_prompts
from .settings import BenchSettings


@dataclass
class PromptSet:
    """Prompts of one file, at one context length and batch size."""

    name: str  # of the file, without suffix
    context_length: int | None  # tokens that prompts are padded to; `None` for no padding
    prompt_ids: list[list[int]]
    batch_size: int = 1

    @property
    def key(self) -> tuple[str, int | None, int]:
        return self.name, self.context_length, self.batch_size

    @property
    def label(self) -> str:
        length = "" if self.context_length is None else f", {self.context_length} tokens"
        return self.name + length + ("" if self.batch_size == 1 else f", batches of {self.batch_size}")

    @property
    def batches(self) -> list[list[list[int]]]:
        """Prompts that are answered in one call."""
        starts = range(0, len(self.prompt_ids), self.batch_size)
        return [self.prompt_ids[start : start + self.batch_size] for start in starts]

    @property
    def median_length(self) -> float:
        """Median number of tokens of a prompt."""
        return statistics.median(map(len, self.prompt_ids))

    @property
    def content_hash(self) -> str:
        """Hash of the token ids."""
        return hashlib.sha256(json.dumps(self.prompt_ids).encode()).hexdigest()[:16]


def make_prompt_sets(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: BenchSettings
) -> list[PromptSet]:
    """
    The first `num_prompts` prompts of each file, once for each context length and batch size.

    Raises:
        JetFlowError: If a file has too few prompts for a batch, two files have the same name, or a prompt and its
            answer do not fit the target.
    """
    names = [Path(path).stem for path in settings.prompts]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise JetFlowError(f"several prompt files are called {doubled}, but rows go by that name; rename all but one")
    _check_lengths(target, settings.context_lengths, settings.max_new_tokens)  # long contexts take time to make
    sets = []
    for name, path in zip(names, settings.prompts, strict=True):
        conversations = [prompt["messages"] for prompt in read_prompts([path])]
        for length in settings.context_lengths or (None,):
            encoded = [
                encode_chat(tokenizer, messages)
                if length is None
                else padded_prompt(tokenizer, conversations, number, length)
                for number, messages in enumerate(conversations[: settings.num_prompts])
            ]
            _check_lengths(target, list(map(len, encoded)), settings.max_new_tokens)
            if len(encoded) < max(settings.batch_sizes):
                raise JetFlowError(
                    f"{path} gives {len(encoded)} prompts, too few for batches of {max(settings.batch_sizes)}; add "
                    "prompts, or raise `num_prompts`"
                )
            for size in settings.batch_sizes:
                sets.append(PromptSet(name, length, encoded[: len(encoded) // size * size], size))
    return sets


def _check_lengths(target: PreTrainedModel, lengths: Sequence[int], max_new_tokens: int) -> None:
    most = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(lengths, default=0)
    if most is not None and longest + max_new_tokens > most:
        room = most - max_new_tokens
        raise JetFlowError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the target's {most} positions; "
            "use fewer new tokens" + (f", or contexts and prompts of at most {room}" if room > 0 else "")
        )


def padded_prompt(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict[str, Any]]], number: int, length: int
) -> list[int]:
    """
    Token ids of a conversation, padded to about `length` tokens: texts of the others precede its last turn.

    The length can be a few tokens off, because texts are joined before they are tokenized and tokens may merge at the
    joints. A longer prompt is returned unchanged.
    """
    *turns, last = conversations[number]
    prompt_ids = encode_chat(tokenizer, conversations[number])
    missing = length - len(prompt_ids)
    if missing <= 0:
        return prompt_ids
    ordered = [*conversations[number + 1 :], *conversations[: number + 1]]
    filler = _filler_ids(tokenizer, [message["content"] for messages in ordered for message in messages], 2 * length)
    for _ in range(4):
        text = tokenizer.decode(filler[:missing])
        prompt_ids = encode_chat(tokenizer, [*turns, {**last, "content": f"{text}\n\n{last['content']}"}])
        if len(prompt_ids) == length:
            break
        missing += length - len(prompt_ids)
    return prompt_ids


def _filler_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int) -> list[int]:
    """The first `count` tokens of the texts, repeated as needed; fewer only if all texts are empty."""
    ids: list[int] = []
    for text in cycle(texts):
        ids += tokenizer(f"{text}\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count or not any(texts):
            return ids[:count]
    return ids
