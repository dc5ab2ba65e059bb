"""What `hf-jetflow show` does: one answer with its draft trees recorded, written as a page or a picture."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding.tree_log import TreeRound
from ..extras import require_package
from ..files import atomic_write
from ..head.modeling_jetflow import JetFlowHead
from ..prompts import encode_chat, read_prompts
from .tree_page import tree_page
from .tree_plot import DPI, check_rounds, draw_trees


ENDINGS = (".html", ".svg", ".png")
SHARPNESS = 2  # pixels of a PNG per unit of the drawing
MOST_PIXELS = 2**16 - 1  # of a PNG's side, by matplotlib


def check_output(path: Path) -> None:
    """
    Before models are loaded: whether the file can be written.

    Raises:
        ValueError: If the ending is none of the known ones, or matplotlib is missing for it.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"the output {path} ends in {path.suffix!r}, but {', '.join(ENDINGS[:-1])} or .png is needed")
    if path.suffix != ".html":
        require_package("matplotlib", "pictures")


def choose_prompt(text: str | None, file: Path | None, index: int) -> list[dict[str, Any]]:
    """
    Messages of the prompt: a text of the user's, or number `index` (from 0) of a file.

    Raises:
        ValueError: If not exactly one of both is given, or the file has no such prompt.
    """
    if (text is None) == (file is None):
        raise ValueError("give the prompt either as text (--prompt) or from a file (--prompts FILE --index N)")
    if text is not None:
        return [{"role": "user", "content": text}]
    assert file is not None
    prompts = read_prompts([file])
    if not 0 <= index < len(prompts):
        raise ValueError(f"prompt {index} was asked for, but {file} holds {len(prompts)}, counted from 0")
    return prompts[index]["messages"]


def record_trees(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: JetFlowHead,
    messages: list[dict[str, Any]],
    max_new_tokens: int,
    node_budget: int | str,
) -> list[TreeRound]:
    """The rounds of one greedy answer. The head is left as it was, but for `last_stats` and `last_trees`."""
    input_ids = torch.tensor([encode_chat(tokenizer, messages)], device=target.device)
    settings, was_recording = head.generation_config, head.record_trees
    head.generation_config = copy.deepcopy(settings)
    head.generation_config.node_budget = node_budget
    head.record_trees = True
    try:
        target.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            assistant_model=head,
        )
    finally:
        head.generation_config, head.record_trees = settings, was_recording
    return head.last_trees


def write_trees(
    rounds: list[TreeRound],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    only: int | None = None,
    prompt: str = "",
    about: str = "",
) -> None:
    """
    Write rounds as a page or a picture, in one step: a killed run leaves no half file.

    Args:
        rounds: `head.last_trees`.
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        path (`Path`): `.html` for a page of all rounds; `.svg` or `.png` for a picture.
        only (`int`, *optional*): The one round of the picture, or the page's first; the first is 1.
        prompt, about (`str`): Of the page, see `tree_page`.

    Raises:
        ValueError: If nothing was recorded, there is no such round, or a PNG would be too large.
    """
    check_output(path)
    check_rounds(rounds, None if only is None else [only])
    if path.suffix == ".html":
        page = tree_page(rounds, tokenizer, prompt=prompt, about=about, first=only or 1)
        with atomic_write(path) as partial:
            partial.write_text(page, encoding="utf-8")
    else:
        figure = draw_trees(rounds, tokenizer, None if only is None else [only])
        sides = [round(inches * DPI * SHARPNESS) for inches in figure.get_size_inches()]
        if path.suffix == ".png" and max(sides) > MOST_PIXELS:
            raise ValueError(
                f"the picture of {len(rounds)} rounds is {sides[0]} x {sides[1]} pixels, but a PNG's side has at most "
                f"{MOST_PIXELS}; choose one round (--round), or write .svg or .html"
            )
        with atomic_write(path) as partial:
            figure.savefig(partial, dpi=DPI * SHARPNESS)
