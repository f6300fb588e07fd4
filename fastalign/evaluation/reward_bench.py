"""Pairwise accuracy of a reward model on files in RewardBench's format (arXiv:2403.13787)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.records import DataError, Record

# the sections of RewardBench's leaderboard and the subsets that each is the mean over (arXiv:2403.13787, Table 1)
SECTIONS: dict[str, tuple[str, ...]] = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        *("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut"),
        "llmbar-adver-manual",
    ),
    "Safety": ("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer"),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}

Judge = Callable[[Sequence[Any], Sequence[Any]], Sequence[float | None]]


@dataclass(frozen=True)
class RewardBench:
    """What `reward_bench` found.

    Attributes:
        accuracy: share of all pairs whose chosen answer scored higher; a tie counts one half, an answer without score as wrong.
        subsets: the same of each subset.
        sections: RewardBench's sections, each the mean over its subsets by their number of pairs, where the file has any of them;
            math-prm counts as much as all of the code subsets (hep-*) together, as on the leaderboard.
        counts: pairs of each subset.
        num_unscored: pairs one of whose answers has no score.
    """

    accuracy: float
    subsets: Mapping[str, float]
    sections: Mapping[str, float]
    counts: Mapping[str, int]
    num_unscored: int

    def table(self) -> str:
        """The figures as lines of text."""
        rows = [("all", self.accuracy, sum(self.counts.values()))]
        rows += [(f"[{name}]", value, sum(self.counts.get(s, 0) for s in SECTIONS[name])) for name, value in self.sections.items()]
        rows += [(name, value, self.counts[name]) for name, value in self.subsets.items() if name]
        return "\n".join(f"{name:26}{value:8.4f}{count:7}" for name, value, count in rows)


def reward_bench(judge: Judge, records: Sequence[Record], *, conversational: bool = False) -> RewardBench:
    """Scores the chosen and the rejected answer of every record and compares them.

    Args:
        judge: (prompts, completions) → scores, as `judges.RewardModel` is called.
        records: from `load_records`: `prompt`, `chosen`, `rejected` and, where the file has it, `subset`; plain or conversational.
        conversational: plain prompts and answers become one turn each, for judges with a chat template.

    Raises:
        BadRecord: a record lacks a column. DataError: no record.
    """
    if not records:
        raise DataError("reward_bench: expected at least one record, got none")
    prompts, answers, subsets = [], [], []
    for record in records:
        prompt, pair = record.require("prompt"), [record.require("chosen"), record.require("rejected")]
        if conversational and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
            pair = [[{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer for answer in pair]
        prompts += [prompt, prompt]
        answers += pair
        subsets.append(str(record.get("subset") or ""))
    scores = judge(prompts, answers)
    wins = [_win(scores[2 * i], scores[2 * i + 1]) for i in range(len(records))]
    found = {name: [win for win, own in zip(wins, subsets, strict=True) if own == name] for name in sorted(set(subsets))}
    named = {name: [win or 0.0 for win in own] for name, own in found.items()}
    return RewardBench(
        accuracy=_mean([win or 0.0 for win in wins]),
        subsets={name: _mean(own) for name, own in named.items()},
        sections={name: _section(members, named) for name, members in SECTIONS.items() if named.keys() & set(members)},
        counts={name: len(own) for name, own in named.items()},
        num_unscored=sum(win is None for win in wins),
    )


def _win(chosen: float | None, rejected: float | None) -> float | None:
    if chosen is None or rejected is None or math.isnan(chosen) or math.isnan(rejected):
        return None
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _section(members: Sequence[str], wins: Mapping[str, Sequence[float]]) -> float:
    weights = {name: len(wins[name]) for name in members if name in wins}
    code = sum(count for name, count in weights.items() if name.startswith("hep-"))
    if "math-prm" in weights and code:
        weights["math-prm"] = code
    return sum(_mean(wins[name]) * weight for name, weight in weights.items()) / sum(weights.values())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
