"""Draw the draft trees of an answer.

Example:

    hf-jetflow show --target org/model --head org/head --prompt "Why is the sky blue?" --output trees.html

A picture (.png or .svg) needs the extra `bench`, a .gguf target the extra `train`:
pip install 'hf-jetflow[bench,train]'.
"""

from dataclasses import dataclass, field

from ..show.settings import ShowSettings
from ..target.settings import PairSettings


@dataclass
class Output:
    """What is printed."""

    quiet: bool = field(default=False, metadata={"help": "Print no progress."})


SETTINGS = (PairSettings, ShowSettings, Output)


def check(pair: PairSettings, settings: ShowSettings, _: Output) -> None:
    settings.messages()
    pair.check()


def run(pair: PairSettings, settings: ShowSettings, output: Output) -> None:
    from ..show.show import show_pair
    from .console import note, progress

    with progress(output.quiet) as report:
        report.say(f"loading {pair.target} and {pair.head}, then answering ...")
        stats = show_pair(pair, settings)
    note(f"{stats.num_rounds} rounds, {stats.tokens_per_round:.2f} tokens per round; written to {settings.output}")
