"""Draw the draft trees of an answer.

Example:

    hf-jetflow show --target org/model --head org/head --prompt "Why is the sky blue?" --output trees.html

A picture (.png or .svg) needs the extra `bench`, a .gguf target the extra `train`:
pip install 'hf-jetflow[bench,train]'.
"""

from ..show.settings import ShowSettings
from ..target.settings import PairSettings


SETTINGS = (PairSettings, ShowSettings)


def check(pair: PairSettings, settings: ShowSettings) -> None:
    settings.messages()
    pair.check()


def run(pair: PairSettings, settings: ShowSettings) -> None:
    from ..show.show import show_pair
    from .console import note

    stats = show_pair(pair, settings)
    note(f"{stats.num_rounds} rounds, {stats.tokens_per_round:.2f} tokens per round; written to {settings.output}")
