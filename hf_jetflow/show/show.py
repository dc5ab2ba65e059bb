"""Record the draft trees of one answer and write them as a page or a picture."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding.settings import read_node_budget
from ..decoding.tree_log import TreeRound
from ..errors import JetFlowError
from ..files import atomic_write
from ..head.modeling_jetflow import JetFlowHead
from ..head.settings import head_settings
from ..prompts import encode_chat
from ..stats import GenerationStats
from ..target.loading import load_pair
from ..target.settings import PairSettings
from ..training.evaluation import greedy_ids
from .settings import ShowSettings, check_output
from .tree_page import tree_page
from .tree_plot import DPI, check_rounds, draw_trees


PIXELS_PER_UNIT = 2  # of a PNG
MAX_PIXELS = 2**16 - 1  # per side of a PNG, a limit of matplotlib


def show_pair(pair: PairSettings, settings: ShowSettings) -> GenerationStats:
    """
    Load a target and a head, answer the prompt greedily, and write the draft trees.

    Returns:
        `GenerationStats`: Statistics of the answer.
    """
    messages = settings.messages()
    target, tokenizer, head = load_pair(pair)
    node_budget = read_node_budget(settings.node_budget)
    rounds, stats = record_rounds(target, tokenizer, head, messages, settings.max_new_tokens, node_budget)
    about = (
        f"{Path(pair.head).name} drafts for {Path(pair.target).name}, {str(target.dtype).removeprefix('torch.')}, "
        f"node budget {node_budget}"
    )
    prompt = messages[-1]["content"]
    write_trees(rounds, tokenizer, settings.output, only=settings.round, prompt=prompt, about=about)
    return stats


def record_rounds(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: JetFlowHead,
    messages: list[dict[str, Any]],
    max_new_tokens: int,
    node_budget: int | str,
) -> tuple[list[TreeRound], GenerationStats]:
    """The rounds of one greedy answer, and its statistics; the head is left as it was."""
    with head_settings(head, node_budget=node_budget, record_trees=True):
        greedy_ids(target, encode_chat(tokenizer, messages), max_new_tokens, assistant_model=head)
        return head.last_trees, head.last_stats


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
    Write rounds as a page or a picture; the write is atomic.

    Args:
        rounds: `head.last_trees`.
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        path (`Path`): `.html` for a page of all rounds; `.svg` or `.png` for a picture.
        only (`int`, *optional*): Number of the only round of the picture, or of the first round shown on the page.
        prompt, about (`str`): Texts of the page, see `tree_page`.

    Raises:
        JetFlowError: If nothing was recorded, there is no such round, or a PNG would be too large.
    """
    check_output(path)
    check_rounds(rounds, None if only is None else [only])
    if path.suffix == ".html":
        page = tree_page(rounds, tokenizer, prompt=prompt, about=about, first=only or 1)
        with atomic_write(path) as partial:
            partial.write_text(page, encoding="utf-8")
    else:
        figure = draw_trees(rounds, tokenizer, None if only is None else [only])
        sides = [round(inches * DPI * PIXELS_PER_UNIT) for inches in figure.get_size_inches()]
        if path.suffix == ".png" and max(sides) > MAX_PIXELS:
            raise JetFlowError(
                f"a picture of {len(rounds)} rounds has {sides[0]} x {sides[1]} pixels, but a PNG has at most "
                f"{MAX_PIXELS} per side; draw one round (--round), or write .svg or .html"
            )
        with atomic_write(path) as partial:
            figure.savefig(partial, dpi=DPI * PIXELS_PER_UNIT)
