"""Rankings, outcomes and grades for reward models: pairs, answers best first, answers right or wrong, answers with several grades."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .candidates import CandidateEncoder, Judged, Sequences, judged, label_of, limits_of, shared_tree
from .examples import Limits
from .pairs import margin_of, probability_of
from .places import read_place
from .records import DataError, Record

_PAIR = ("chosen", "rejected")


def ranking_examples(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    on_bad_record: str = "error",
    system_prompt: str = "",
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
) -> list[Judged]:
    """Records of `chosen` and `rejected` or of `completions`, best first, each with an optional `prompt`,
    `margin` and `probability` (a soft label).

    Args:
        records: from `load_records`; plain or conversational. Without `prompt` the answers are whole texts or conversations.
        tokenizer: the reward model's.
        max_length: longest sequence in tokens, prompt and answer together; a longer record is a bad one, never cut.
        on_bad_record: "error" raises at the first bad record, "skip" leaves it out and counts it.
        system_prompt: put before conversations that have no system message.
        vocab_size: rows of the model's embedding; None: not checked.
        pad_token_id: the model's; a score is read at the last token that is none.

    Raises:
        BadRecord: naming file and line. DataError: for arguments that fit no record, or when none is left.
    """
    encoder = CandidateEncoder(tokenizer, system_prompt)
    _check_columns(records, "rankings", _PAIR, ("completions",))
    if any("labels" in record and _PAIR[0] not in record for record in records):
        raise DataError(f"{records[0].where}: rankings have no column 'labels'; completions with labels are steps: give --loss process")

    def make(record: Record, sequences: Sequences) -> Judged:
        tree, places = shared_tree(sequences, [read_place(ids, pad_token_id) for ids in sequences])
        return Judged(tree, places, margin=margin_of(record), probability=probability_of(record))

    return judged(
        records,
        lambda chunk: encoder.encode(chunk, _ranked),
        make,
        limits=limits_of(max_length, vocab_size),
        on_bad_record=on_bad_record,
    )


def outcome_examples(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    on_bad_record: str = "error",
    system_prompt: str = "",
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
) -> list[Judged]:
    """Records of `completion` and `label` (right or wrong), with an optional `prompt`. Arguments as `ranking_examples`."""
    _check_columns(records, "outcomes", ("completion", "label"))

    def labels(record: Record) -> tuple[float, ...]:
        return (label_of(record, "label", record.require("label")),)

    limits = limits_of(max_length, vocab_size)
    return _single(records, CandidateEncoder(tokenizer, system_prompt), labels, pad_token_id, limits, on_bad_record)


def attribute_examples(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    on_bad_record: str = "error",
    system_prompt: str = "",
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    attributes: Sequence[str],
) -> list[Judged]:
    """Records of `completion` and one column of numbers an attribute, with an optional `prompt`. Arguments as `ranking_examples`.

    Args:
        attributes: the columns, each there in some record. One that a record lacks, or has as null, is not learned from it; a record
            without any is a bad one.
    """
    _check_columns(records, "graded answers", ("completion",))
    for name in attributes:
        _check_columns(records, "graded answers", (name,))

    def grades(record: Record) -> tuple[float, ...]:
        found = tuple(_grade(record, name) for name in attributes)
        if all(math.isnan(grade) for grade in found):
            raise record.bad("no grade", f"expected a number in one of the columns {', '.join(attributes)}, got none")
        return found

    limits = limits_of(max_length, vocab_size)
    return _single(records, CandidateEncoder(tokenizer, system_prompt), grades, pad_token_id, limits, on_bad_record)


def _single(
    records: Sequence[Record],
    encoder: CandidateEncoder,
    labels: Callable[[Record], tuple[float, ...]],
    pad_token_id: int | None,
    limits: Limits,
    on_bad_record: str,
) -> list[Judged]:
    """Records of one `completion`, with the labels that `labels` reads."""

    def make(record: Record, sequences: Sequences) -> Judged:
        tree, places = shared_tree(sequences, [read_place(ids, pad_token_id) for ids in sequences])
        return Judged(tree, places, labels(record))

    encode = partial(encoder.encode, read=lambda record: [record.require("completion")])
    return judged(records, encode, make, limits=limits, on_bad_record=on_bad_record)


def _grade(record: Record, name: str) -> float:
    """A finite number; NaN where the record has none. Raises BadRecord."""
    value = record.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise record.bad("wrong type", f"expected a number in column {name!r}, got {str(value)[:80]!r}")
    return number


def _ranked(record: Record) -> list[Any]:
    if "completions" not in record or any(column in record for column in _PAIR):
        return [record.require(column) for column in _PAIR]
    answers = record.require("completions")
    if not isinstance(answers, list):
        raise record.bad("wrong type", f"expected a list of answers in column 'completions', got {type(answers).__name__}")
    if len(answers) < 2:
        raise record.bad("too few answers", f"expected at least two answers, best first, in column 'completions', got {len(answers)}")
    return answers


def _check_columns(records: Sequence[Record], kind: str, *formats: tuple[str, ...]) -> None:
    """Raises DataError where no record has the columns at all: the data are of another kind."""
    readable = [record for record in records if not record.error]
    if readable and not any(all(c in record for c in columns) for record in readable for columns in formats):
        wanted = " or ".join(" + ".join(columns) for columns in formats)
        raise DataError(
            f"{readable[0].where}: {kind} need the columns {wanted}, got {list(readable[0])}; rename with --dataset_map theirs=ours, "
            "or choose the --loss that reads these data"
        )
