"""From a chunk of records to ids: chunks, because tokenizers are several times faster on a list than on one text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from .chat import ChatEncoder, Message, read_messages
from .records import BadRecord, DataError, Record
from .tokens import TextEncoder

Scored = tuple[list[int], list[bool]]
Prompted = tuple[list[int], str | list[Message]]

_FORMATS: tuple[tuple[str, ...], ...] = (("prompt", "completion"), ("messages",), ("text",))
T = TypeVar("T")

_CHUNK = 1024


def in_chunks(records: Sequence[Record], encode: Callable[[Sequence[Record]], list[T]]) -> Iterator[T]:
    """What `encode` makes of each record, in order."""
    for begin in range(0, len(records), _CHUNK):
        yield from encode(records[begin : begin + _CHUNK])


def supervised_format(records: Sequence[Record]) -> tuple[str, ...]:
    """The columns of the supervised format that most records have; where none is complete, of one that is begun."""
    counts = {columns: sum(all(c in r for c in columns) for r in records) for columns in _FORMATS}
    best = max(_FORMATS, key=lambda columns: counts[columns])
    if counts[best]:
        return best
    begun = (columns for columns in _FORMATS if any(c in r for r in records for c in columns))
    return next(begun, _FORMATS[0])


def weight_of(record: Record) -> float:
    """The loss weight of a supervised record, 1 where it has none. Raises BadRecord when it is no finite number >= 0."""
    value = record.get("weight")
    if value is None:
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise record.bad("wrong type", f"expected a finite number >= 0 in column 'weight', got {value!r}")
    return weight


class _Encoder:
    """What the encoders share: the tokenizer's two faces and the system prompt."""

    def __init__(self, tokenizer: Any, system_prompt: str) -> None:
        self.text = TextEncoder(tokenizer)
        self.chat = ChatEncoder(tokenizer)
        self.system_prompt = system_prompt

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The messages behind the system prompt, unless they have a system message of their own."""
        if not self.system_prompt or messages[0]["role"] in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def plain(self, record: Record, column: str) -> str:
        """The column as plain text, for which there can be no system prompt."""
        text = record.text(column)
        if self.system_prompt and column == "prompt":
            raise DataError(
                f"{record.where}: --system_prompt needs conversations ([{{role, content}}]), but this prompt is plain text; "
                "write it into the prompts or make them conversations"
            )
        return text

    @staticmethod
    def check_read(record: Record) -> None:
        """Raises what the reader noted about a line that it could not read."""
        if record.error:
            raise record.bad(record.error.partition(":")[0], record.error)


class SupervisedEncoder(_Encoder):
    """Ids and scored flags of records in one of the supervised formats.

    Args:
        tokenizer: a transformers tokenizer.
        columns: the format, from `supervised_format`, or ("prompt", whatever column holds what is scored).
        system_prompt: put before conversations.
    """

    def __init__(self, tokenizer: Any, columns: tuple[str, ...], system_prompt: str = "") -> None:
        super().__init__(tokenizer, system_prompt)
        self.columns = columns

    def __call__(self, records: Sequence[Record]) -> list[Scored | BadRecord]:
        results: list[Scored | BadRecord | None] = [None] * len(records)
        plain: list[tuple[int, str, str]] = []
        for i, record in enumerate(records):
            try:
                self.check_read(record)
                weight_of(record)
                if self.columns == ("messages",):
                    results[i] = self.chat.conversation(record, self.with_system(read_messages(record, "messages")))
                elif self.columns[0] == "prompt" and isinstance(record.require("prompt"), list):
                    results[i] = self._conversational(record)
                else:
                    plain.append((i, *self._texts(record)))
            except BadRecord as error:
                results[i] = error
        encode = self._encode_texts if self.columns == ("text",) else self._encode_pairs
        for (i, _, _), result in zip(plain, encode(records, plain), strict=True):
            results[i] = result
        return [result for result in results if result is not None]

    def _conversational(self, record: Record) -> Scored:
        prompt, completion = self.with_system(read_messages(record, "prompt")), read_messages(record, self.columns[-1])
        return self.chat.conversation(record, [*prompt, *completion], scored_from=len(prompt))

    def _texts(self, record: Record) -> tuple[str, str]:
        prompt = "" if self.columns == ("text",) else self.plain(record, "prompt")
        completion = self.plain(record, self.columns[-1])
        if not completion.strip():
            raise record.bad(f"empty {self.columns[-1]}", f"expected text in column {self.columns[-1]!r}, got {completion!r}")
        return prompt, completion

    def _encode_texts(self, records: Sequence[Record], plain: list[tuple[int, str, str]]) -> list[Scored | BadRecord]:
        return [(ids, [True] * len(ids)) for ids in self.text.texts([text for _, _, text in plain])]

    def _encode_pairs(self, records: Sequence[Record], plain: list[tuple[int, str, str]]) -> list[Scored | BadRecord]:
        prompts = self.text.prompts([prompt for _, prompt, _ in plain])
        completions = self.text.completions([completion for _, _, completion in plain])
        results: list[Scored | BadRecord] = []
        for (i, _, _), prompt, completion in zip(plain, prompts, completions, strict=True):
            if completion is None:
                message = "the tokenizer merges the completion's first characters with any before them; begin it otherwise"
                results.append(records[i].bad("no exact mask", message))
            else:
                results.append((prompt + completion, [False] * len(prompt) + [True] * len(completion)))
        return results


class PromptEncoder(_Encoder):
    """Ids of `prompt`, and the prompt as the rewards see it."""

    def __call__(self, records: Sequence[Record]) -> list[Prompted | BadRecord]:
        results: list[Prompted | BadRecord | None] = [None] * len(records)
        plain: list[tuple[int, str]] = []
        for i, record in enumerate(records):
            try:
                self.check_read(record)
                if isinstance(record.require("prompt"), list):
                    messages = self.with_system(read_messages(record, "prompt"))
                    results[i] = self.chat.prompt(record, messages), messages
                else:
                    plain.append((i, self.plain(record, "prompt")))
            except BadRecord as error:
                results[i] = error
        for (i, text), ids in zip(plain, self.text.prompts([text for _, text in plain]), strict=True):
            empty = records[i].bad("empty prompt", "expected a prompt of at least one token, got none")
            results[i] = (ids, text) if ids else empty
        return [result for result in results if result is not None]
