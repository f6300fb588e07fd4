"""Single tokens as clients are shown them: their bytes and their text."""

from __future__ import annotations

import json
import re
from typing import Any

from fastalign.generation.text import GrowingText

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of_letter() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class TokenNames:
    """Bytes and text of a tokenizer's tokens, each found once.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        self._letters = _byte_of_letter() if "ByteLevel" in _decoders(tokenizer) else {}
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for within a text; special tokens stand for their name."""
        if token not in self._known:
            self._known[token] = self._bytes(token)
        return self._known[token]

    def text_of(self, token: int) -> str:
        """The token's text; U+FFFD in it where a character is cut."""
        return self.bytes_of(token).decode(errors="replace")

    def key_of(self, token: int) -> str:
        """The token's text, or, where it cuts a character, its bytes: bytes:\\xe2\\x82."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def offsets(self, growing: GrowingText, ids: list[int], base: int) -> list[int]:
        """Where each of the next ids begins in the text that `growing` makes, `base` characters on."""
        offsets = []
        for token in ids:
            offsets.append(base + growing.given)
            growing.push([token])
        return offsets

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # the model has more rows than the tokenizer tokens
            return b""
        if self._letters and all(letter in self._letters for letter in piece):
            return bytes(self._letters[letter] for letter in piece)
        found = _BYTE.fullmatch(piece)
        if found:
            return bytes([int(found[1], 16)])
        return piece.replace("\u2581", " ").encode()


def _decoders(tokenizer: Any) -> set[str]:
    """The kinds of decoder that a fast tokenizer is made of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in (decoder, *decoder.get("decoders", ()))}
