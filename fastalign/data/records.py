"""Records: rows of a data set that remember where they came from."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

logger = logging.getLogger("fastalign")

_SYNONYMS = {
    "prompt": ("question", "instruction", "input", "problem", "query"),
    "completion": ("answer", "response", "output", "solution", "chosen", "target"),
    "messages": ("conversation", "conversations", "chat", "dialog"),
    "text": ("content", "document", "story"),
}


class DataError(ValueError):
    """The data, or how it was asked for, is wrong."""


class BadRecord(DataError):
    """One record is wrong. `reason` is what skips are counted by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Record(dict[str, Any]):
    """A row by column, with its source and its line (text files) or row (tables), both counted from 1.

    A line that could not be read is a record without columns whose `error` says why; it is reported where records are
    turned into examples, so that one policy decides about every kind of bad record.
    """

    def __init__(self, columns: dict[str, Any], source: str, line: int, error: str = "") -> None:
        super().__init__(columns)
        self.source = source
        self.line = line
        self.error = error

    @property
    def where(self) -> str:
        """data.jsonl:17, as messages begin."""
        return f"{self.source}:{self.line}"

    def bad(self, reason: str, message: str) -> BadRecord:
        """The error to raise about this record."""
        return BadRecord(reason, f"{self.where}: {message}")

    def require(self, column: str) -> Any:
        """The column's value. Raises BadRecord when it is missing or null, naming the column that is most likely meant."""
        if self.get(column) is not None:
            return self[column]
        if column in self:
            raise self.bad("missing column", f"expected a value in column {column!r}, got null")
        near = nearest_column(column, list(self))
        remedy = f"; rename with --dataset_map {near}={column}" if near else ""
        raise self.bad("missing column", f"expected column {column!r}, got columns {list(self)}{remedy}")

    def text(self, column: str) -> str:
        """The column's value as text. Raises BadRecord when it is missing or no string."""
        value = self.require(column)
        if not isinstance(value, str):
            raise self.bad("wrong type", f"expected text in column {column!r}, got {type(value).__name__} {str(value)[:80]}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.bad("wrong type", f"column {column!r} is no text: half of a surrogate pair at character {error.start}") from error
        return value


def nearest_column(wanted: str, columns: Sequence[str]) -> str:
    """The column most likely meant by `wanted`: a usual synonym, else the nearest spelling, else ""."""
    found = [name for name in _SYNONYMS.get(wanted, ()) if name in columns]
    return (found or difflib.get_close_matches(wanted, columns, n=1) or [""])[0]


def parse_dataset_map(text: str) -> dict[str, str]:
    """Parses `--dataset_map question=prompt,answer=completion` into {theirs: ours}.

    Raises:
        DataError: for an entry that is not theirs=ours, or a name used twice.
    """
    columns: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        theirs, _, ours = (p.strip() for p in part.partition("="))
        if not theirs or not ours:
            raise DataError(f"--dataset_map: expected theirs=ours, comma-separated, got {part!r}")
        if theirs in columns or ours in columns.values():
            raise DataError(f"--dataset_map: a column can be renamed once, got {part!r} besides {columns}")
        columns[theirs] = ours
    return columns


def rename(records: list[Record], columns: dict[str, str]) -> list[Record]:
    """Renames columns, theirs to ours, in place.

    Raises:
        DataError: when no record has the column (with the nearest that exist), or a new name is a column already.
    """
    existing = columns_of(records)
    for theirs, ours in columns.items():
        if theirs not in existing:
            near = difflib.get_close_matches(theirs, existing, n=3, cutoff=0.5) or existing
            raise DataError(f"--dataset_map {theirs}={ours}: no column {theirs!r} in {_source(records)}; nearest are {near}")
        if ours in existing and ours not in columns:
            raise DataError(f"--dataset_map {theirs}={ours}: {_source(records)} has a column {ours!r} already; rename that one too")
    for record in records:
        renamed = {columns.get(name, name): value for name, value in record.items()}
        record.clear()
        record.update(renamed)
    return records


def columns_of(records: Iterable[Record]) -> list[str]:
    """All columns of the records, in order of appearance."""
    return list(dict.fromkeys(name for record in records for name in record))


def _source(records: Sequence[Record]) -> str:
    return records[0].source if records else "an empty data set"


OR_SKIP = " or give --on_bad_record skip"  # ends the advice in a bad record's message; not said to those who gave it
MAX_NAMED = 5  # bad records of one kind that are named in the log; the rest are counted


class Skips:
    """What to do with a bad record: raise it, or count it.

    Args:
        policy: "error" or "skip".
    """

    def __init__(self, policy: str) -> None:
        if policy not in ("error", "skip"):
            near = difflib.get_close_matches(str(policy), ("error", "skip"), n=1)
            raise DataError(f"--on_bad_record: expected error or skip, got {policy!r}" + (f"; did you mean {near[0]}?" if near else ""))
        self.policy = policy
        self.reasons: Counter[str] = Counter()

    def report(self, error: BadRecord) -> None:
        """Raises the error, or logs and counts it."""
        if self.policy == "error":
            raise error
        self.reasons[error.reason] += 1
        if self.reasons[error.reason] <= MAX_NAMED:
            more = "; further ones are only counted" if self.reasons[error.reason] == MAX_NAMED else ""
            logger.warning("skipped: %s%s", str(error).removesuffix(OR_SKIP), more)

    def summarize(self, total: int) -> None:
        """Logs how many records were skipped and why."""
        if self.reasons:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            logger.warning("skipped %d of %d records: %s", self.reasons.total(), total, reasons)
