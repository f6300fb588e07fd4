"""Win rates for `fastalign eval --judge`: a run's completions against a baseline's, both orders, with lengths beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..evaluation.comparisons import Compared, win_rate
from ..judges.templates import as_text
from ..training.files import write_atomic
from .feedback_arguments import WinRateArguments
from .generate import key_of
from .judging import JudgeOptions, build_comparer
from .setup import Loaded

logger = logging.getLogger("fastalign")

COMPARISONS, JUDGEMENTS = "comparisons.jsonl", "judgements.jsonl"
KNOWN = ("samples.jsonl", "completions.jsonl", "sft.jsonl")  # of eval, generate in a pipeline, critique

Item = Mapping[str, Any]


def check(given: WinRateArguments) -> None:
    """What can be said before a model is loaded.

    Raises:
        ValueError: a judge without a baseline, or the reverse; a judge or baseline that is none.
    """
    if bool(given.judge) != bool(given.baseline):
        raise ValueError("--judge compares with the completions that --baseline names: give both, or neither")
    if given.judge:
        JudgeOptions.parse(given.judge)
        file_of(given.baseline)


@dataclass(frozen=True)
class Case:
    """A completion and the baseline's that it meets."""

    number: int
    item: Item
    own: str
    other: str


def compare(given: WinRateArguments, items: Sequence[Item], loaded: Loaded, folder: Path) -> dict[str, Any]:
    """Compares each completion of `items` with the baseline's of the same prompt; writes comparisons.jsonl and returns the numbers.

    Raises:
        ValueError: no prompt in common, no comparison that could be read, or a judge or baseline that is none.
    """
    cases = cases_of(items, given.baseline)
    comparer = build_comparer(given.judge, loaded, cache=str(folder / JUDGEMENTS))
    present = [name for name in comparer.template.columns if any(name in case.item for case in cases)]
    columns = {name: [case.item.get(name) for case in cases] for name in present}
    prompts = [case.item["prompt"] for case in cases]
    found = comparer.compare(prompts, [case.own for case in cases], [case.other for case in cases], **columns)
    lines = [
        {"prompt": case.item["prompt"], "completion": case.own, "baseline": case.other, **asdict(each)}
        for case, each in zip(cases, found, strict=True)
    ]
    write_atomic(folder / COMPARISONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    read = [
        Compared(case.number, each.score, len(case.own), len(case.other))
        for case, each in zip(cases, found, strict=True)
        if each.score is not None
    ]
    if not read:
        raise ValueError(f"--judge: none of the {len(cases)} comparisons could be read; see {folder / JUDGEMENTS} and the judge's template")
    agreement = sum(each.agreement or 0.0 for each in found) / len(read)
    return {**asdict(win_rate(read)), "unread": len(cases) - len(read), "agreement": agreement, "baseline": given.baseline}


def cases_of(items: Sequence[Item], path: str) -> list[Case]:
    """What is compared: of a prompt's completions the first meets the baseline's first, and so on, around.

    Raises:
        ValueError: the baseline has no completion of any prompt, or is none.
    """
    baseline, cases = read_baseline(path), list[Case]()
    for number, item in enumerate(items):
        if others := baseline.get(key_of(item["prompt"])):
            cases += [Case(number, item, own["text"], others[j % len(others)]) for j, own in enumerate(item["completions"])]
    if missing := len(items) - len({case.number for case in cases}):
        logger.warning("--baseline %s has no completion of %d of the %d prompts", path, missing, len(items))
    if not cases:
        raise ValueError(f"--baseline {path} has no completion of any of the {len(items)} prompts; are they the same data?")
    return cases


def file_of(path: str) -> Path:
    """The file, or the one of `KNOWN` in the folder.

    Raises:
        ValueError: there is none.
    """
    place = Path(path)
    found = [place / name for name in KNOWN if (place / name).is_file()] if place.is_dir() else [place]
    if not found:
        raise ValueError(f"--baseline {path}: the folder has none of {', '.join(KNOWN)}")
    if not found[0].is_file():
        raise ValueError(f"--baseline {path}: there is no such file or folder")
    return found[0]


def read_baseline(path: str) -> dict[str, list[str]]:
    """The completions of each prompt, by the prompt's key: of a .jsonl that eval, generate or critique wrote, or records with one each.

    Raises:
        ValueError: there is no such file, or a line without a prompt and completions.
    """
    place = file_of(path)
    baseline: dict[str, list[str]] = {}
    for number, line in enumerate(place.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(line)
            texts = [each["text"] for each in item["completions"]] if "completions" in item else [as_text(item["completion"])]
            baseline.setdefault(key_of(item["prompt"]), []).extend(texts)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--baseline {place}: line {number} is no object with a prompt and its completions") from error
    return baseline


def table(found: Mapping[str, Any]) -> str:
    """What is printed."""
    unread = f", {found['unread']} not to be read" if found["unread"] else ""
    counts = f"{found['wins']} won, {found['ties']} tied, {found['losses']} lost against {found['baseline']}{unread}"
    rate = f"{'win rate':10} {found['value']:7.2%}   95 % {found['low']:.2%} to {found['high']:.2%}"
    lengths = f"{found['mean_length']:.0f} characters on average against {found['mean_baseline_length']:.0f}"
    fair = f"at equal lengths {found['length_controlled']:.2%} ({lengths})"
    return f"{counts}; both orders agree in {found['agreement']:.1%}\n{rate}; {fair}"
