"""`JetFlowError`: the one exception that the command line turns into a message, and how messages name options."""

from typing import Any


class JetFlowError(ValueError):
    """An error that the user can fix: the command line prints it in one line, without a traceback."""


def flag(name: str) -> str:
    """The command-line option of a field of settings."""
    return "--" + name.replace("_", "-")


def check_at_least(settings: Any, **minimums: float) -> None:
    """
    Check numbers among settings, or lists of them; `None` is no number.

    Raises:
        JetFlowError: Naming the option, its value and the least that is expected.
    """
    for name, least in minimums.items():
        value = getattr(settings, name)
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and not number >= least:
                raise JetFlowError(f"`{flag(name)}` is {number}, expected at least {least}")
