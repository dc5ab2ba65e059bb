"""Write docs/reference/command-line.md from the settings of the commands.

make docs
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

from hf_jetflow.cli.main import COMMANDS, load
from hf_jetflow.cli.parser import options


PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "command-line.md"


def page() -> str:
    """The page as Markdown."""
    parts = [
        "# Command line",
        "Written by `make docs` from the settings of the commands: edit those.",
        "`hf-jetflow COMMAND --help` prints the same. `python -m hf_jetflow` does the same, but starts more slowly.",
        "An option marked `...` takes several values and may be given several times. Commas may separate the values, "
        "except those of paths.",
    ]
    for name in COMMANDS:
        parts += [f"## hf-jetflow {name}", *paragraphs(inspect.getdoc(load(name)) or "")]
        rows = [row for kind in load(name).SETTINGS for row in option_rows(kind)]
        parts.append("\n".join(["| Option | Default | Meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a command's help; what is indented is code."""
    for paragraph in text.split("\n\n"):
        is_code = paragraph.startswith("    ")
        yield f"```bash\n{inspect.cleandoc(paragraph)}\n```" if is_code else " ".join(paragraph.split())


def option_rows(settings: type) -> Iterator[str]:
    """One row of the table per option."""
    for option in options(settings):
        value = option.metavar.replace("|", " or ") + " ..." * option.is_list
        names = [option.names[0].upper()] if option.is_positional else [f"{n} {value}".strip() for n in option.names]
        default = "required" if option.is_required else option.default and f"`{option.default}`"
        yield f"| {', '.join(f'`{name}`' for name in names)} | {default} | {option.field.metadata['help']} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
