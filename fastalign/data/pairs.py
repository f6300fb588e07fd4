"""Preference records as token trees: the prompt once, the chosen and the rejected completion below it.

The tree's root is what both sequences begin with, up to the first scored token of either. Where a chat template writes the
two prompts differently, the root ends at the first difference and the rest of each prompt stands, unscored, before its
completion: both sequences are exactly what the template makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..packing import Segment
from .encoders import Scored, SupervisedEncoder, in_chunks
from .examples import Limits, _finish
from .records import BadRecord, DataError, Record, Skips

Paired = tuple[Scored, Scored]


@dataclass(frozen=True)
class Pairs:
    """What preference optimization reads.

    Attributes:
        trees: one a pair; the root's children are the chosen and the rejected completion, in this order.
        margins: [pairs] what each pair's rewards must differ by, 0 where a record has none; None: no record has one.
        probabilities: [pairs] how probable it is that the chosen completion is the better one, 1 where a record does not say; None: no
            record does.
        indices: which record each came from.
        num_skipped: bad records left out.
        skipped_reasons: how many for each reason.
    """

    trees: list[Segment]
    margins: list[float] | None = None
    probabilities: list[float] | None = None
    indices: list[int] = field(default_factory=list)
    num_skipped: int = 0
    skipped_reasons: dict[str, int] = field(default_factory=dict)


class PairEncoder:
    """Ids and scored flags of the prompt with the chosen and with the rejected completion.

    Args:
        tokenizer: a transformers tokenizer.
        system_prompt: put before conversations.
    """

    def __init__(self, tokenizer: Any, system_prompt: str = "") -> None:
        self.sides = [SupervisedEncoder(tokenizer, ("prompt", column), system_prompt) for column in ("chosen", "rejected")]

    def __call__(self, records: Sequence[Record]) -> list[Paired | BadRecord]:
        prompted = [_tried(with_prompt, record) for record in records]
        good = [record for record in prompted if isinstance(record, Record)]
        encoded = iter(zip(*(encode(good) for encode in self.sides), strict=True))
        return [_both(*next(encoded)) if isinstance(record, Record) else record for record in prompted]


def pair_examples(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int = 0,
    on_bad_record: str = "error",
    system_prompt: str = "",
    vocab_size: int | None = None,
) -> Pairs:
    """Records of `chosen`, `rejected` and, where it is a column, `prompt`; plain or conversational; with an optional `margin` or
    `probability`.

    Without a prompt column the prompt is what both begin with: their common messages, or the common text up to its last white
    space. Only the completions are scored (of conversational ones, what the assistant wrote).

    Args:
        records: from `load_records`.
        max_length: longest sequence in tokens, prompt and completion; a longer record is a bad one, never cut.
        max_prompt_length: longest prompt in tokens; 0: no limit of its own.
        tokenizer, on_bad_record, system_prompt, vocab_size: as in `sft_examples`.

    Raises:
        BadRecord: naming file and line. DataError: for a tokenizer or arguments that fit no record, or when none is left.
    """
    limits = Bounds(max_length, max_prompt_length, vocab_size)
    skips, trees, indices = Skips(on_bad_record), [], []
    margins: list[float] = []
    probabilities: list[float] = []
    for index, (record, result) in enumerate(zip(records, in_chunks(records, PairEncoder(tokenizer, system_prompt)), strict=True)):
        try:
            if isinstance(result, BadRecord):
                raise result
            for side in result:
                limits.check(record, side)
            margin, probability = margin_of(record), probability_of(record)
            margins.append(margin)
            probabilities.append(probability)
            trees.append(pair_tree(*result))
            indices.append(index)
        except BadRecord as error:
            skips.report(error)
    _finish(skips, len(records), len(trees))
    have_margin, have_probability = (any(records[index].get(name) is not None for index in indices) for name in ("margin", "probability"))
    read = (margins if have_margin else None, probabilities if have_probability else None)
    return Pairs(trees, *read, indices, skips.reasons.total(), dict(skips.reasons))


def pair_tree(chosen: Scored, rejected: Scored) -> Segment:
    """The token tree of a pair."""
    most = min(first_scored(chosen), first_scored(rejected))
    shared = next((i for i, (a, b) in enumerate(zip(chosen[0], rejected[0], strict=False)) if a != b or i == most), most)
    return Segment(chosen[0][:shared], False, (completion(chosen, shared), completion(rejected, shared)))


def completion(side: Scored, begin: int) -> Segment:
    """A sequence from token `begin` to its last scored one: what follows that (a template's line end) predicts nothing."""
    ids, flags = side
    end = len(flags) - flags[::-1].index(True)
    return Segment(ids[begin:end], True if all(flags[begin:end]) else flags[begin:end])


def first_scored(side: Scored) -> int:
    """Where the completion begins; the number of tokens where nothing is scored."""
    return side[1].index(True) if True in side[1] else len(side[0])


@dataclass(frozen=True)
class Bounds:
    """The limits of a prompt and its completion.

    Raises:
        DataError: a limit that no record can keep.
    """

    max_length: int
    max_prompt_length: int
    vocab_size: int | None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise DataError(f"--max_length: expected at least 2 tokens, got {self.max_length}")
        if self.max_prompt_length < 0:
            raise DataError(f"--max_prompt_length: expected at least 0 tokens (0: no limit), got {self.max_prompt_length}")

    def check(self, record: Record, side: Scored) -> None:
        """Raises BadRecord for a sequence that is too long, over the vocabulary, or has no token to score."""
        ids, flags = side
        Limits(self.max_length, "--max_length", self.vocab_size).check(record, ids)
        Limits(self.max_prompt_length, "--max_prompt_length", None).check(record, ids[: first_scored(side)])
        if not any(flags[1:]):
            raise record.bad("empty completion", "expected a completion with a token to score (without a prompt, behind its first one)")


def margin_of(record: Record) -> float:
    """The record's margin, 0 where it has none. Raises BadRecord when it is no finite number."""
    margin = _number(record, "margin", 0.0)
    if not math.isfinite(margin):
        raise record.bad("wrong type", f"expected a finite number in column 'margin', got {record['margin']!r}")
    return margin


def probability_of(record: Record) -> float:
    """How probable it is that the chosen completion is the better one, 1 where the record does not say. Raises BadRecord."""
    probability = _number(record, "probability", 1.0)
    if not 0 <= probability <= 1:
        raise record.bad("wrong type", f"expected a number from 0 to 1 in column 'probability', got {record['probability']!r}")
    return probability


def _number(record: Record, column: str, absent: float) -> float:
    """NaN for what is no number."""
    value = record.get(column)
    if value is None:
        return absent
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def with_prompt(record: Record) -> Record:
    """The record, its prompt taken out of chosen and rejected where it has no column of its own.

    Raises:
        BadRecord: chosen and rejected are of different kinds, or have no prompt in common.
    """
    if record.error or "prompt" in record:
        return record
    chosen, rejected = record.require("chosen"), record.require("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _common_text(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        cut = _common_messages(record, chosen, rejected)
    else:
        kinds = f"{type(chosen).__name__} and {type(rejected).__name__}"
        raise record.bad("wrong type", f"expected text or messages in both of 'chosen' and 'rejected', got {kinds}")
    split = {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
    return Record({**record, **split}, record.source, record.line)


def _common_messages(record: Record, chosen: list[Any], rejected: list[Any]) -> int:
    """How many messages both begin with, leaving each its last."""
    most = max(min(len(chosen), len(rejected)) - 1, 0)
    common = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    if not common:
        raise record.bad("no prompt", "'chosen' and 'rejected' have no message in common at their beginning; give a column 'prompt'")
    return common


def _common_text(chosen: str, rejected: str) -> int:
    """Where both texts part, moved back to the white space before: no word is cut in two."""
    shorter = min(len(chosen), len(rejected))
    cut = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while cut and not chosen[cut - 1 : cut].isspace():
        cut -= 1
    return max(cut - 1, 0)


def _tried(act: Callable[[Record], Record], record: Record) -> Record | BadRecord:
    try:
        return act(record)
    except BadRecord as error:
        return error


def _both(chosen: Scored | BadRecord, rejected: Scored | BadRecord) -> Paired | BadRecord:
    if isinstance(chosen, BadRecord):
        return chosen
    return rejected if isinstance(rejected, BadRecord) else (chosen, rejected)
