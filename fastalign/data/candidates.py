"""Candidates: what a reward model reads. Answers to one prompt, as whole sequences that share the tokens they begin with alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..packing import Segment
from .chat import read_messages
from .encoders import _Encoder, in_chunks
from .examples import Limits, _finish
from .records import BadRecord, DataError, Record, Skips

Sequences = list[list[int]]


@dataclass(frozen=True)
class Judged:
    """What is judged together: one prompt and its answers, or the steps of one.

    Attributes:
        tree: the tokens; a root, and a child for each of several answers.
        places: (segment of the tree, offset in it) whose score is read, in the order of the data.
        labels: one a place; empty where the order itself is the label (rankings, best first); of graded answers one an attribute, NaN
            where the record states none.
        margin: by how much each better answer is to beat a worse one at least.
        probability: that a better answer is the better one.
        subset: what the record's column `subset` says, for evaluation.
        index: which record it came from.
    """

    tree: Segment
    places: tuple[tuple[int, int], ...]
    labels: tuple[float, ...] = ()
    margin: float = 0.0
    probability: float = 1.0
    subset: str = ""
    index: int = 0


def shared_tree(sequences: Sequence[Sequence[int]], ends: Sequence[int]) -> tuple[Segment, tuple[tuple[int, int], ...]]:
    """Sequences as one root of what all begin with, and a child each; with the places of token `ends[k]` of sequence k.

    The root stops before the first end, so that every place is its sequence's own.
    """
    if len(sequences) == 1:
        return Segment(list(sequences[0])), ((0, ends[0]),)
    shared, most = 0, min(ends)
    while shared < most and len({sequence[shared] for sequence in sequences}) == 1:
        shared += 1
    children = tuple(Segment(list(sequence[shared:])) for sequence in sequences)
    return Segment(list(sequences[0][:shared]), children=children), tuple((1 + k, end - shared) for k, end in enumerate(ends))


class CandidateEncoder(_Encoder):
    """Ids of whole sequences, prompt and answer, plain or conversational.

    Plain ones are the prompt's ids and the completion's, cut as in `tokens` and closed by EOS; without a prompt, the text's.
    Conversations are what the chat template makes of all messages.
    """

    def encode(self, records: Sequence[Record], read: Callable[[Record], list[Any]]) -> list[Sequences | BadRecord]:
        """The sequences of each record, or what is wrong with it.

        Args:
            read: a record → its answers, each text or messages; it raises BadRecord.
        """
        results: list[Sequences | BadRecord | None] = [None] * len(records)
        plain: list[tuple[int, str | None, list[str]]] = []
        for i, record in enumerate(records):
            try:
                self.check_read(record)
                answers = read(record)
                if isinstance(record.get("prompt"), list) or any(isinstance(answer, list) for answer in answers):
                    results[i] = [self._conversation(record, k, answer) for k, answer in enumerate(answers)]
                else:
                    prompt = self.plain(record, "prompt") if record.get("prompt") is not None else None
                    if prompt is None and self.system_prompt:
                        raise DataError(f"{record.where}: --system_prompt needs conversations ([{{role, content}}]), but these are texts")
                    plain.append((i, prompt, [_checked_text(record, answer) for answer in answers]))
            except BadRecord as error:
                results[i] = error
        for (i, _, _), result in zip(plain, self._texts(records, plain), strict=True):
            results[i] = result
        return [result for result in results if result is not None]

    def _conversation(self, record: Record, k: int, answer: Any) -> list[int]:
        turn = [{"role": "assistant", "content": _checked_text(record, answer)}] if isinstance(answer, str) else answer
        place = f"answer {k}"
        messages = read_messages(Record({place: turn}, record.source, record.line), place)
        if record.get("prompt") is not None:
            messages = [*read_messages(record, "prompt"), *messages]
        if messages[-1]["role"] != "assistant":
            raise record.bad("empty completion", f"{place}: expected a last message of the assistant, got role {messages[-1]['role']!r}")
        if isinstance(messages[-1].get("content"), str) and not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
            raise record.bad("empty completion", f"{place}: expected the assistant to say something, got nothing")
        return self.chat.whole(record, self.with_system(messages))

    def _texts(self, records: Sequence[Record], plain: list[tuple[int, str | None, list[str]]]) -> list[Sequences | BadRecord]:
        prompts = iter(self.text.prompts([prompt for _, prompt, _ in plain if prompt is not None]))
        completions = iter(self.text.completions([text for _, prompt, texts in plain if prompt is not None for text in texts]))
        whole = iter(self.text.texts([text for _, prompt, texts in plain if prompt is None for text in texts]))
        results: list[Sequences | BadRecord] = []
        for i, prompt, texts in plain:
            if prompt is None:
                results.append([next(whole) for _ in texts])
                continue
            begin, answers = next(prompts), [next(completions) for _ in texts]
            if any(answer is None for answer in answers):
                message = "the tokenizer merges the completion's first characters with any before them; begin it otherwise"
                results.append(records[i].bad("no exact mask", message))
            else:
                results.append([begin + answer for answer in answers if answer is not None])
        return results


def _checked_text(record: Record, answer: Any) -> str:
    if not isinstance(answer, str):
        raise record.bad("wrong type", f"expected an answer as text or messages, got {type(answer).__name__} {str(answer)[:80]}")
    if not answer.strip():
        raise record.bad("empty completion", f"expected an answer, got {answer!r}")
    return answer


def judged(
    records: Sequence[Record],
    encode: Callable[[Sequence[Record]], list[Any]],
    make: Callable[[Record, Any], Judged],
    *,
    limits: Limits,
    on_bad_record: str,
) -> list[Judged]:
    """The good records as `Judged`, in order; the bad ones are reported by line.

    Args:
        encode: a chunk of records → sequences of ids, or BadRecord.
        make: a record and its sequences → what is judged; `index` is filled in here.
    """
    skips, found = Skips(on_bad_record), []
    for index, example in _good(records, encode, make, limits, skips):
        found.append(replace(example, subset=str(records[index].get("subset") or ""), index=index))
    _finish(skips, len(records), len(found))
    return found


def _good(records: Sequence[Record], encode: Any, make: Any, limits: Limits, skips: Skips) -> Iterator[tuple[int, Judged]]:
    for index, (record, result) in enumerate(zip(records, in_chunks(records, encode), strict=True)):
        try:
            if isinstance(result, BadRecord):
                raise result
            for ids in result:
                limits.check(record, ids)
            yield index, make(record, result)
        except BadRecord as error:
            skips.report(error)


def limits_of(max_length: int, vocab_size: int | None) -> Limits:
    """Raises DataError for a --max_length that no sequence fits."""
    if max_length < 2:
        raise DataError(f"--max_length: expected at least 2 tokens, got {max_length}")
    return Limits(max_length, "--max_length", vocab_size)


def label_of(record: Record, column: str, value: Any) -> float:
    """A label as a number in [0, 1]: true, false, a share, or their text. Raises BadRecord."""
    words = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
    try:
        number = words[value.strip().lower()] if isinstance(value, str) and value.strip().lower() in words else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= 1.0:
        raise record.bad("wrong type", f"expected true, false or a number between 0 and 1 in column {column!r}, got {str(value)[:80]!r}")
    return number
