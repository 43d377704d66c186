"""The text of a stream of tokens: never half a character, and never past a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from holdfast.gateway.tokenizer import Tokenizer


class Detokenizer:
    """Text of a continuation, token by token. All pieces and the flush together are the text of the bytes
    of all tokens; a leading space stays, since there is a prompt before it."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters this token completes, often all of its own, sometimes none."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What an unfinished character at the end becomes: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Cuts a text at the stop string that is complete first (of two that end together, the longer one).

    One Knuth-Morris-Pratt automaton per stop string: a character costs O(stop strings), and what may still
    become a stop string is held back, no more. Where the pieces are cut makes no difference.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        """`include`: the stop string itself is part of the text."""
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        self._include = include
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """What may go out now. `may_stop=False`: a stop string that ends within `text` does not count."""
        if not self._stops:
            return text
        assert self.found is None, "the text has ended"
        text = self._held + text
        for end in range(len(self._held) + 1, len(text) + 1):
            stop = self._advance(text[end - 1])
            if stop is not None and may_stop:
                self.found, self._held = stop, ""
                return text[: end if self._include else end - len(stop)]
        keep = len(text) - max(self._matched)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, when the text ended before it became a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Read one character; the longest stop string it completes."""
        completed: str | None = None
        for index, (stop, borders) in enumerate(self._stops):
            length = self._matched[index]
            while length and stop[length] != char:
                length = borders[length - 1]
            if stop[length] == char:
                length += 1
            if length == len(stop):
                if completed is None or len(stop) > len(completed):
                    completed = stop
                length = borders[length - 1]
            self._matched[index] = length
        return completed


def _borders(word: str) -> list[int]:
    """For each prefix of `word`, the length of its longest proper suffix that is also its prefix."""
    borders = [0] * len(word)
    length = 0
    for index in range(1, len(word)):
        while length and word[index] != word[length]:
            length = borders[length - 1]
        if word[index] == word[length]:
            length += 1
        borders[index] = length
    return borders
