"""Write a head in another project's layout.

Example:

    hf-jetflow convert runs/my-head --to speculators --target org/model --output runs/my-head-speculators

A .gguf target needs the extra `train`: pip install 'hf-jetflow[train]'.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..files import check_new_folder
from ..target.settings import check_head, model_source


@dataclass
class ConvertSettings:
    """The head, the layout and the folder to write."""

    head: str = field(
        metadata={"help": "Head to convert, in any layout that loads: a Hub id or a folder.", "is_positional": True}
    )
    to: Literal["jetspec", "dflash", "speculators", "jetflow"] = field(metadata={"help": "Layout to write."})
    output: Path = field(metadata={"help": "New folder for the converted head."})
    target: str | None = field(
        default=None,
        metadata={
            "help": "The head's target: a Hub id, a folder, or a .gguf file. speculators needs it for a head with a "
            "draft vocabulary, other layouts where the head does not describe its target."
        },
    )
    quiet: bool = field(default=False, metadata={"help": "Print no progress."})


SETTINGS = (ConvertSettings,)


def check(settings: ConvertSettings) -> None:
    check_new_folder(settings.output)
    check_head(settings.head)
    if settings.target is not None:
        model_source(settings.target)


def run(settings: ConvertSettings) -> None:
    from ..convert.convert import convert_head
    from .console import note, progress

    with progress(settings.quiet):
        dropped = convert_head(settings.head, settings.to, settings.output, settings.target)
    for part in dropped:
        note(f"left out: {part}")
    note(f"head in the layout of {settings.to} saved in {settings.output}")
