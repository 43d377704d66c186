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
    """Cuts a text at the stop string that is complete first (of two that end together, the longer one). What may
    still become a stop string is held back, no more. Where the pieces are cut makes no difference."""

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        """`include`: the stop string itself is part of the text."""
        self._stops = stops
        self._include = include
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """What may go out now. `may_stop=False`: a stop string that ends within `text` does not count."""
        assert self.found is None, "the text has ended"
        seen, text = len(self._held), self._held + text
        if may_stop:
            starts = {stop: text.find(stop, max(0, seen - len(stop) + 1)) for stop in self._stops}
            ends = [(start + len(stop), -len(stop), stop) for stop, start in starts.items() if start >= 0]
            if ends:
                end, _, self.found = min(ends)
                self._held = ""
                return text[: end if self._include else end - len(self.found)]
        keep = len(text) - max((_begun(stop, text) for stop in self._stops), default=0)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, when the text ended before it became a stop string."""
        held, self._held = self._held, ""
        return held


def _begun(stop: str, text: str) -> int:
    """How much of `stop`, short of all of it, `text` ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
