"""The text of a completion: whole, and piece by piece while it grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastalign.generation.stops import decode, special_ids

WINDOW = 16  # tokens decoded together with new ones; it slides over what is settled
UNFINISHED = "\ufffd"  # what a decoder gives for the bytes of a character that is not all there
MAX_UNFINISHED = 3  # bytes that a character may still wait for


def completion_text(tokenizer: Any, ids: Sequence[int], stop_reason: int | str | None = None, min_tokens: int = 0) -> str:
    """The text of a completion: without its stop token, and ending before its stop string.

    Args:
        tokenizer: decodes the ids.
        ids: of the completion, the stop token or the stop string's tokens included.
        stop_reason: the token id or the string that stopped it; None: nothing did, and all of it is text.
        min_tokens: before so many tokens the stop string stopped nothing.
    """
    if isinstance(stop_reason, int):
        return decode(tokenizer, ids[:-1])
    text = decode(tokenizer, ids)
    if stop_reason is None:
        return text
    before = decode(tokenizer, ids[: min_tokens - 1]).rstrip(UNFINISHED) if min_tokens > 1 else ""
    at = text.find(stop_reason, max(0, len(before) - len(stop_reason) + 1))
    return text if at < 0 else text[:at]


def begun_stop(text: str, stops: Iterable[str]) -> int:
    """Characters at the end of `text` that a stop string may begin with."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


class GrowingText:
    """Turns a growing completion into text that can be shown at once: what was given out is never taken back.

    Held back are the bytes of an unfinished character and whatever a stop string may begin with. The pieces together are the
    finished completion's text. Only a window of recent tokens is decoded with each new one, whatever the length.
    A decoder that takes back characters it had finished (byte fallback, when invalid bytes follow valid ones) cannot be
    followed exactly: there the pieces keep the characters and go on behind them.

    Args:
        tokenizer: decodes the ids.
        stops: the stop strings.
        special: ids that have no text; `special_ids(tokenizer)`, which a caller with many completions computes once.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), special: frozenset[int] | None = None) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.special = special_ids(tokenizer) if special is None else special
        self.ids: list[int] = []
        self.given = 0  # characters given out
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that were given out
        self._waiting = 0  # tokens since the last character was finished

    def push(self, ids: Sequence[int]) -> str:
        """The text that further tokens of an unfinished completion add; "" while it is held back."""
        self.ids += ids
        fresh = [token for token in ids if token not in self.special]
        if not fresh:
            return ""
        self._window += fresh
        text = decode(self.tokenizer, self._window)
        settled = text[: len(text) - self._unfinished(text, len(fresh))]
        end = len(settled) - begun_stop(settled[self._shown :], self.stops)
        piece = settled[self._shown : end]
        self.given += len(piece)
        self._shown = max(self._shown, end)
        if len(self._window) > WINDOW:
            self._slide(text)
        return piece

    def finish(self, stop_reason: int | str | None = None, min_tokens: int = 0) -> str:
        """The rest, now that the completion has ended; arguments as of `completion_text`."""
        piece = completion_text(self.tokenizer, self.ids, stop_reason, min_tokens)[self.given :]
        self.given += len(piece)
        return piece

    def _unfinished(self, text: str, fresh: int) -> int:
        """Characters at the end of the text that may yet become others; bytes that no character waits for are let go."""
        count = len(text) - len(text.rstrip(UNFINISHED))
        self._waiting = self._waiting + fresh if count else 0
        return min(count, MAX_UNFINISHED) if self._waiting > WINDOW // 2 else count

    def _slide(self, text: str) -> None:
        """Drops the window's older half where that changes nothing: its text was given out, and the rest decodes as before."""
        rest = self._window[-(WINDOW // 2) :]
        tail = decode(self.tokenizer, rest)
        dropped = len(text) - len(tail)
        if tail and text.endswith(tail) and dropped <= self._shown:
            self._window, self._shown = rest, self._shown - dropped
