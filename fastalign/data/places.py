"""Where a reward model's score is read, in token ids."""

from __future__ import annotations

from collections.abc import Sequence


def read_place(ids: Sequence[int], pad_token_id: int | None) -> int:
    """The index of the last token that is no padding, where transformers' sequence classifiers read; 0 where all are."""
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] != pad_token_id), 0)
