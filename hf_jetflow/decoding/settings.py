"""A node budget from text. Like every `settings.py`, importable in milliseconds, without torch."""

from ..errors import JetFlowError


def read_node_budget(text: str) -> int | str:
    """
    A node budget from text: `"auto"`, or the rows verified per round, root included.

    Raises:
        JetFlowError: If it is neither.
    """
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise JetFlowError(f"expected a node budget of at least 1, or 'auto', got {text!r}; use a number such as 32")
    return int(text)
