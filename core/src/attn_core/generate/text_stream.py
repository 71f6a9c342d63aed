"""From tokens to text as they come: one request at a time on the way out, whole characters only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: what a tokenizer puts where the bytes so far are no whole character
INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one request, piece by piece: the pieces joined are the text of all its tokens."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        # Text is decoded from `_context` on and was given out up to `_given`: some tokens read otherwise at the
        # beginning of a text (a space that is dropped), so a little of what went before goes along.
        self._context = 0
        self._given = 0

    def add(self, token: int) -> str:
        """The text that became complete with ``token``: may be empty."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._given])
        text = self._decode(self._tokens[self._context :])
        if text.endswith(INCOMPLETE):
            return ""
        self._context, self._given = self._given, len(self._tokens)
        return text[len(before) :]

    def rest(self) -> str:
        """What is left when no more tokens come: the beginning of a character, if any."""
        before = self._decode(self._tokens[self._context : self._given])
        return self._decode(self._tokens[self._context :])[len(before) :]


class OrderedOutput:
    """Writes the texts of several requests in their order: the first unfinished one live, the others when it is done.

    ``write`` gets every piece; ``heading(i)`` is written before the text of request i.
    """

    def __init__(self, streams: list[TextStream], write: Callable[[str], Any], heading: Callable[[int], str]) -> None:
        self._streams = streams
        self._write = write
        self._heading = heading
        self._held: list[list[str]] = [[] for _ in streams]
        self._finished = [False] * len(streams)
        self._live = 0
        self._headed = -1

    def add(self, index: int, token: int) -> None:
        """A token of request ``index``."""
        self._put(index, self._streams[index].add(token))

    def finish(self, index: int) -> None:
        """Request ``index`` has no more tokens; its text ends with a newline."""
        self._put(index, self._streams[index].rest() + "\n")
        self._finished[index] = True
        while self._live < len(self._streams) and self._finished[self._live]:
            self._live += 1
            self._flush()

    def close(self) -> None:
        """No request has any more tokens: everything that is held is written."""
        for index, finished in enumerate(self._finished):
            if not finished:
                self.finish(index)

    def _put(self, index: int, text: str) -> None:
        self._held[index].append(text)
        self._flush()

    def _flush(self) -> None:
        if self._live == len(self._streams) or not self._held[self._live]:
            return
        if self._headed < self._live:
            self._write(self._heading(self._live))
            self._headed = self._live
        self._write("".join(self._held[self._live]))
        self._held[self._live].clear()
