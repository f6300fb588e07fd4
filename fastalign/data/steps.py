"""Solutions by steps for process reward models: each step is closed by a separator, at whose last token its score is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..packing import Segment
from .candidates import Judged, judged, label_of, limits_of
from .chat import read_messages
from .encoders import _Encoder
from .records import BadRecord, DataError, Record

STEP_SEPARATOR = "\n"


class StepEncoder(_Encoder):
    """Ids of prompt, steps and separators, tokenized apart (as TRL's PRMTrainer does), and where each step ends.

    Args:
        tokenizer: the reward model's.
        separator: text behind every step, the last one, too.
    """

    def __init__(self, tokenizer: Any, separator: str = STEP_SEPARATOR, system_prompt: str = "") -> None:
        super().__init__(tokenizer, system_prompt)
        (ids,) = self.text.pieces([separator])
        if not ids:
            raise DataError(f"--step_separator {separator!r} has no token of its own in this tokenizer; choose another")
        self.separator = ids

    def prompt(self, record: Record) -> list[int]:
        """Ids of the column `prompt`, plain or conversational."""
        if isinstance(record.require("prompt"), list):
            return self.chat.prompt(record, self.with_system(read_messages(record, "prompt")))
        return self.text.prompts([self.plain(record, "prompt")])[0]

    def solution(self, prompt: Sequence[int], steps: Sequence[str]) -> tuple[list[int], list[int]] | None:
        """Ids, and the index of each step's last token; None where a step cannot be cut exactly."""
        ids, ends = list(prompt), []
        for step in self.text.pieces(list(steps)):
            if step is None:
                return None
            ids += [*step, *self.separator]
            ends.append(len(ids) - 1)
        return ids, ends


def step_examples(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    on_bad_record: str = "error",
    system_prompt: str = "",
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    separator: str = STEP_SEPARATOR,
) -> list[Judged]:
    """Records of `prompt`, `completions` (the steps) and `labels` (one a step). Arguments as `rankings.ranking_examples`.

    Args:
        separator: text behind every step.
        pad_token_id: not read: a step's score is read at its separator, whatever that is.
    """
    encoder = StepEncoder(tokenizer, separator, system_prompt)
    ends: dict[int, list[int]] = {}

    def encode(chunk: Sequence[Record]) -> list[list[list[int]] | BadRecord]:
        return [_encoded(encoder, record, ends) for record in chunk]

    def make(record: Record, sequences: list[list[int]]) -> Judged:
        labels = tuple(label_of(record, "labels", value) for value in record["labels"])
        return Judged(Segment(sequences[0]), tuple((0, end) for end in ends.pop(id(record))), labels)

    return judged(records, encode, make, limits=limits_of(max_length, vocab_size), on_bad_record=on_bad_record)


def _encoded(encoder: StepEncoder, record: Record, ends: dict[int, list[int]]) -> list[list[int]] | BadRecord:
    try:
        encoder.check_read(record)
        steps = _checked_steps(record)
        found = encoder.solution(encoder.prompt(record), steps)
        if found is None:
            raise record.bad("no exact mask", "the tokenizer merges a step's first characters with any before them; begin it otherwise")
    except BadRecord as error:
        return error
    ids, ends[id(record)] = found
    return [ids]


def _checked_steps(record: Record) -> list[str]:
    steps, labels = record.require("completions"), record.require("labels")
    if not isinstance(steps, list) or not isinstance(labels, list):
        kinds = f"{type(steps).__name__} and {type(labels).__name__}"
        raise record.bad("wrong type", f"expected lists in columns 'completions' (the steps) and 'labels', got {kinds}")
    if not steps:
        raise record.bad("empty completion", "expected at least one step in column 'completions', got none")
    if len(steps) != len(labels):
        raise record.bad("wrong number of labels", f"expected one label a step, {len(steps)}, got {len(labels)}")
    for k, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise record.bad("empty completion", f"completions[{k}]: expected a step as text, got {str(step)[:80]!r}")
    return steps
