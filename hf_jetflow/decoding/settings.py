"""A node budget from text. Like every `settings.py`, importable in milliseconds, without torch."""

from ..errors import JetFlowError, flag


def read_node_budget(text: str, name: str = "node_budget") -> int | str:
    """
    A node budget from text: `"auto"`, or the rows verified per round, root included.

    Args:
        name (`str`): The field of settings that it was given in.

    Raises:
        JetFlowError: If it is neither.
    """
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise JetFlowError(f"`{flag(name)}` is {text!r}, expected 'auto' or a number of at least 1, such as 32")
    return int(text)
