"""A generative judge: a language model that grades an answer, or says which of two is better (arXiv:2306.05685)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .asking import Model, Question
from .templates import COMPARE, GRADE, Template, as_text

log = logging.getLogger("fastalign")
_SHOWN = 80  # characters of a reply


@dataclass(frozen=True)
class Comparison:
    """What a judge says of two answers, asked in both orders.

    Attributes:
        score: the first answer's share, mean over the votes: 1 better, 0 worse, 0.5 neither; None where no vote can be read.
        agreement: share of the votes in which both orders say the same; None as above.
    """

    score: float | None
    agreement: float | None


class Judge:
    """Asks a model by a template and reads its verdicts. Called like a reward function it gives grades.

    Args:
        model: who replies: `LocalModel`, `ServerModel`, either within `Remembering`.
        template: what is asked and how the reply is read.
        votes: replies a question, averaged; more than one needs a temperature above 0.

    Raises:
        ValueError: a template that reads no reply, or fewer than one vote.
    """

    def __init__(self, model: Model, template: Template, *, votes: int = 1) -> None:
        if template.kind not in (GRADE, COMPARE):
            raise ValueError(f"Judge: expected a template of kind {GRADE} or {COMPARE}, got {template.kind}")
        if votes < 1:
            raise ValueError(f"Judge: votes must be >= 1, got {votes}")
        if votes > 1 and model.identity.get("temperature") == 0:
            raise ValueError(f"Judge: {votes} votes at temperature 0 are all the same; give a temperature, or one vote")
        self.model, self.template, self.votes = model, template, votes

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
        """[B] grades in [0, 1], the mean of the votes that can be read; None where none can.

        Args:
            prompts: texts or conversations.
            completions: the answers; texts, or the assistant's messages.
            columns: [B] each; those that the template names are filled in.

        Raises:
            ValueError: a template that compares, or a column that it names and nobody gives.
        """
        self._expect(GRADE)
        cases = [{"prompt": as_text(p), "completion": as_text(c)} for p, c in zip(prompts, completions, strict=True)]
        return [_mean(votes) for votes in self._verdicts(filled(self.template, cases, columns))]

    def compare(self, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any], **columns: Sequence[Any]) -> list[Comparison]:
        """[B] comparisons. Each pair is shown in both orders; where the two verdicts differ, the vote is a tie.

        Raises:
            ValueError: a template that grades, or as `__call__`.
        """
        self._expect(COMPARE)
        pairs = [(as_text(p), as_text(a), as_text(b)) for p, a, b in zip(prompts, firsts, seconds, strict=True)]
        forth = filled(self.template, [{"prompt": p, "first": a, "second": b} for p, a, b in pairs], columns)
        back = filled(self.template, [{"prompt": p, "first": b, "second": a} for p, a, b in pairs], columns)
        verdicts = self._verdicts([*forth, *back])
        return [_agreed(one, other) for one, other in zip(verdicts[: len(pairs)], verdicts[len(pairs) :], strict=True)]

    def _expect(self, kind: str) -> None:
        if self.template.kind != kind:
            raise ValueError(f"judge: expected a template of kind {kind} here, got {self.template.kind}")

    def _verdicts(self, asked: list[list[str]]) -> list[list[float | None]]:
        """[B] lists of what each vote says; equal cases are asked once."""
        cases = list(dict.fromkeys(map(tuple, asked)))
        threads = [
            Question((*((("system", system),) if system else ()), ("user", first)), draw)
            for system, first, *_ in cases
            for draw in range(self.votes)
        ]
        replies = self._replies(threads)
        for turn in range(2, len(self.template.turns) + 1):
            live = [i for i, reply in enumerate(replies) if reply is not None]
            going = [threads[i].followed_by(replies[i] or "", cases[i // self.votes][turn]) for i in live]
            replies = [None] * len(threads)
            for i, question, reply in zip(live, going, self._replies(going), strict=True):
                threads[i], replies[i] = question, reply
        read = [None if reply is None else self.template.read(reply) for reply in replies]
        unread = [reply for reply, verdict in zip(replies, read, strict=True) if reply is not None and verdict is None]
        if unread:
            said = f"{len(unread)} of {len(replies)} replies hold no verdict that {self.template.pattern!r} finds in its range"
            log.warning("judge: %s; the first ends with %r", said, unread[0][-_SHOWN:])
        found = {case: read[i * self.votes : (i + 1) * self.votes] for i, case in enumerate(cases)}
        return [found[tuple(case)] for case in asked]

    def _replies(self, questions: Sequence[Question]) -> list[str | None]:
        replies: list[str | None] = [None] * len(questions)
        for i, reply in self.model.ask(questions):
            replies[i] = reply
        return replies


def filled(template: Template, cases: list[dict[str, str]], columns: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    """The system message and the turns of each case, its fields and the data's columns filled in.

    Raises:
        ValueError: a column that the template names and nobody gives.
    """
    for name in template.columns:
        if name not in columns:
            raise ValueError(f"judge: the template reads the column {name!r}, got {sorted(columns) or 'no columns'}")
    rows = [case | {name: as_text(columns[name][i]) for name in template.columns} for i, case in enumerate(cases)]
    return [[text.format(**row) for text in (template.system, *template.turns)] for row in rows]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _agreed(forth: Sequence[float | None], back: Sequence[float | None]) -> Comparison:
    """The votes of both orders as one: what they agree on, else a tie."""
    both = [(a, 1 - b) for a, b in zip(forth, back, strict=True) if a is not None and b is not None]
    return Comparison(_mean([a if a == b else 0.5 for a, b in both]), _mean([float(a == b) for a, b in both]))
