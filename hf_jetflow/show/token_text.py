"""Token ids as readable text: labels of single tokens, and a text split by token."""

import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


MARKS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
MAX_LABEL = 18  # columns
UNFINISHED = "\ufffd"  # decoding of bytes that are no whole character


class TokenLabels:
    """
    Short labels of single tokens, with visible white space.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The target's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # Some tokenizers drop the leading space of a first token, so decode after another one.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The text that the token adds."""
        if token not in self._texts:
            whole = _decode(self._tokenizer, [*self._before, token])
            self._texts[token] = whole[len(_decode(self._tokenizer, self._before)) :]
        return self._texts[token]

    def label(self, token: int) -> str:
        """The text with visible white space; the id if the token has no text."""
        return shorten(visible(self.text(token)) or f"#{token}")


def visible(text: str) -> str:
    """The text with marks for white space, and codes for other characters that do not print."""
    return "".join(
        MARKS.get(char) or (char if char.isprintable() or unicodedata.combining(char) else f"<{ord(char):X}>")
        for char in text
    )


def display_width(text: str) -> int:
    """Width in columns of a fixed-width font."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char) for char in text)


def shorten(text: str) -> str:
    """The text, cut with an ellipsis to `MAX_LABEL` columns."""
    if display_width(text) <= MAX_LABEL:
        return text
    while display_width(text) > MAX_LABEL - 1:
        text = text[:-1]
    return f"{text}…"


def text_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; the bytes of a split character go to its last token."""
    pieces: list[str] = []
    start = done = 0  # decoding ids[start:done] with the next piece preserves the piece's spaces
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[start:end])
        if text.endswith(UNFINISHED) and end < len(ids) and end - done < 4:
            pieces.append("")
            continue
        pieces.append(text[len(_decode(tokenizer, ids[start:done])) :])
        start, done = done, end
    return pieces


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
