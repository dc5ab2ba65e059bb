"""Token ids as text that can be looked at: labels of single tokens, and a text cut into what each token added."""

import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


MARKS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
LONGEST_LABEL = 18  # columns
UNFINISHED = "\ufffd"  # what bytes that are no whole character decode to


class TokenLabels:
    """
    Labels of single tokens, spaces and line ends visible, cut to a width.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The target's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # Alone or at the start some tokenizers drop a token's space; after another one they do not.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """What the token adds to a text."""
        if token not in self._texts:
            whole = _decode(self._tokenizer, [*self._before, token])
            self._texts[token] = whole[len(_decode(self._tokenizer, self._before)) :]
        return self._texts[token]

    def label(self, token: int) -> str:
        """The text with its white space visible; a token without any is its id."""
        return shorten(visible(self.text(token)) or f"#{token}")


def visible(text: str) -> str:
    """The text with a mark for each space, tab and line end, and the code of other characters that do not print."""
    return "".join(
        MARKS.get(char) or (char if char.isprintable() or unicodedata.combining(char) else f"<{ord(char):X}>")
        for char in text
    )


def display_width(text: str) -> int:
    """Columns of a fixed-width font."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char) for char in text)


def shorten(text: str, most: int = LONGEST_LABEL) -> str:
    """The text, or as much of it as fits into `most` columns with an ellipsis."""
    if display_width(text) <= most:
        return text
    while display_width(text) > most - 1:
        text = text[:-1]
    return f"{text}…"


def text_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; bytes of an unfinished character come with the token that finishes it."""
    pieces: list[str] = []
    start = done = 0  # ids[start:done] stand before the next piece, so that its spaces come out as in the text
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
