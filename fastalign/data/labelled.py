"""Completions that are desirable or not: records with a label, or preference records taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..packing import Segment
from .encoders import Scored, SupervisedEncoder, in_chunks
from .examples import _finish
from .pairs import Bounds, PairEncoder, completion, first_scored
from .records import BadRecord, Record, Skips

Labelled = tuple[Scored, bool]
_WORDS = {"true": True, "false": False}  # CSV has no booleans


@dataclass(frozen=True)
class Completions:
    """What unpaired preference optimization reads.

    Attributes:
        prompts: [B] token ids, the generation prompt included.
        completions: [B] unpacked segments without a parent, scored as they are.
        labels: [B] True for a desirable completion.
        num_records: records read.
        num_skipped: bad records left out.
        skipped_reasons: how many for each reason.
    """

    prompts: list[list[int]]
    completions: list[Segment]
    labels: list[bool]
    num_records: int = 0
    num_skipped: int = 0
    skipped_reasons: dict[str, int] = field(default_factory=dict)

    def tree(self, index: int) -> Segment:
        """A prompt and its own completion."""
        return self.behind(index, index)

    def behind(self, index: int, other: int) -> Segment:
        """The prompt of one and the completion of another."""
        return Segment(self.prompts[index], False, (self.completions[other],))


def labelled_examples(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int = 0,
    on_bad_record: str = "error",
    system_prompt: str = "",
    vocab_size: int | None = None,
) -> Completions:
    """Records of `prompt`, `completion` and `label` (true: desirable), or of `chosen` and `rejected` as `pair_examples` reads them.

    The format is the one that more records have. A preference record becomes two: its chosen completion, desirable, and then its
    rejected one, undesirable.

    Args:
        as in `pair_examples`.

    Raises:
        BadRecord: naming file and line. DataError: for a tokenizer or arguments that fit no record, or when none is left.
    """
    limits = Bounds(max_length, max_prompt_length, vocab_size)
    pairs = sum("chosen" in r and "rejected" in r for r in records) > sum("completion" in r for r in records)
    encode = _Apart(tokenizer, system_prompt) if pairs else _Together(tokenizer, system_prompt)
    skips, found = Skips(on_bad_record), Completions([], [], [])
    for record, result in zip(records, in_chunks(records, encode), strict=True):
        try:
            if isinstance(result, BadRecord):
                raise result
            for side, _ in result:
                limits.check(record, side)
        except BadRecord as error:
            skips.report(error)
            continue
        for side, label in result:
            _append(found, side, label)
    _finish(skips, len(records), len(found.labels))
    counts = (len(records), skips.reasons.total(), dict(skips.reasons))
    return Completions(found.prompts, found.completions, found.labels, *counts)


def label_of(record: Record) -> bool:
    """The record's label. Raises BadRecord when it is missing or no boolean."""
    value = record.require("label")
    label = _WORDS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(label, bool):
        raise record.bad("wrong type", f"expected true or false in column 'label', got {type(value).__name__} {value!r}")
    return label


def partners(prompts: Sequence[Sequence[int]], window: int) -> list[int | None]:
    """For each record another one with a different prompt, whose completion makes a mismatched pair with this prompt.

    It is the one before, in rotation within windows of `window` records (TRL's batches in the file's order), going further back
    where the prompts are equal, and beyond the window where all of its prompts are; None where all prompts of the data are equal.
    """
    keys = [tuple(prompt) for prompt in prompts]
    if len(set(keys)) < 2:
        return [None] * len(keys)
    found: list[int | None] = []
    for i, key in enumerate(keys):
        start = i - i % window
        inside = list(range(start, min(start + window, len(keys))))
        turn = i - start
        order = [*reversed(inside[:turn]), *reversed(inside[turn + 1 :])]
        found.append(next((j for j in order if keys[j] != key), None))
    return [_beyond(keys, i) if j is None else j for i, j in enumerate(found)]


def _beyond(keys: Sequence[tuple[int, ...]], index: int) -> int:
    return next(j for step in range(1, len(keys)) if keys[j := (index - step) % len(keys)] != keys[index])


def _append(found: Completions, side: Scored, label: bool) -> None:
    begin = first_scored(side)
    found.prompts.append(side[0][:begin])
    found.completions.append(completion(side, begin))
    found.labels.append(label)


class _Together:
    """Records that are one completion each."""

    def __init__(self, tokenizer: Any, system_prompt: str) -> None:
        self.encode = SupervisedEncoder(tokenizer, ("prompt", "completion"), system_prompt)

    def __call__(self, records: Sequence[Record]) -> list[list[Labelled] | BadRecord]:
        results: list[list[Labelled] | BadRecord] = []
        for record, side in zip(records, self.encode(records), strict=True):
            try:
                results.append(side if isinstance(side, BadRecord) else [(side, label_of(record))])
            except BadRecord as error:
                results.append(error)
        return results


class _Apart:
    """Preference records, taken apart."""

    def __init__(self, tokenizer: Any, system_prompt: str) -> None:
        self.encode = PairEncoder(tokenizer, system_prompt)

    def __call__(self, records: Sequence[Record]) -> list[list[Labelled] | BadRecord]:
        return [r if isinstance(r, BadRecord) else [(r[0], True), (r[1], False)] for r in self.encode(records)]
