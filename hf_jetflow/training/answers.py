"""Answers for training: written by the target, or made elsewhere and tokenized and checked."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .._compat import CACHE_NAME
from ..jsonl import append_jsonl, drop_partial_line, read_jsonl
from ..prompts import encode_chat
from ..target.growing_cache import grow_layers
from .data import derived_seed, read_answers


def regenerate_answers(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, Any]],
    output: str | os.PathLike,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    max_prompt_tokens: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """
    Answer every prompt with the target and append `{"id", "source", "prompt_ids", "answer_ids"}` to `output`.

    Prompts whose id is in `output` already are left out, so a killed run is continued by calling this again. Its
    answers are those of a run that was never killed: batches are the same, each is seeded by its place, and one that
    was written in part is computed again as a whole.

    Args:
        temperature: 0 for greedy answers; else they are sampled, from all tokens.
        max_prompt_tokens: Longer prompts are not answered.
        progress: Called with (prompts done, prompts in all) after every batch.

    Returns:
        `int`: Number of prompts that are too long.

    Raises:
        ValueError: If the temperature is negative.
        OSError: If an answer cannot be written. Those before it are kept.
    """
    if temperature < 0:
        raise ValueError(f"the temperature is {temperature}, but 0 (greedy) or more is needed")
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    done: set[str] = set()
    if output.exists():
        drop_partial_line(output)
        done = {str(record["id"]) for record in read_jsonl(output)}
    lengths = [len(encode_chat(tokenizer, prompt["messages"])) for prompt in prompts]
    order = sorted(
        (number for number, length in enumerate(lengths) if length <= max_prompt_tokens), key=lengths.__getitem__
    )
    eos_ids = _eos_ids(target, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": sorted(eos_ids), "do_sample": False}
    if temperature > 0:
        settings.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    devices = [target.device] if target.device.type == "cuda" else []
    for start in range(0, len(order), batch_size):
        batch = [prompts[number] for number in order[start : start + batch_size]]
        if all(prompt["id"] in done for prompt in batch):
            continue
        prompt_ids = [encode_chat(tokenizer, prompt["messages"]) for prompt in batch]
        with torch.random.fork_rng(devices):
            torch.manual_seed(derived_seed(seed, start))
            generated = _generate(target, prompt_ids, pad_id, settings)
        records = [
            {
                "id": prompt["id"],
                "source": prompt.get("source", output.stem),
                "prompt_ids": ids,
                "answer_ids": _until_eos(row, eos_ids),
            }
            for prompt, ids, row in zip(batch, prompt_ids, generated, strict=True)
            if prompt["id"] not in done
        ]
        append_jsonl(output, records)
        if progress is not None:
            progress(start + len(batch), len(order))
    return len(prompts) - len(order)


@torch.inference_mode()
def greedy_texts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, Any]],
    output: str | os.PathLike,
    max_new_tokens: int,
) -> list[tuple[list[int], int]]:
    """The target's greedy answers to prompts, kept in `output`: token ids of prompt and answer, and of how many the
    prompt is."""
    regenerate_answers(target, tokenizer, prompts, output, max_new_tokens=max_new_tokens)
    wanted = {prompt["id"] for prompt in prompts}
    records = (record for record in read_answers([output]) if record["id"] in wanted)
    return [(record["prompt_ids"] + record["answer_ids"], len(record["prompt_ids"])) for record in records]


def _generate(
    target: PreTrainedModel, prompt_ids: list[list[int]], pad_id: int, settings: dict[str, Any]
) -> list[list[int]]:
    """What the target writes behind each prompt, to the length of the longest."""
    longest = max(map(len, prompt_ids))
    input_ids = torch.full((len(prompt_ids), longest), pad_id, device=target.device)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompt_ids):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids, device=target.device)
        attention_mask[row, longest - len(ids) :] = 1
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    grow_layers(cache)
    generated = target.generate(
        input_ids, attention_mask=attention_mask, pad_token_id=pad_id, **{CACHE_NAME: cache}, **settings
    )
    return generated[:, longest:].tolist()


def _eos_ids(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    eos = target.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    return set(eos) if isinstance(eos, list) else {eos} - {None}


def _until_eos(ids: list[int], eos_ids: set[int]) -> list[int]:
    """The answer up to its first EOS, which is kept."""
    for index, token in enumerate(ids):
        if token in eos_ids:
            return ids[: index + 1]
    return ids


def with_token_ids(
    path: str | os.PathLike, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Path:
    """
    Tokenize a file of conversations, `messages` that end in the answer, once, into a file of answers in `folder`.

    The prompt is what the chat template makes of the messages before the last; the answer is what it adds for the
    last, up to the end-of-turn token, which is kept.

    Returns:
        `Path`: The new file, or `path` itself if its first record holds token ids or no messages.

    Raises:
        ValueError: If a record does not end in an assistant's turn that the chat template sets behind its own
            generation prompt.
    """
    path = Path(path)
    first = next(read_jsonl(path), {})
    if "messages" not in first or "prompt_ids" in first:
        return path
    version = [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, tokenizer.chat_template]
    output = folder / f"{path.stem}-{hashlib.sha256(repr(version).encode()).hexdigest()[:8]}.jsonl"
    if output.exists():
        return output
    folder.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    eos_ids = _eos_ids(target, tokenizer)
    for number, record in enumerate(read_jsonl(path), 1):
        prompt_ids, answer_ids = _split_conversation(tokenizer, record, f"{path}, record {number}")
        facts = {"id": str(record.get("id", f"{path.stem}-{number}")), "source": str(record.get("source", path.stem))}
        append_jsonl(partial, [{**facts, "prompt_ids": prompt_ids, "answer_ids": _until_eos(answer_ids, eos_ids)}])
    os.replace(partial, output)
    return output


def _split_conversation(
    tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], where: str
) -> tuple[list[int], list[int]]:
    messages: Any = record.get("messages")
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if not is_list or len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise ValueError(
            f"{where}: needs `messages` that end in an assistant's turn, as the file's first record has; complete the "
            "record or remove it"
        )
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: the chat template refuses the messages ({error}); correct the record") from error
    if not whole.startswith(prompt):
        raise ValueError(
            f"{where}: the chat template does not set this answer behind its own generation prompt; give `prompt_ids` "
            "and `answer_ids` as the target saw and wrote them"
        )
    prompt_ids, whole_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole_ids[len(prompt_ids) :]
    # The answer's first characters merge with the prompt's last, but the target writes behind whole prompt tokens.
    return prompt_ids, tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]


# Answers above are not the target's own. SmolLM2-135M-Instruct on 8 prompts: its greedy answers -0.88, its samples at
# temperature 1 0.06 (500 tokens; the more tokens, the nearer to 0), answers written by a person 2.0.
FOREIGN_SURPRISE = 0.3


@torch.inference_mode()
def surprise(target: PreTrainedModel, answers: Iterable[dict[str, Any]], max_length: int) -> float:
    """
    How much more than its own the answers surprise the target, in nats per token: the mean over the answer tokens of
    their negative log-likelihood less the entropy of the target's distribution.

    It is 0 on average for answers that the target sampled at temperature 1, negative for its greedy ones, and 0 if
    there is no token to look at.

    Args:
        answers: A sample; of each answer, the first 256 tokens within a sequence of `max_length` are looked at.
    """
    total, count = 0.0, 0
    for answer in answers:
        start = len(answer["prompt_ids"])
        ids = torch.tensor([answer["prompt_ids"] + answer["answer_ids"][:256]], device=target.device)[:, :max_length]
        logits = target(ids, use_cache=False).logits[0, start - 1 : -1]
        log_probs = logits.float().log_softmax(dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        likelihood = log_probs.gather(1, ids[0, start:, None])[:, 0]
        total -= float((likelihood + entropy).sum())
        count += len(likelihood)
    return total / count if count else 0.0
