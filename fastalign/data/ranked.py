"""Prompts with several completions and a score each: what losses of rankings read, as token trees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..packing import Segment
from .encoders import SupervisedEncoder
from .examples import Limits, _finish, _good
from .records import BadRecord, DataError, Record, Skips

_COLUMNS = ("prompt", "completion")


@dataclass(frozen=True)
class Ranked:
    """A prompt's group.

    Attributes:
        segment: the prompt, with the completions as its children.
        scores: one a completion, higher is better.
    """

    segment: Segment
    scores: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that a forward pass computes, the prompt counted once."""
        return self.segment.num_tokens


def ranked_examples(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    on_bad_record: str = "error",
    system_prompt: str = "",
    vocab_size: int | None = None,
) -> list[Ranked]:
    """Records of `prompt`, `completions` (two or more, plain or conversational) and `scores` (a finite number each).

    Args, errors: as in `sft_examples`; `max_length` is that of the prompt and its longest completion.
    """
    if max_length < 2:
        raise DataError(f"--max_length: expected at least 2 tokens, got {max_length}")
    encode = _RankedEncoder(SupervisedEncoder(tokenizer, _COLUMNS, system_prompt))
    limits, skips = _EachPath(max_length, "--max_length", vocab_size), Skips(on_bad_record)
    found = [Ranked(segment, scores) for _, (_, segment, scores) in _good(records, encode, limits, skips)]
    _finish(skips, len(records), len(found))
    return found


class _EachPath(Limits):
    """The limits of every root-to-leaf path."""

    def check(self, record: Record, ids: Sequence[Any]) -> None:
        for path in ids:
            super().check(record, path)


class _RankedEncoder:
    """(every path's ids, the tree, the scores) of a record. A completion is encoded as supervised training would encode it."""

    def __init__(self, encoder: SupervisedEncoder) -> None:
        self.encoder = encoder

    def __call__(self, records: Sequence[Record]) -> list[tuple[list[list[int]], Segment, tuple[float, ...]] | BadRecord]:
        results: list[Any] = []
        for record in records:
            try:
                results.append(self._encode(record))
            except BadRecord as error:
                results.append(error)
        return results

    def _encode(self, record: Record) -> tuple[list[list[int]], Segment, tuple[float, ...]]:
        self.encoder.check_read(record)
        completions, scores = _completions(record), _scores(record)
        if len(completions) != len(scores):
            raise record.bad("wrong type", f"expected a score a completion, got {len(scores)} for {len(completions)} completions")
        rest = {name: value for name, value in record.items() if name not in ("completions", "scores")}
        found = self.encoder([Record({**rest, "completion": c}, record.source, record.line) for c in completions])
        paths, flags = [], []
        for one in found:
            if isinstance(one, BadRecord):
                raise one
            paths.append(one[0])
            flags.append(one[1])
        start = flags[0].index(True)
        if any(path[:start] != paths[0][:start] or True in mask[:start] for path, mask in zip(paths, flags, strict=True)):
            raise record.bad("no exact mask", "the prompt's tokens differ with the completion that follows")
        children = tuple(Segment(path[start:], mask[start:]) for path, mask in zip(paths, flags, strict=True))
        return paths, Segment(paths[0][:start], False, children), scores


def _completions(record: Record) -> list[Any]:
    value = record.require("completions")
    if not isinstance(value, list) or len(value) < 2:
        raise record.bad("wrong type", f"expected two or more in column 'completions', got {str(value)[:80]}")
    if record.get("weight") is not None:
        raise record.bad("wrong type", "a ranking has scores and no 'weight'; remove the column or rename it with --dataset_map")
    return value


def _scores(record: Record) -> tuple[float, ...]:
    value = record.require("scores")
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise record.bad("wrong type", f"expected finite numbers in column 'scores', got {str(value)[:80]}")
    return tuple(float(number) for number in numbers)
