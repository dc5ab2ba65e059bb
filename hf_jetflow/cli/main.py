"""`hf-jetflow COMMAND`: parse the arguments, then run the command and print what a user can mend in one line."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from .._version import __version__
from ..errors import JetFlowError
from .parser import Parser, add_options, make_settings, options, suggestion


COMMANDS = ("train", "bench", "doctor", "convert", "plot", "show", "simulate", "heads")
DESCRIPTION = "Tree speculative decoding with causal parallel draft heads, inside transformers' generate."


class Command(NamedTuple):
    """A command that was parsed."""

    module: ModuleType
    settings: list[Any]


def parse(arguments: Sequence[str] | None = None) -> Command:
    """
    The command and its settings. Imports neither torch nor transformers.

    Raises:
        SystemExit: With status 0 after help or version. With 2 where the arguments cannot be parsed, and with the
            command's own status of failure where its settings refuse them.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = command_list()
    name = parser.parse_args(arguments[:1]).command
    if name is None:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if name not in COMMANDS:
        parser.error(f"unknown command {name!r}{suggestion(name, COMMANDS)}")
    module = load(name)
    parser = command_parser(name)
    parser.check_names(arguments[1:])
    parsed = parser.parse_args(arguments[1:])
    try:
        settings = [make_settings(kind, parsed) for kind in module.SETTINGS]
        if hasattr(module, "check"):
            module.check(*settings)
    except JetFlowError as error:
        raise _failure(module, error) from None
    return Command(module, settings)


def run(command: Command) -> None:
    """
    Run a command. Errors that a user cannot mend keep their traceback.

    Raises:
        SystemExit: With the status of the command, if it is not 0.
    """
    try:
        status = command.module.run(*command.settings)
        sys.stdout.flush()
    except JetFlowError as error:
        raise _failure(command.module, error) from None
    except KeyboardInterrupt:
        print(f"interrupted{getattr(command.module, 'INTERRUPTED', '')}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of a pipe has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    if status:
        raise SystemExit(status)


def _failure(module: ModuleType, error: JetFlowError) -> SystemExit:
    print(f"error: {error}", file=sys.stderr)
    return SystemExit(getattr(module, "FAILURE", 1))


def load(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"hf_jetflow.cli.{name}")


def command_list() -> Parser:
    """The parser of what comes before a command, whose help lists the commands."""
    lines = [f"  {name:10}{(load(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS]
    epilog = "\n".join(["commands:", *lines, "", "`hf-jetflow COMMAND --help` shows the options of a command."])
    parser = Parser(prog="hf-jetflow", usage="hf-jetflow COMMAND [options]", description=DESCRIPTION, epilog=epilog)
    parser.add_argument("--version", action="version", version=f"hf-jetflow {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
    return parser


def command_parser(name: str) -> Parser:
    """The parser of a command's options."""
    module = load(name)
    described = [option for kind in module.SETTINGS for option in options(kind)]
    words = ["hf-jetflow", name]
    for option in (option for option in described if option.is_positional):
        words.append(option.names[0].upper() if option.is_required else f"[{option.names[0].upper()}]")
    parser = Parser(prog=" ".join(words[:2]), usage=" ".join([*words, "[options]"]), description=module.__doc__)
    for kind in module.SETTINGS:
        add_options(parser, kind)
    return parser


def main() -> None:
    """Parse and run: `python -m hf_jetflow`, where the package is imported already."""
    run(parse())
