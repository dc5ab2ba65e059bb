"""Published heads by target, from `catalog.json`: which head for my model, and does it load.

Whether a head loads follows from its layout. The file says the rest: one line per head. Imports no torch.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import JetFlowError
from .refused_layouts import REFUSED


FILE = Path(__file__).with_name("catalog.json")


@dataclass(frozen=True)
class PublishedHead:
    """One line of the file. Nothing was loaded or looked up on the Hub."""

    target: str  # name of the target without its organization
    head: str  # Hub id, or a folder of the repository
    layout: str  # a name of `formats.py` or `refused_layouts.py`
    license: str | None = None  # of the weights; `None` if it was not stated where the head was seen
    note: str | None = None
    obstacle: str | None = None  # why it does not load although its layout does

    @property
    def refusal(self) -> str | None:
        """Why the head does not load; `None` if it does."""
        refused = {each.name: each.reason for each in REFUSED}
        return self.obstacle or refused.get(self.layout)


def listed_heads(target: str | None = None) -> list[PublishedHead]:
    """
    All heads of the file, or those of a target, in its order.

    Args:
        target (`str`, *optional*): Name or Hub id of the target, in any case.

    Raises:
        JetFlowError: If no head of that target is listed. The message names targets that resemble it.
    """
    heads = [PublishedHead(**line) for line in json.loads(FILE.read_text(encoding="utf-8"))["heads"]]
    if target is not None:
        name = target.rpartition("/")[2].lower()
        known = {head.target.lower(): head.target for head in heads}
        heads = [head for head in heads if head.target.lower() == name]
        if not heads:
            close = [each for each in known if name in each][:3] or difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(known[each] for each in close)}? Otherwise " if close else ""
            raise JetFlowError(
                f"no head is listed for {target!r}; {hint}run `hf-jetflow heads` for all targets, or train a head "
                "with `hf-jetflow train`"
            )
    return heads


def published_heads(target: str | None = None) -> list[PublishedHead]:
    """The same, of each target those that load first."""
    heads = listed_heads(target)
    targets = {head.target: index for index, head in reversed(list(enumerate(heads)))}
    return sorted(heads, key=lambda head: (targets[head.target], head.refusal is not None))


def catalog_sources() -> str:
    """Where and when the heads were seen, in one sentence."""
    catalog = json.loads(FILE.read_text(encoding="utf-8"))
    return f"Ids and layouts were read in {catalog['date']}, not on the Hub: {'; '.join(catalog['sources'])}."


def catalog_table(heads: Sequence[PublishedHead]) -> str:
    """The heads as a Markdown table."""
    lines = ["| Target | Head | Layout | Loads | License |", "|---|---|---|---|---|"]
    target = None
    for head in heads:
        name, target = "" if head.target == target else head.target, head.target
        loads = "yes" if head.refusal is None else f"no: {head.refusal}"
        if head.note:
            loads += f" ({head.note})"
        license = head.license or "not stated"
        lines.append(f"| {name} | `{head.head}` | {head.layout} | {loads} | {license} |")
    return "\n".join(lines)
