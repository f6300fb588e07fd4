"""The rewards that come with fastalign: f(prompts, completions, completion_ids, **columns) -> one number or None a sample.

Nothing here imports torch: `math` and `regex` run in a worker process, whose start must stay fast.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import answers
from .code import code, command
from .completions import GOLD_COLUMNS, Completion, text_of
from .forms import choice, json_object, repetition
from .unit_tests import COLUMNS as TEST_COLUMNS

_LONGEST_EXPRESSION = 400  # characters; a longer one is not an answer, and symbolic algebra on it may take minutes


@dataclass(frozen=True)
class Builtin:
    """A row of the table.

    Attributes:
        function: the reward.
        isolated: runs in a worker process, because a completion can make it hang.
        any_column: it needs at least one of these columns.
        preload: optional packages that it uses.
    """

    function: Callable[..., list[float | None]]
    isolated: bool = False
    any_column: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()


@dataclass(frozen=True)
class WithParameters:
    """A reward with its parameters; a column of the data that is called as one of them does not take its place."""

    function: Callable[..., list[float | None]]
    parameters: dict[str, Any]
    per_sample = True  # every row of the table looks at one completion at a time

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        return self.function(completions, **{**columns, **self.parameters})


def golds_of(columns: dict[str, Any], count: int) -> list[str | None]:
    """The reference answer of each sample, from the first of `GOLD_COLUMNS` that has a value; None where there is none."""
    golds: list[str | None] = []
    for i in range(count):
        found = (columns[name][i] for name in GOLD_COLUMNS if columns.get(name) is not None)
        value = next((v for v in found if v is not None), None)
        if isinstance(value, list) and all(isinstance(each, dict) for each in value):  # a conversational reference
            value = text_of(value)
        elif isinstance(value, list):
            if len(value) != 1:
                raise ValueError(f"expected one reference answer, got a list of {len(value)}")
            value = value[0]
        golds.append(None if value is None else answers.gold_answer(str(value)))
    return golds


def math_answer(completions: Sequence[Completion], *, partial: float = 0.0, **columns: Any) -> list[float | None]:
    r"""1 where the final answer equals the reference, else 0; `partial` where it is a number all the same (ReFT, arXiv:2401.08967: 0.1).

    The answer is what follows the last </think>: \boxed{…}, else `#### …`, else "the answer is …", else the last number.
    The reference comes from `GOLD_COLUMNS`; of a worked solution its \boxed{…}, #### or "the answer is …" counts. Two answers are equal
    as exact numbers or normalized text, or, where `math-verify` is installed, when it proves them equal.
    """
    scores: list[float | None] = []
    for completion, gold in zip(completions, golds_of(columns, len(completions)), strict=True):
        if gold is None:
            scores.append(None)
            continue
        answer = answers.final_answer(answers.after_thinking(text_of(completion)))
        if answer is None:
            scores.append(0.0)
        elif _same(gold, answer):
            scores.append(1.0)
        else:
            scores.append(partial if answers.as_number(answers.normalize(answer)) is not None else 0.0)
    return scores


def _same(gold: str, answer: str) -> bool:
    if answers.equivalent(gold, answer):
        return True
    if max(len(gold), len(answer)) > _LONGEST_EXPRESSION or not has_math_verify():
        return False
    numbers = answers.as_number(answers.normalize(gold)), answers.as_number(answers.normalize(answer))
    if None not in numbers and "%" not in gold + answer:
        return False  # two plain numbers were compared exactly; symbolic algebra has nothing to add
    return _verify(gold, answer)


@lru_cache(maxsize=1)
def has_math_verify() -> bool:
    """Whether `math-verify` is installed."""
    return importlib.util.find_spec("math_verify") is not None


@lru_cache(maxsize=1 << 14)  # the samples of a group repeat their answers
def _verify(gold: str, answer: str) -> bool:
    import math_verify  # sympy takes a second to import; only workers pay it

    parsed = [math_verify.parse(_dollars(text), parsing_timeout=3) for text in (gold, answer)]
    return all(parsed) and bool(math_verify.verify(*parsed, timeout_seconds=3))


def _dollars(text: str) -> str:
    return text if "$" in text.replace(r"\$", "") else f"${text}$"


def gsm8k(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    """1 where the number after the last `####`, or without one the last number of the text, equals the reference, else 0.

    Commas, currency signs and trailing zeros do not matter. What stands before the last </think> does not count.
    `gsm8k_strict` asks for the `####`.
    """
    return _gsm8k(completions, columns, lambda text: answers.after_hashes(text) or text[-1000:])


def gsm8k_strict(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    """As `gsm8k`, but an answer without `####` scores 0: it rewards the format with the result."""
    return _gsm8k(completions, columns, lambda text: answers.after_hashes(text) or "")


def _gsm8k(completions: Sequence[Completion], columns: dict[str, Any], find: Callable[[str], str]) -> list[float | None]:
    scores: list[float | None] = []
    for completion, gold in zip(completions, golds_of(columns, len(completions)), strict=True):
        if gold is None:
            scores.append(None)
            continue
        text = answers.after_thinking(text_of(completion))
        hashes = answers.after_hashes(text)
        found = _first_number(hashes) if hashes else answers.last_number(find(text))
        scores.append(float(found is not None and answers.equivalent(_gold_number(gold), found)))
    return scores


def _first_number(text: str) -> str | None:
    match = answers.NUMBER.search(text)
    return match.group() if match else None


def _gold_number(gold: str) -> str:
    return _first_number(gold) or gold


def think_format(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    """1 where the completion is one <think>…</think> with a thought in it, then a non-empty answer, else 0.

    A completion that begins inside the thought (the chat template wrote <think>) has no opening tag: use `regex` for it.
    """
    return [float(_is_think_then_answer(text_of(completion))) for completion in completions]


def _is_think_then_answer(text: str) -> bool:
    text = text.strip()
    if text.count("<think>") != 1 or text.count("</think>") != 1 or not text.startswith("<think>"):
        return False
    thought, _, answer = text.removeprefix("<think>").partition("</think>")
    return bool(thought.strip()) and bool(answer.strip())


def regex(completions: Sequence[Completion], *, pattern: str, **columns: Any) -> list[float | None]:
    """1 where the whole completion matches the regular expression (a dot matches newlines too), else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"reward 'regex': expected a regular expression, got {pattern!r}: {error}") from error
    return [float(compiled.fullmatch(text_of(completion)) is not None) for completion in completions]


def target_length(
    completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]] | None = None, *, target: float = 256, width: float = 0,
    **columns: Any,
) -> list[float | None]:  # fmt: skip
    """1 at `target` tokens, falling linearly to 0 at `width` tokens away from it (0: as far as the target itself).

    Without token ids, words are counted.
    """
    width = width or target
    if target < 0 or width <= 0:
        raise ValueError(f"length: expected target >= 0 and width > 0 tokens, got target={target}, width={width}")
    return [max(0.0, 1.0 - abs(n - target) / width) for n in _lengths(completions, completion_ids)]


def overlong(
    completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]] | None = None, *, max_length: float, buffer: float = 0,
    **columns: Any,
) -> list[float | None]:  # fmt: skip
    """Soft overlong punishment (DAPO, arXiv:2503.14476, Eq. 13): 0 up to max_length - buffer tokens, then linearly to -1 at max_length.

    buffer 0 takes a fifth of max_length, as the paper does (4096 of 20480). Without token ids, words are counted.
    """
    buffer = buffer or max_length / 5
    if not 0 < buffer <= max_length:
        raise ValueError(f"overlong: expected 0 < buffer <= max_length tokens, got max_length={max_length}, buffer={buffer}")
    return [0.0 - min(1.0, max(0.0, (n - (max_length - buffer)) / buffer)) for n in _lengths(completions, completion_ids)]


def _lengths(completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]] | None) -> list[int]:
    return [len(text_of(c).split()) for c in completions] if completion_ids is None else [len(ids) for ids in completion_ids]


BUILTIN: dict[str, Builtin] = {
    "math": Builtin(math_answer, isolated=True, any_column=GOLD_COLUMNS, preload=("math_verify",)),
    "gsm8k": Builtin(gsm8k, any_column=GOLD_COLUMNS),
    "gsm8k_strict": Builtin(gsm8k_strict, any_column=GOLD_COLUMNS),
    "format": Builtin(think_format),
    "regex": Builtin(regex, isolated=True),
    "length": Builtin(target_length),
    "overlong": Builtin(overlong),
    "choice": Builtin(choice, any_column=GOLD_COLUMNS),
    "json": Builtin(json_object),
    "repetition": Builtin(repetition),
    "code": Builtin(code, any_column=TEST_COLUMNS),
    "command": Builtin(command),
}
