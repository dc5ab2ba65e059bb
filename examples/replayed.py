"""Shared by the scripts that replay a head over the target's own greedy answers."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_jetflow import JetFlowHead
from hf_jetflow.prompts import read_prompts
from hf_jetflow.target.loading import load_target
from hf_jetflow.training.answers import regenerate_answers
from hf_jetflow.training.data import read_answers


def make_parser(description: str | None, texts: bool = True) -> argparse.ArgumentParser:
    """The options that these scripts share; `texts`: with a folder for the target's greedy answers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="Hub id, folder or .gguf file")
    parser.add_argument("--head", required=True, help="Hub id or folder")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSON lines files")
    if texts:
        parser.add_argument("--texts", type=Path, required=True, help="folder for the target's greedy answers")
    parser.add_argument("--num-prompts", type=int, default=40, help="prompts taken from each file")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    return parser


def load_pair(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, JetFlowHead]:
    """The target, its tokenizer and the head."""
    target, tokenizer = load_target(args.target, "auto")
    return target, tokenizer, JetFlowHead.from_pretrained(args.head, dtype=target.dtype).to(target.device)


def text_sets(
    args: argparse.Namespace, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, list[tuple[list[int], int]]]]:
    """Name and texts of each set, as `replay` takes them; stored answers are not generated again."""
    for path in args.prompts:
        prompts = read_prompts([path])[: args.num_prompts]
        yield path.stem, greedy_texts(target, tokenizer, prompts, args.texts / path.name, args.max_new_tokens)


def greedy_texts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    output: Path,
    max_new_tokens: int,
) -> list[tuple[list[int], int]]:
    """The target's greedy answers, stored in `output`: token ids of prompt and answer, and how many are the prompt."""
    regenerate_answers(target, tokenizer, prompts, output, max_new_tokens=max_new_tokens)
    wanted = {prompt["id"] for prompt in prompts}
    records = (record for record in read_answers([output]) if record["id"] in wanted)
    return [(record["prompt_ids"] + record["answer_ids"], len(record["prompt_ids"])) for record in records]
