"""Records of several sources: each source's words put in front of the prompt, and its weight on the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .chat import Message, read_messages
from .encoders import weight_of
from .records import BadRecord, DataError, Record

COLUMN = "source"


def parse_sources(flag: str, entries: Sequence[str]) -> dict[str, str]:
    """["gpt4=1", "gpt3=0.1"] as {"gpt4": "1", "gpt3": "0.1"}.

    Raises:
        DataError: an entry that is not NAME=VALUE, or a name given twice.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name or not equals:
            raise DataError(f"{flag}: expected NAME=VALUE, as in gpt4=1, got {entry!r}")
        if name in found:
            raise DataError(f"{flag}: source {name!r} is given twice, {found[name]!r} and {value!r}")
        found[name] = value
    return found


def conditioned(records: Sequence[Record], weights: Mapping[str, float], prefixes: Mapping[str, str]) -> list[Record]:
    """C-RLFT (arXiv:2309.11235) as data: Σ weight(source) · -log p(completion | source's prefix, prompt).

    Args:
        records: with a column `source`.
        weights: source → what its records weigh, times their own `weight`; empty: 1 each.
        prefixes: source → text in front of the prompt (of a conversation: of its first user message); empty: none.

    Returns:
        Records of the same lines. One without a source that is listed is a bad record.
    """
    return [_conditioned(record, weights, prefixes) for record in records]


def _conditioned(record: Record, weights: Mapping[str, float], prefixes: Mapping[str, str]) -> Record:
    if record.error:
        return record
    try:
        name = record.text(COLUMN)
        for known in filter(None, (weights, prefixes)):
            if name not in known:
                raise record.bad("unknown source", f"expected one of the sources {sorted(known)} in column {COLUMN!r}, got {name!r}")
        columns = dict(record)
        if weights:
            columns["weight"] = weight_of(record) * weights[name]
        if prefixes:
            column = next((c for c in ("prompt", "messages", "text") if c in record), "prompt")
            columns[column] = _prefixed(record, column, prefixes[name])
    except BadRecord as error:
        return Record({}, record.source, record.line, f"{error.reason}: {str(error).removeprefix(record.where + ': ')}")
    return Record(columns, record.source, record.line)


def _prefixed(record: Record, column: str, prefix: str) -> Any:
    value = record.require(column)
    if column != "messages" and isinstance(value, str):
        return prefix + value
    messages: list[Message] = [dict(message) for message in read_messages(record, column)]
    first = next((message for message in messages if message["role"] == "user" and isinstance(message["content"], str)), None)
    if first is None:
        raise record.bad("wrong type", f"expected a user message of text in column {column!r}, to put the source's prefix in front of")
    first["content"] = prefix + first["content"]
    return messages
