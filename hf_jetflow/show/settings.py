"""`ShowSettings`: the options of `hf-jetflow show`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..decoding.settings import read_node_budget
from ..errors import JetFlowError, check_at_least
from ..extras import require_package
from ..files import check_writable
from ..prompts import read_prompts


SUFFIXES = (".html", ".svg", ".png")


@dataclass
class ShowSettings:
    """
    The prompt to answer and the file to write.

    Raises:
        JetFlowError: If the output has an unknown suffix, a number is not valid, the prompt is empty, or not exactly
            one of `prompt` and `prompts` is given.
    """

    output: Path = field(
        metadata={"help": "File to write: .html for a page of all rounds, .svg or .png for a picture."}
    )
    prompt: str | None = field(default=None, metadata={"help": "The user's message."})
    prompts: Path | None = field(default=None, metadata={"help": "JSON lines file to take a prompt from."})
    index: int = field(default=0, metadata={"help": "Index of the prompt in the file, from 0."})
    max_new_tokens: int = field(default=96, metadata={"help": "Tokens of the answer."})
    node_budget: str = field(default="32", metadata={"help": "Nodes verified per round, root included, or auto."})
    round: int | None = field(
        default=None, metadata={"help": "Number of the only round to draw, from 1; the first round shown on a page."}
    )

    def __post_init__(self) -> None:
        check_output(self.output)
        read_node_budget(self.node_budget)
        check_at_least(self, max_new_tokens=1, **({} if self.round is None else {"round": 1}))
        if self.prompt is not None and not self.prompt.strip():
            raise JetFlowError("`--prompt` is empty; give the text to answer")
        if (self.prompt is None) == (self.prompts is None):
            raise JetFlowError("expected exactly one of --prompt TEXT and --prompts FILE; give one of them")

    def messages(self) -> list[dict[str, Any]]:
        """
        The conversation to answer.

        Raises:
            JetFlowError: If the file has no prompt of that index.
        """
        if self.prompts is None:
            return [{"role": "user", "content": self.prompt}]
        prompts = read_prompts([self.prompts])
        if not 0 <= self.index < len(prompts):
            raise JetFlowError(
                f"`--index` is {self.index}, but {self.prompts} holds {len(prompts)} prompts; indices start at 0"
            )
        return prompts[self.index]["messages"]


def check_output(path: Path) -> None:
    """
    Check that trees can be written to a file.

    Raises:
        JetFlowError: If the suffix is unknown, the path cannot be written, or matplotlib is missing for a picture.
    """
    if path.suffix not in SUFFIXES:
        raise JetFlowError(f"`--output` is {path}, expected a name that ends in {', '.join(SUFFIXES)}")
    check_writable(path, "--output")
    if path.suffix != ".html":
        require_package("matplotlib", "pictures")
