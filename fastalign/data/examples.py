"""Examples: records as the token trees that training reads, and as the prompts that generation starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..packing import Segment, conversation
from .chat import Message
from .dialects import normalize_all
from .encoders import PromptEncoder, SupervisedEncoder, in_chunks, supervised_format, weight_of
from .records import OR_SKIP, BadRecord, DataError, Record, Skips


@dataclass(frozen=True)
class Examples:
    """What supervised training reads.

    Attributes:
        segments: one scored sequence a record.
        indices: which record each came from.
        num_skipped: bad records left out.
        skipped_reasons: how many for each reason.
    """

    segments: list[Segment]
    indices: list[int] = field(default_factory=list)
    num_skipped: int = 0
    skipped_reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What generation starts from.

    Attributes:
        ids: token ids, the generation prompt included.
        prompt: what the rewards see: the text, or the conversation.
        columns: every other column of the record, for the rewards.
        index: which record it came from.
    """

    ids: list[int]
    prompt: str | list[Message]
    columns: dict[str, Any]
    index: int


class Prompts(list[Prompt]):
    """Prompts, with the count of the bad records left out."""

    num_skipped: int = 0
    skipped_reasons: dict[str, int]


def sft_examples(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    on_bad_record: str = "error",
    system_prompt: str = "",
    vocab_size: int | None = None,
) -> Examples:
    """Records of `text`, `messages`, or `prompt` + `completion` (plain or conversational), with an optional `weight`.

    ShareGPT's `conversations` and HH's transcripts are read as messages (`dialects.normalize`). The format is the one whose
    columns most records have. All of a text is scored, of messages what the assistant wrote, of prompt + completion the
    completion alone (of a conversational one, the assistant's messages). See `tokens` and
    `chat` for how boundaries are kept exact.

    Args:
        records: from `load_records`.
        tokenizer: a transformers tokenizer.
        max_length: longest sequence in tokens; a longer record is a bad one, never cut.
        on_bad_record: "error" raises at the first bad record, "skip" leaves it out and counts it.
        system_prompt: put before conversations that have no system message.
        vocab_size: rows of the model's embedding; a token id beyond is a bad record. None: not checked.

    Raises:
        BadRecord: naming file and line. DataError: for a tokenizer or arguments that fit no record, or when none is left.
    """
    if max_length < 2:
        raise DataError(f"--max_length: expected at least 2 tokens, got {max_length}")
    records = normalize_all(records)
    encode = SupervisedEncoder(tokenizer, supervised_format(records), system_prompt)
    limits = Limits(max_length, "--max_length", vocab_size)
    skips, segments, indices = Skips(on_bad_record), [], []
    for index, segment in supervised_segments(records, encode, limits, skips):
        segments.append(segment)
        indices.append(index)
    _finish(skips, len(records), len(segments))
    return Examples(segments, indices, skips.reasons.total(), dict(skips.reasons))


def supervised_segments(
    records: Sequence[Record], encode: Callable[[Sequence[Record]], Any], limits: Limits, skips: Skips
) -> Iterator[tuple[int, Segment]]:
    """Index and scored sequence of the good records, in order; the bad ones are reported to `skips`."""
    for index, (ids, flags) in _good(records, encode, limits, skips):
        yield index, conversation(ids, flags, weight_of(records[index]))


def prompt_examples(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_prompt_length: int = 0,
    on_bad_record: str = "error",
    system_prompt: str = "",
    vocab_size: int | None = None,
    limit_flag: str = "--max_prompt_length",
) -> Prompts:
    """Records of `prompt`, plain or conversational, ready for generation; every other column is kept for the rewards.

    Args:
        records: from `load_records`.
        tokenizer: a transformers tokenizer.
        max_prompt_length: longest prompt in tokens; 0: no limit. A longer record is a bad one, never cut.
        on_bad_record, system_prompt, vocab_size: as in `sft_examples`.
        limit_flag: what a record that is too long is told to raise, where another flag set the limit.

    Raises:
        BadRecord, DataError: as `sft_examples`.
    """
    if max_prompt_length < 0:
        raise DataError(f"--max_prompt_length: expected at least 0 tokens (0: no limit), got {max_prompt_length}")
    encode = PromptEncoder(tokenizer, system_prompt)
    limits = Limits(max_prompt_length, limit_flag, vocab_size)
    skips, prompts = Skips(on_bad_record), Prompts()
    for index, (ids, prompt) in _good(records, encode, limits, skips):
        prompts.append(Prompt(ids, prompt, {k: v for k, v in records[index].items() if k != "prompt"}, index))
    _finish(skips, len(records), len(prompts))
    prompts.num_skipped, prompts.skipped_reasons = skips.reasons.total(), dict(skips.reasons)
    return prompts


def columns_of_prompts(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The prompts' columns as the rewards take them: one list a column, None where a record has it not."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def _good(records: Sequence[Record], encode: Callable[..., Any], limits: Limits, skips: Skips) -> Iterator[tuple[int, Any]]:
    """Index and encoding of the good records, in order; the bad ones are reported to `skips`."""
    for index, (record, result) in enumerate(zip(records, in_chunks(records, encode), strict=True)):
        try:
            if isinstance(result, BadRecord):
                raise result
            limits.check(record, result[0])
            yield index, result
        except BadRecord as error:
            skips.report(error)


def _finish(skips: Skips, total: int, left: int) -> None:
    skips.summarize(total)
    if not left:
        raise DataError(f"no record is left: {total} read, {skips.reasons.total()} skipped ({dict(skips.reasons)})")


@dataclass(frozen=True)
class Limits:
    """What the ids of a record must keep to; `flag` is what to raise for longer ones, or the whole remedy where it is no flag."""

    max_length: int  # 0: none
    flag: str
    vocab_size: int | None

    def check(self, record: Record, ids: Sequence[int]) -> None:
        if self.max_length and len(ids) > self.max_length:
            remedy = f"raise {self.flag}" if self.flag.startswith("--") else self.flag
            remedy += " (at most to the model's positions)" if self.flag == "--max_length" else ""
            message = f"expected at most {self.max_length} tokens, got {len(ids)}; {remedy}{OR_SKIP}"
            raise record.bad("too long", message)
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            at = next(i for i, token in enumerate(ids) if token >= self.vocab_size)
            message = f"token {ids[at]} at position {at} is over the vocabulary of {self.vocab_size}; is the tokenizer the model's own?"
            raise record.bad("over the vocabulary", message)
