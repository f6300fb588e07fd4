"""Principles by which a model criticizes, revises and compares answers, from a YAML file (a constitution, arXiv:2212.08073)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..catalogue import nearest
from .flags import read_yaml

_KEYS, _PARTS = ("principles", "stop"), ("critique", "revision", "choice")


@dataclass(frozen=True)
class Principle:
    """What is asked in its name.

    Attributes:
        critique: of the answer that was just given.
        revision: of that answer after its critique.
        choice: a question about two answers, A and B.
    """

    critique: str
    revision: str
    choice: str

    @classmethod
    def of(cls, text: str) -> Principle:
        """The three questions for a principle in plain words."""
        return cls(
            f"Criticize your last answer under this principle: {text} Quote every passage that does not follow it, and say why.",
            f"Rewrite your last answer so that it follows this principle: {text} Give the new answer alone.",
            f"Which answer follows this principle better: {text}",
        )


@dataclass(frozen=True)
class Constitution:
    """The principles of a run.

    Attributes:
        principles: of which each round draws one.
        stop: a critique that contains this text ends a prompt's rounds; empty: none does.
    """

    principles: tuple[Principle, ...]
    stop: str = ""

    def ends(self, critique: str) -> bool:
        """Whether a critique ends the rounds."""
        return bool(self.stop) and self.stop in critique

    def draw(self, seed: int, prompt: int, number: int) -> Principle:
        """The principle of a prompt's round, the same in every run with this seed."""
        return random.Random(f"{seed} {prompt} {number}").choice(self.principles)


NO_FAULT = "NOTHING TO IMPROVE"
SELF_REFINE = Constitution(
    (
        Principle(
            "Criticize your last answer as a demanding reader would: what is wrong, missing, unclear or superfluous? Name each fault and "
            f"how to mend it. If there is none, reply only: {NO_FAULT}",
            "Write your answer anew with every fault mended that was named. Give the new answer alone, without a word about the change.",
            "Which answer serves whoever asked better?",
        ),
    ),
    NO_FAULT,
)
"""Feedback and refinement without principles (Self-Refine, arXiv:2303.17651)."""


def load_principles(path: str) -> Constitution:
    """The principles in a YAML file; without one those of Self-Refine.

    principles: a list of texts, or of {critique, revision, choice}, where `choice` may be left out. stop: as in `Constitution`.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds something else; names the entry.
    """
    if not path:
        return SELF_REFINE
    given, where = read_yaml(Path(path), "--principles"), f"--principles {path}"
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"{where}: {nearest(str(key), _KEYS, prefix='key ')}")
    listed = given.get("principles")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{where}: expected principles, a list of texts or of {{critique, revision, choice}}, got {listed!r}")
    return Constitution(
        tuple(_principle(each, f"{where}: principle {i}") for i, each in enumerate(listed, 1)), str(given.get("stop") or "")
    )


def _principle(given: Any, where: str) -> Principle:
    if isinstance(given, str) and given.strip():
        return Principle.of(given.strip())
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{where}: expected a text, or critique, revision and choice, got {given!r}")
    for key, value in given.items():
        if key not in _PARTS:
            raise ValueError(f"{where}: {nearest(str(key), _PARTS, prefix='key ')}")
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: expected a text for {key}, got {value!r}")
    for key in ("critique", "revision"):
        if key not in given:
            raise ValueError(f"{where}: expected a {key} beside {', '.join(given)}")
    return Principle(given["critique"], given["revision"], given.get("choice", "Which answer serves whoever asked better?"))
