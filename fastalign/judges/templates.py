"""What a judge is asked, and how its verdict is read out of what it says. A user's own are in a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from ..catalogue import nearest
from .verifier import QUESTION

GRADE, COMPARE, VERIFY, CHOOSE = "grade", "compare", "verify", "choose"
_ONE, _BOTH = ("prompt", "completion"), ("prompt", "first", "second")
JUDGED = {GRADE: _ONE, COMPARE: _BOTH, VERIFY: _ONE, CHOOSE: _BOTH}  # kind → the fields that are no columns
READ_AS = {GRADE: r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]", COMPARE: r"\[\[\s*(A|B|C|tie)\s*\]\]"}
_KEYS = ("kind", "system", "turns", "pattern", "low", "high")


@dataclass(frozen=True)
class Template:
    """One way of asking.

    Attributes:
        kind: "grade" (a number for one answer) or "compare" (the better of two), read in a reply; "verify" (the probability of Yes)
            or "choose" (of A against B), read in the log-probs without one.
        turns: what the judge is asked, turn after turn, each after its reply to the one before; the last reply is read. Their
            fields are {prompt} and {completion}, or of two answers {first} and {second}; any other is a column of the data.
        system: the system message; empty: none.
        pattern: a regular expression whose first group holds the verdict: a number, or A, B, and C or tie. Its last match counts.
        low, high: the worst and the best grade, which become 0 and 1.

    Raises:
        ValueError: a field that is no name, a missing one, a pattern without a group, or no range.
    """

    kind: str
    turns: tuple[str, ...]
    system: str = ""
    pattern: str = ""
    low: float = 1.0
    high: float = 10.0
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.kind not in JUDGED:
            raise ValueError(f"template: {nearest(str(self.kind), JUDGED, prefix='kind ')}")
        if not self.turns or not all(isinstance(turn, str) and turn.strip() for turn in self.turns):
            raise ValueError(f"template: expected turns, a text or a list of texts, got {self.turns!r}")
        named = dict.fromkeys(name for turn in (self.system, *self.turns) for name in fields_of(turn))
        judged = JUDGED[self.kind]
        if missing := [name for name in judged[1:] if name not in named]:
            raise ValueError(f"template: expected {{{missing[0]}}} in a turn of kind {self.kind}, got {sorted(named) or 'no fields'}")
        object.__setattr__(self, "columns", tuple(name for name in named if name not in judged))
        object.__setattr__(self, "pattern", self.pattern or READ_AS.get(self.kind, ""))
        if self.kind not in READ_AS and (len(self.turns) > 1 or self.pattern):
            raise ValueError(f"template: kind {self.kind} reads no reply: expected one turn and no pattern")
        if self.kind == VERIFY and (self.system or self.columns):
            raise ValueError("template: kind verify takes {prompt} and {completion} alone, and no system message")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"template: pattern {self.pattern!r} is no regular expression: {error}") from error
        if self.kind in READ_AS and groups < 1:
            raise ValueError(f"template: expected a group around the verdict in pattern {self.pattern!r}, as in {READ_AS[self.kind]!r}")
        if not self.low < self.high:
            raise ValueError(f"template: expected low < high, got {self.low:g} and {self.high:g}")

    def read(self, reply: str) -> float | None:
        """The verdict in [0, 1]: the grade between low and high, or 1, 0.5, 0 where the first, neither, the second is better.

        None where there is none, or a grade out of its range.
        """
        matches = list(re.finditer(self.pattern, reply, re.IGNORECASE))
        if not matches or matches[-1][1] is None:
            return None
        said = matches[-1][1].strip().lower()
        if self.kind == COMPARE:
            return {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}.get(said)
        try:
            grade = float(said)
        except ValueError:
            return None
        return (grade - self.low) / (self.high - self.low) if self.low <= grade <= self.high else None


def fields_of(text: str) -> list[str]:
    """The {names} of a text; {{ and }} are braces.

    Raises:
        ValueError: braces around something else than a name.
    """
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"template: {error}; other braces are written twice, {{{{ or }}}}: {text[:80]!r}") from error
    for name, spec, conversion in parts:
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"template: expected a name in braces, got {{{name}}}; other braces are written twice, {{{{ or }}}}")
    return [name for name, _, _ in parts]


def as_text(value: Any) -> str:
    """A text as it is; of a conversation the only message's content, or every turn with its role in front."""
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(part, Mapping) for part in value):
        said = [(str(message.get("role") or ""), str(message.get("content") or "")) for message in value]
        return said[0][1] if len(said) == 1 else "\n\n".join(f"{role.capitalize()}: {content}" for role, content in said)
    return str(value)


def load_template(name_or_path: str) -> Template:
    """A template of `TEMPLATES` by its name, or the one in a YAML file.

    Raises:
        ValueError: neither, an unknown key, or what `Template` refuses.
    """
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"{nearest(name_or_path, TEMPLATES, prefix='template ')} There is no file of that name either.")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"template {path} is not valid YAML: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"template {path}: expected key: value lines ({', '.join(_KEYS)}), got {type(given).__name__}")
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"template {path}: {nearest(str(key), _KEYS, prefix='key ')}")
    turns = given.pop("turns", ())
    try:
        for bound in ("low", "high"):
            if bound in given:
                given[bound] = float(given[bound])
        return Template(turns=(turns,) if isinstance(turns, str) else tuple(turns), **{"kind": GRADE, **given})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


_CASE = "[Question]\n{prompt}\n\n[Answer]\n{completion}\n[End of the answer]\n\n"
_TWO = "[Question]\n{prompt}\n\n[Answer A]\n{first}\n[End of answer A]\n\n[Answer B]\n{second}\n[End of answer B]\n\n"
_FAIR = "Judge what is said, not how long it is or who may have said it."
_FAIR_TWO = f"{_FAIR} The order of the answers is arbitrary."

TEMPLATES = {
    "grade": Template(
        GRADE,
        (
            f"{_CASE}Assess how well the answer serves whoever asked: is it correct, relevant, complete and clear? {_FAIR} Explain "
            "briefly, then end with a grade from 1 (useless) to 10 (could not be better) in double brackets, as in: Grade: [[5]]",
        ),
    ),
    "additive": Template(
        GRADE,
        (
            f"{_CASE}Start from 0 and add a point for each of these that holds:\n"
            "- the answer has something to do with the question;\n"
            "- it deals with a good part of the question, though not all of it;\n"
            "- it answers the essence of the question in a useful way;\n"
            "- it is well organized, speaks to whoever asked, and answers everything that was asked;\n"
            "- it is an expert's: precise, insightful, and without a superfluous word.\n"
            f"{_FAIR} Explain briefly which points you give, then end with their sum, 0 to 5, in double brackets, as in: Points: [[3]]",
        ),
        low=0.0,
        high=5.0,
    ),
    "reference": Template(
        GRADE,
        (
            "[Question]\n{prompt}\n\n[Right answer]\n{answer}\n\n[Answer to grade]\n{completion}\n[End of the answer]\n\n"
            "Compare the answer to grade with the right one, explain briefly, then end with 1 if it comes to the same result and 0 if it "
            "does not, in double brackets: [[1]] or [[0]]",
        ),
        low=0.0,
        high=1.0,
    ),
    "principles": Template(
        GRADE,
        (
            f"{_CASE}Before anything is graded: which principles matter for judging an answer to this very question? List up to five, each "
            "with a weight in percent; the weights sum to 100.",
            "Now criticize the answer under each of your principles in turn: quote what meets it and what violates it.",
            "Weigh your criticism as your principles say and end with one grade from 1 to 10 in double brackets, as in: Grade: [[5]]",
        ),
    ),
    "compare": Template(
        COMPARE,
        (
            f"{_TWO}Which answer serves whoever asked better: which is more correct, relevant, complete and clear? {_FAIR_TWO} Explain "
            "briefly, then end with [[A]] if answer A is better, [[B]] if answer B is, or [[C]] if neither is.",
        ),
    ),
    "compare_principles": Template(
        COMPARE,
        (
            f"{_TWO}Before anything is compared: which principles matter for judging answers to this very question? List up to five, each "
            "with a weight in percent; the weights sum to 100.",
            f"Now criticize both answers under each of your principles in turn. {_FAIR_TWO}",
            "Weigh your criticism as your principles say and end with [[A]] if answer A is better, [[B]] if answer B is, or [[C]] if "
            "neither is.",
        ),
    ),
    "compare_under": Template(
        COMPARE,
        (
            f"{_TWO}{{principle}} {_FAIR_TWO} Explain briefly, then end with [[A]] if that is answer A, [[B]] if it is answer B, or "
            "[[C]] if neither is.",
        ),
    ),
    "choose": Template(CHOOSE, (f"{_TWO}Which answer serves whoever asked better? {_FAIR_TWO} Reply with A or B alone.",)),
    "choose_under": Template(CHOOSE, (f"{_TWO}{{principle}} {_FAIR_TWO} Reply with A or B alone.",)),
    "verify": Template(VERIFY, (QUESTION.format(question="{prompt}", solution="{completion}"),)),
}  # 1-10 as in arXiv:2306.05685; 0-5 as in arXiv:2401.10020; principles, critique, grade as in arXiv:2504.02495; Yes or No: judges.verifier
