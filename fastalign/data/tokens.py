"""Plain text to token ids, with a boundary between prompt and completion that is exact.

Prompt and completion are tokenized apart and their ids concatenated, so the prompt's ids in training are those that
generation starts from, whatever the completion is. A joint tokenization would merge characters across the boundary.

Some tokenizers put a space before any text (SentencePiece's "▁" as a normalizer, or add_prefix_space). On a completion
tokenized apart that space would come between prompt and completion, though the data has none there. Such tokenizers are
recognized by a probe, and the completion is then tokenized behind a sentinel character whose ids are cut off again:
the ids decode to exactly prompt + completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .records import DataError

_SENTINELS = ("\n", "|", ".", "a")


class TextEncoder:
    """Turns plain prompts, completions and texts into ids.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.adds_space = self._adds_space()

    def _adds_space(self) -> bool:
        alone, behind, sentinel = (self._encode([text])[0] for text in ("a", "\na", "\n"))
        return behind != sentinel + alone and behind[: len(sentinel)] == sentinel

    def _encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"] if texts else []

    @property
    def eos(self) -> int:
        """The id that ends a text. Raises DataError when the tokenizer has none."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError("the tokenizer has no EOS token, so a completion has no end to learn; set eos_token in tokenizer_config.json")
        return eos

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with the special tokens that the tokenizer puts in front (BOS), without those that it puts behind."""
        encoded = self._encode(texts, special=True)
        eos = self.tokenizer.eos_token_id
        for i, ids in enumerate(encoded):
            if ids and ids[-1] == eos and self._encode([texts[i]])[0][-1:] != [eos]:
                encoded[i] = ids[:-1]  # a tokenizer that closes every text: the completion goes on from here
        return encoded

    def completions(self, texts: Sequence[str]) -> list[list[int] | None]:
        """Ids without special tokens, EOS appended unless the text ends with it. None where the tokenizer cannot be cut exactly."""
        return [None if ids is None else self._ended(ids) for ids in self.pieces(texts)]

    def pieces(self, texts: Sequence[str]) -> list[list[int] | None]:
        """Ids of what goes on from a text and is gone on from: no special tokens, no EOS. None as `completions`."""
        return self._behind(texts, _SENTINELS) if self.adds_space else list(self._encode(texts))

    def _behind(self, texts: Sequence[str], sentinels: Sequence[str]) -> list[list[int] | None]:
        if not texts or not sentinels:
            return [None] * len(texts)
        head = self._encode([sentinels[0]])[0]
        encoded = self._encode([sentinels[0] + text for text in texts])
        found: list[list[int] | None] = [ids[len(head) :] if ids[: len(head)] == head else None for ids in encoded]
        merged = [i for i, ids in enumerate(found) if ids is None]  # the sentinel merged with the text: try another
        for i, ids in zip(merged, self._behind([texts[i] for i in merged], sentinels[1:]), strict=True):
            found[i] = ids
        return found

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Whole documents: special tokens as the tokenizer puts them, EOS appended unless it is there."""
        return [self._ended(ids) for ids in self._encode(texts, special=True)]

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self.eos else [*ids, self.eos]
