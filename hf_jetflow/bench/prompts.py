"""What a bench answers: prompts by file, padded to context lengths where the user asks for some."""

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..prompts import encode_chat, read_prompts


@dataclass
class PromptSet:
    """Prompts of one file at one length, answered so many at a time."""

    name: str  # of the file, without the ending
    context_length: int | None  # tokens that the prompts were padded to; `None`: as they are
    prompt_ids: list[list[int]]
    batch_size: int = 1

    @property
    def place(self) -> tuple[str, int | None, int]:
        return self.name, self.context_length, self.batch_size

    @property
    def label(self) -> str:
        length = "" if self.context_length is None else f", {self.context_length} tokens"
        return self.name + length + ("" if self.batch_size == 1 else f", batches of {self.batch_size}")

    @property
    def batches(self) -> list[list[list[int]]]:
        """The prompts that are answered together."""
        starts = range(0, len(self.prompt_ids), self.batch_size)
        return [self.prompt_ids[start : start + self.batch_size] for start in starts]

    @property
    def median_length(self) -> float:
        """Tokens of a prompt."""
        return statistics.median(map(len, self.prompt_ids))

    @property
    def content_hash(self) -> str:
        """Tells whether two sets hold the same token ids."""
        return hashlib.sha256(json.dumps(self.prompt_ids).encode()).hexdigest()[:16]


def make_prompt_sets(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[Path],
    *,
    num_prompts: int,
    context_lengths: Sequence[int],
    batch_sizes: Sequence[int] = (1,),
    max_new_tokens: int,
) -> list[PromptSet]:
    """
    The first `num_prompts` prompts of each file, once for each context length and batch size.

    Raises:
        ValueError: If a file holds no prompts or too few for a batch, two files have the same name, or a context does
            not fit the target.
    """
    names = [Path(path).stem for path in paths]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"several prompt files are called {doubled}, and rows go by that name; rename all but one")
    _check_lengths(target, context_lengths, max_new_tokens)
    sets = []
    for name, path in zip(names, paths, strict=True):
        conversations = [prompt["messages"] for prompt in read_prompts([path])]
        for length in context_lengths or (None,):
            encoded = [
                encode_chat(tokenizer, messages)
                if length is None
                else padded_prompt(tokenizer, conversations, number, length)
                for number, messages in enumerate(conversations[:num_prompts])
            ]
            if len(encoded) < max(batch_sizes):
                raise ValueError(
                    f"{path} gives {len(encoded)} prompts, too few for batches of {max(batch_sizes)}; give more, or "
                    "raise the number of prompts taken"
                )
            for size in batch_sizes:
                sets.append(PromptSet(name, length, encoded[: len(encoded) // size * size], size))
    return sets


def _check_lengths(target: PreTrainedModel, context_lengths: Sequence[int], max_new_tokens: int) -> None:
    most = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is None:
        return
    too_long = [length for length in context_lengths if length + max_new_tokens > most]
    if too_long:
        raise ValueError(
            f"contexts of {too_long} tokens and {max_new_tokens} new ones do not fit the target, which has {most} "
            f"positions; give context lengths of at most {most - max_new_tokens}, or fewer new tokens"
        )


def padded_prompt(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict[str, Any]]], number: int, length: int
) -> list[int]:
    """
    One of the conversations with texts of the others in front of its last turn, so that it has about `length` tokens.

    Texts are cut and joined as text, and tokens may merge where they meet: the length can be a few tokens off. A
    prompt that is longer by itself stays as it is.
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
    """`count` tokens of the texts, which are told again and again; fewer only if they hold none."""
    ids: list[int] = []
    for text in cycle(texts):
        ids += tokenizer(f"{text}\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count or not any(texts):
            return ids[:count]
    return ids
