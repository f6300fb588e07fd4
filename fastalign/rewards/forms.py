"""Rewards of a completion's form: a choice among letters, JSON, and how little it repeats itself. No torch: as `builtin`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from . import answers
from .completions import GOLD_COLUMNS, Completion, text_of

_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)```", re.DOTALL)


def choice_letter(text: str, letters: str) -> str | None:
    r"""The letter that a text commits to, upper case; None without one.

    In this order: the letter that \boxed{…}, `#### …` or "the answer is …" begins with, in brackets or not; the last letter in brackets;
    a text that is a letter and no word ("C", "C. because").
    """
    text = answers.after_thinking(text).strip()
    stated = answers.stated_answer(text)
    begins = rf"\W*(?:\\text\{{)?\W*([{re.escape(letters)}])(?![A-Za-z'])"
    if stated and (found := re.match(begins, stated, re.IGNORECASE)):
        return found.group(1).upper()
    bracketed = re.findall(rf"[(\[]\s*([{re.escape(letters)}])\s*[)\]]", text)
    if bracketed:
        return bracketed[-1]
    alone = re.match(rf"\W*([{re.escape(letters)}])(?:[.):]|\W*$)", text)
    return alone.group(1) if alone else None


def choice(completions: Sequence[Completion], *, letters: str = "ABCDEFGHIJ", **columns: Any) -> list[float | None]:
    """1 where the completion chooses the letter of the reference, else 0; the reference is a letter, or begins with one ("C. Paris").

    Raises:
        ValueError: letters that are none.
    """
    if not letters.isalpha() or letters != letters.upper():
        raise ValueError(f"reward 'choice': expected capital letters, as in letters=ABCD; got {letters!r}")
    scores: list[float | None] = []
    for i, completion in enumerate(completions):
        found = (columns[name][i] for name in GOLD_COLUMNS if columns.get(name) is not None)
        value = next((v for v in found if v is not None), None)
        gold = None if value is None else choice_letter(text_of(value), letters)
        scores.append(None if gold is None else float(choice_letter(text_of(completion), letters) == gold))
    return scores


def json_object(completions: Sequence[Completion], *, keys: str = "", **columns: Any) -> list[float | None]:
    """1 where the completion is JSON, else 0: what follows the last </think>, or the one fenced block in it.

    keys: names joined by + that the JSON must have, as an object: keys=name+age.
    """
    wanted = [key for key in keys.split("+") if key]
    return [float(_is_json(answers.after_thinking(text_of(completion)), wanted)) for completion in completions]


def _is_json(text: str, keys: Sequence[str]) -> bool:
    fenced = _FENCE.findall(text)
    if len(fenced) > 1:
        return False
    try:
        value = json.loads(fenced[0] if fenced else text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return not keys or (isinstance(value, dict) and all(key in value for key in keys))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def repetition(
    completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]] | None = None, *, ngram: float = 3, penalty: float = 1,
    **columns: Any,
) -> list[float | None]:  # fmt: skip
    """-penalty x the share of n-grams that were there before: 0 for a completion that never repeats `ngram` tokens, towards -penalty.

    Of tokens, or of words without token ids; shorter completions score 0.
    """
    if ngram < 1 or ngram != int(ngram):
        raise ValueError(f"reward 'repetition': expected ngram, a whole number of at least 1, got {ngram:g}")
    units = [text_of(c).split() for c in completions] if completion_ids is None else completion_ids
    return [0.0 - penalty * _repeated(list(own), int(ngram)) for own in units]


def _repeated(units: Sequence[Any], size: int) -> float:
    grams = [tuple(units[i : i + size]) for i in range(len(units) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
