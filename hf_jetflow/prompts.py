"""Prompts: conversations read from JSON lines files, and their token ids under a chat template."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import JetFlowError
from .jsonl import numbered_records, shown


if TYPE_CHECKING:  # settings are read before transformers is imported
    from transformers import PreTrainedTokenizerBase


CONTENT = (str, list, type(None))  # text, parts for a template that takes them, nothing beside tool calls


def read_prompts(paths: Sequence[str | os.PathLike]) -> list[dict[str, Any]]:
    """
    Prompts of JSON lines files, as `{"id": str, "source": str, "messages": [...]}`.

    A record holds `messages` (chat format), `turns` (the user's turns; the first one is used) or `prompt` (text).
    Its source is its field `source`, or else the name of the file without the suffix.

    Raises:
        JetFlowError: If a file does not exist or holds no prompts, a record has none of these fields or a wrong type
            in one, or an id occurs twice. The message names file and line.
    """
    prompts: dict[str, dict[str, Any]] = {}
    for path in paths:
        count = 0
        for count, (line, _, record) in enumerate(numbered_records(path), 1):
            where = f"{path}, line {line}"
            prompt_id = str(record.get("id", f"{Path(path).stem}-{count}"))
            if prompt_id in prompts:
                raise JetFlowError(f"{where}: the id {prompt_id!r} occurs twice; ids must be unique")
            source = str(record.get("source", Path(path).stem))
            prompts[prompt_id] = {"id": prompt_id, "source": source, "messages": _messages(record, where)}
        if not count:
            raise JetFlowError(f'{path} holds no prompts; write one on each line, such as {{"prompt": "..."}}')
    return list(prompts.values())


def _messages(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The conversation of a record, checked."""
    if "messages" in record:
        messages = record["messages"]
        is_list = isinstance(messages, list) and len(messages) > 0
        if not is_list or not all(
            isinstance(turn, dict) and {"role", "content"} <= turn.keys() and isinstance(turn["content"], CONTENT)
            for turn in messages
        ):
            raise JetFlowError(
                f"{where}: expected `messages` to be a list of objects with `role` and text as `content`, got "
                f"{shown(messages)}; correct the line"
            )
        return messages
    name = next((name for name in ("prompt", "turns") if record.get(name)), None)
    if name is None:
        empty = [f"`{name}`" for name in ("prompt", "turns") if name in record]
        if empty:
            raise JetFlowError(f"{where}: {empty[0]} is empty; fill it, or remove the line")
        raise JetFlowError(
            f"{where}: expected `messages`, `turns` or `prompt`, got {sorted(record)}; rename the field that holds "
            "the prompt"
        )
    text = record[name][0] if name == "turns" and isinstance(record[name], list) else record[name]
    if not isinstance(text, str) or (name == "turns" and text is record[name]):
        expected = "text" if name == "prompt" else "a list of texts"
        raise JetFlowError(f"{where}: expected {expected} in `{name}`, got {shown(record[name])}; correct the line")
    return [{"role": "user", "content": text}]


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], **options: bool) -> list[int]:
    """
    Token ids of a conversation under the tokenizer's chat template, with its generation prompt.

    Args:
        options: Passed to the chat template, such as `enable_thinking`.
    """
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
