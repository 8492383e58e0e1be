"""Token ids in, safe text out: whole UTF-8 characters, and nothing that could still be a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """The text of one growing answer.

    The first stop string to be *completed* ends the answer (the longest, if several end at the same
    character), so the result does not depend on how tokens cut the text. Text before it is released,
    the stop string itself never.

    Args:
        token_bytes: bytes of a token (:meth:`engine.tokenizer.Tokenizer.token_bytes`).
        stop: stop strings, none empty.
        strip_space: drop one leading space of the whole text (SentencePiece).
    """

    def __init__(
        self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = (), strip_space: bool = False
    ) -> None:
        self._token_bytes = token_bytes
        self._stop = tuple(stop)
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._withheld = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this token releases; sets ``stopped`` when it completes a stop string."""
        if self.stopped:
            return ""
        fresh = self._decoder.decode(self._token_bytes(token_id))
        if self._strip_space and fresh:
            fresh = fresh.removeprefix(" ")
            self._strip_space = False
        if not self._stop:
            return fresh
        text = self._withheld + fresh
        if (cut := self._first_completed(text, len(self._withheld))) is not None:
            self.stopped = True
            self._withheld = ""
            return text[:cut]
        keep = self._open_suffix(text)
        self._withheld = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was withheld, now that no more tokens come. Half a UTF-8 character is dropped."""
        text, self._withheld = self._withheld, ""
        return text

    def _first_completed(self, text: str, old: int) -> int | None:
        """Start of the stop string that ends first, searching only ends beyond ``old`` characters."""
        best: tuple[int, int] | None = None
        for stop in self._stop:
            at = text.find(stop, max(0, old - len(stop) + 1))
            if at >= 0 and (best is None or (at + len(stop), at) < best):
                best = (at + len(stop), at)
        return None if best is None else best[1]

    def _open_suffix(self, text: str) -> int:
        """Length of the longest suffix that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for size in range(longest, 0, -1):
            suffix = text[-size:]
            if any(stop.startswith(suffix) for stop in self._stop if len(stop) > size):
                return size
        return 0
