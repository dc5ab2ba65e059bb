"""Makes a command's options from its settings: dataclasses whose fields carry a `help` in their metadata.

Metadata that a field may carry as well: `aliases` (further names of the option), `metavar`, and `is_positional`.
transformers' `HfArgumentParser` does the same, but importing it imports transformers, which takes over a second.
"""

import argparse
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints


METAVARS = {str: "TEXT", Path: "PATH", int: "INTEGER", float: "NUMBER"}
EXPECTED = {int: "an integer such as 16", float: "a number such as 0.7"}
EXPECTED_ITEMS = {int: "integers such as 16,32", float: "numbers such as 0,0.7"}


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` with errors of one line, and suggestions for options that are misspelled."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; run `{self.prog} --help`\n")

    def check_names(self, arguments: Sequence[str]) -> None:
        """Refuse an unknown option and suggest the closest one: argparse would first miss the one that is meant."""
        for name in (argument.partition("=")[0] for argument in arguments):
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(f"unknown option {name}{suggestion(name, self._option_string_actions)}")


def suggestion(name: str, known: Any) -> str:
    """`, did you mean ...?` where a known name resembles the given one."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


@dataclass
class Option:
    """One option of a command, as the parser and the reference describe it."""

    names: list[str]  # `--num-prompts` and its aliases, or the name of a positional argument
    field: Field
    kind: type  # of the value, or of each item of a list
    choices: tuple[str, ...]
    is_list: bool

    @property
    def is_positional(self) -> bool:
        return not self.names[0].startswith("-")

    @property
    def is_required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def default(self) -> str:
        """The default as it would be typed, or an empty string where there is none to speak of."""
        value = self.field.default_factory() if self.field.default_factory is not MISSING else self.field.default
        if value is MISSING or value is None or value is False:
            return ""
        items = value if self.is_list else [value]
        return ",".join(f"{item:g}" if isinstance(item, float) else f"{item}" for item in items)

    @property
    def metavar(self) -> str:
        """Placeholder for the value, empty for a flag."""
        if self.kind is bool:
            return ""
        return self.field.metadata.get("metavar") or "|".join(self.choices) or METAVARS[self.kind]

    def read(self, text: str) -> Any:
        """
        The value that a text stands for; a list for list options, whose items may be separated by commas.

        Raises:
            argparse.ArgumentTypeError: If it is no number where one is expected.
        """
        try:
            if not self.is_list or self.kind is Path:
                return [self.kind(text)] if self.is_list else self.kind(text)
            return [self.kind(item) for item in text.split(",") if item]
        except ValueError:
            expected = (EXPECTED_ITEMS if self.is_list else EXPECTED)[self.kind]
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


class _Extend(argparse.Action):
    """Collects the items of a list option, which may be given several times."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        items = [item for part in values for item in part]
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *items])


def options(settings: type) -> Iterator[Option]:
    """The options of a settings dataclass, in the order of its fields."""
    hints = get_type_hints(settings)
    for each in fields(settings):
        kind = hints[each.name]
        kind = next((arg for arg in get_args(kind) if NoneType in get_args(kind) and arg is not NoneType), kind)
        is_list = get_origin(kind) is list
        kind = get_args(kind)[0] if is_list else kind
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        aliases = each.metadata.get("aliases", [])
        names = [f"--{each.name.replace('_', '-')}", *([aliases] if isinstance(aliases, str) else aliases)]
        if each.metadata.get("is_positional"):
            names = [each.name]
        yield Option(names, each, str if choices else kind, choices, is_list)


def add_options(parser: Parser, settings: type) -> None:
    """Add the options of a settings dataclass to a parser."""
    for option in options(settings):
        note = f" (default: {option.default})" if option.default else " (required)" if option.is_required else ""
        arguments: dict[str, Any] = {"help": (option.field.metadata["help"] + note).replace("%", "%%")}
        if option.kind is bool:
            arguments["action"] = "store_true"
        else:
            arguments |= {"type": option.read, "metavar": option.metavar, "choices": option.choices or None}
        if option.is_list:
            arguments |= {"action": _Extend, "nargs": "+"}
        if option.is_positional:
            arguments["metavar"] = option.names[0].upper()
            if not option.is_required:
                arguments["nargs"] = "?"
        else:
            arguments |= {"dest": option.field.name, "required": option.is_required}
        parser.add_argument(*option.names, default=argparse.SUPPRESS, **arguments)


def make_settings(kind: Callable[..., Any], parsed: argparse.Namespace) -> Any:
    """The settings that were given on the command line; the dataclass has the defaults."""
    names = {option.field.name for option in options(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(parsed).items() if name in names})
