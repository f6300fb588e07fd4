"""When a completion ends: stop tokens as one table lookup a step, stop strings across token borders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PENDING = 16  # tokens that may wait for the rest of a character before they are read as they are


class StopTable:
    """The distinct sets of stop tokens as rows of one [sets, V] bool table.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._index: dict[frozenset[int], int] = {}
        self.ids: list[NDArray[np.int64]] = []
        self.table = np.zeros((0, vocab_size), bool)

    def add(self, ids: Iterable[int]) -> int:
        """The row of this set of token ids."""
        key = frozenset(ids)
        if key not in self._index:
            self._index[key] = len(self._index)
            self.ids.append(np.array(sorted(key), np.int64))
            row = np.zeros((1, self.vocab_size), bool)
            row[0, self.ids[-1]] = True
            self.table = np.concatenate([self.table, row])
        return self._index[key]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens left out and spaces as they are."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that `decode` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(getattr(tokenizer, "all_special_ids", ())) | {number for number, token in added.items() if token.special}


def special_id(tokenizer: Any, text: str) -> int | None:
    """The token that a text is where it is a special one, which `decode` leaves out; else None."""
    number = tokenizer.convert_tokens_to_ids(text) if hasattr(tokenizer, "convert_tokens_to_ids") else None
    known = isinstance(number, int) and number in special_ids(tokenizer) and tokenizer.convert_ids_to_tokens(number) == text
    return number if known else None


def first_stop(text: str, stops: Sequence[str], seen: int = 0) -> tuple[int, str] | None:
    """(position, string) of the stop string that begins first, of those that end behind the first `seen` characters; the longer
    one when two begin together."""
    found = [(at, -len(stop), stop) for stop in stops if (at := text.find(stop, max(0, seen - len(stop) + 1))) >= 0]
    if not found:
        return None
    at, _, stop = min(found)
    return at, stop


class StopScanner:
    """Looks for stop strings in a growing completion, reading each token about once.

    Only a short tail is decoded a token: from the last token whose text is settled. Bytes of an unfinished character come
    out of a decoder as U+FFFD and wait for the rest.

    Args:
        tokenizer: decodes the ids.
        stops: the strings.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops, self.special = tokenizer, stops, special_ids(tokenizer)
        self.ids: list[int] = []  # those that have text: behind a special token alone a decoder drops a piece's leading space
        self.text = ""
        self._seen = 0  # characters in which every stop string has been reported
        self._prefix = self._read = 0  # ids[prefix:read] is settled text that the next tokens are decoded together with

    def push(self, token: int) -> str | None:
        """Reads one more token; returns the stop string that it completes, if any."""
        if token in self.special:
            return None
        self.ids.append(token)
        before = decode(self.tokenizer, self.ids[self._prefix : self._read])
        after = decode(self.tokenizer, self.ids[self._prefix :])
        new = after[len(before) :]
        seen = self.text + new.rstrip("\ufffd")
        stop = first_stop(seen, self.stops, self._seen)
        self._seen = len(seen)
        if not new.endswith("\ufffd") or len(self.ids) - self._read > MAX_PENDING:
            self.text += new
            self._prefix, self._read = self._read, len(self.ids)
        return stop[1] if stop else None
