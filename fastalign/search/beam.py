"""Beam search over reasoning steps, guided by a model of steps (arXiv:2305.00633, 2408.03314)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..data import Prompt
from .paths import Path, Scorer, SearchResult, rank, score_paths
from .policy import Policy, Stem
from .sampled import best_index


@dataclass(eq=False)
class _Beam:
    """One prompt's search."""

    prompt: Prompt
    kept: list[tuple[float, Path]]
    finished: dict[Path, float] = field(default_factory=dict)
    serial: int = 0
    num_tokens: int = 0
    num_scored: int = 0

    def stems(self) -> list[Stem]:
        """Where it goes on from."""
        opened = [path for _, path in self.kept if not path.finished]
        begin, self.serial = self.serial, self.serial + len(opened)
        return [Stem(self.prompt, path, begin + i) for i, path in enumerate(opened)]

    def take(self, paths: list[Path], scores: list[float], num_beams: int) -> None:
        """Keeps the best of the new paths and of the finished ones so far; a path that is there already is not kept twice."""
        self.finished |= {path: score for path, score in zip(paths, scores, strict=True) if path.finished}
        held = [(score, path) for score, path in self.kept if path.finished]
        distinct = dict(zip([path for _, path in held] + paths, [score for score, _ in held] + scores, strict=True))
        self.kept = sorted(((score, path) for path, score in distinct.items()), key=lambda pair: -rank(pair[0]))[:num_beams]


def beam_search(
    policy: Policy, prompts: Sequence[Prompt], scorer: Scorer, *, num_beams: int = 4, num_expansions: int = 4
) -> list[SearchResult]:
    """Each round draws `num_expansions` next steps behind each of `num_beams` paths and keeps the best paths.

    The first round draws as many as all later ones, num_beams · num_expansions. Finished paths keep their place among the beams
    as long as their scores do; a prompt is done when none of its beams goes on. The result is the best finished path that was
    ever seen, the first of those that tie.

    Args:
        policy: draws the steps.
        scorer: judges unfinished paths, too; one without a score (NaN) is kept last.

    Raises:
        ValueError: fewer than one beam or expansion.
    """
    if num_beams < 1 or num_expansions < 1:
        raise ValueError(f"beam search: num_beams and num_expansions must be >= 1, got {num_beams} and {num_expansions}")
    beams = [_Beam(prompt, [(0.0, Path())]) for prompt in prompts]
    count = num_beams * num_expansions
    while going := [(beam, stems) for beam in beams if (stems := beam.stems())]:
        drawn = policy.step([stem for _, stems in going for stem in stems], count)
        _advance(going, drawn, scorer, num_beams)
        count = num_expansions
    return [
        SearchResult(list(b.finished), list(b.finished.values()), best_index(list(b.finished.values())), b.num_tokens, b.num_scored)
        for b in beams
    ]


def _advance(going: list[tuple[_Beam, list[Stem]]], drawn: list[list[Path]], scorer: Scorer, num_beams: int) -> None:
    """Scores what was drawn behind the stems, all prompts in one call, and lets each beam choose."""
    groups = iter(drawn)
    paths = []
    for beam, stems in going:
        new = [(stem, path) for stem in stems for path in next(groups)]
        beam.num_tokens += sum(len(path.ids) - len(stem.path.ids) for stem, path in new)
        paths.append(list(dict.fromkeys(path for _, path in new)))
    scores, judged = score_paths(scorer, [beam.prompt for beam, _ in going], paths)
    for (beam, _), own, given, count in zip(going, paths, scores, judged, strict=True):
        beam.num_scored += count
        beam.take(own, given, num_beams)
