"""`DoctorSettings`: the options of `hf-jetflow doctor`, and its built-in prompts."""

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import JetFlowError, check_at_least
from ..files import check_json_path
from ..prompts import read_prompts


MIN_PROMPTS = 3  # with answers of two tokens or more
BUILT_IN_PROMPTS = (
    "Tom has 3 boxes with 12 pencils each and gives away 9 pencils. How many pencils does he have left?",
    "A train travels 180 km in 2.5 hours. What is its average speed, and how far does it get in 4 hours?",
    "Write a Python function that checks whether a word is a palindrome.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "Write a SQL query that counts the orders of each customer.",
    "Name three things to see in Lisbon and say why.",
    "Explain to a child why the sky is blue.",
    "Write an e-mail that moves a meeting from Monday to Thursday.",
)


@dataclass
class DoctorSettings:
    """Prompts and length of an examination."""

    prompts: list[Path] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": f"JSON lines files of at least {MIN_PROMPTS} prompts, in place of the built-in prompts.",
        },
    )
    num_prompts: int = field(default=8, metadata={"help": f"Prompts taken from the files, at least {MIN_PROMPTS}."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of each answer."})
    json: Path | None = field(default=None, metadata={"help": "File for all findings as JSON."})

    def __post_init__(self) -> None:
        check_at_least(self, num_prompts=MIN_PROMPTS, max_new_tokens=1)
        check_json_path(self.json)

    def conversations(self) -> list[list[dict[str, str]]]:
        """
        The prompts as chat messages.

        Raises:
            JetFlowError: If there are too few.
        """
        if not self.prompts:
            return [[{"role": "user", "content": text}] for text in BUILT_IN_PROMPTS]
        prompts = read_prompts(self.prompts)[: self.num_prompts]
        if len(prompts) < MIN_PROMPTS:
            raise JetFlowError(
                f"`--prompts`: expected at least {MIN_PROMPTS} prompts, got {len(prompts)}; add some, or leave the "
                "option out for the built-in ones"
            )
        return [prompt["messages"] for prompt in prompts]
