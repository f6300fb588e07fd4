"""What a search finds, as training data: right answers, pairs, and steps with labels."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..training.files import write_atomic
from .generate import key_of
from .search_methods import BY_SCORE

Found = Mapping[str, list[dict[str, Any]]]  # method → the objects that it wrote


def number(value: float) -> float | None:
    """A score as JSON has it; None of NaN."""
    return None if math.isnan(value) else value


def save_sft(path: Path, found: Found, min_reward: float) -> str:
    """Writes each method's choices as `prompt` and `completion`, once each; right ones alone where a reward says which are."""
    records = {}
    for item in _items(found):
        own = item["search"]
        if own["completion"].strip() and _is_right(own, min_reward):
            record = {"prompt": item["prompt"], "completion": _said(item["prompt"], own["completion"])}
            records[key_of(record)] = record
    return _write(path, list(records.values()))


def save_pairs(path: Path, found: Found) -> str:
    """Writes a pair a prompt: of all solutions, the one with the highest reward and the one with the lowest.

    Where there is no reward, the scorer's score decides, and of those that share the highest reward it does, too. A prompt whose
    solutions are all alike gives none.
    """
    pools: dict[str, tuple[Any, dict[str, tuple[float, float]]]] = {}
    for method, items in found.items():
        for item in items:
            _, pool = pools.setdefault(key_of(item["prompt"]), (item["prompt"], {}))
            for one in item["search"]["candidates"]:
                score = one["score"] if method in BY_SCORE and one["score"] is not None else None
                reward = one.get("reward")
                worth = reward if "reward" in one else score
                if worth is not None and one["text"].strip():
                    pool[one["text"]] = max(pool.get(one["text"], (worth, -math.inf)), (worth, -math.inf if score is None else score))
    records = []
    for prompt, pool in pools.values():
        if not pool:
            continue
        best, worst = max(pool, key=lambda text: pool[text]), min(pool, key=lambda text: pool[text])
        if pool[best][0] > pool[worst][0]:
            records.append({"prompt": prompt, "chosen": _said(prompt, best), "rejected": _said(prompt, worst)})
    return _write(path, records)


def save_steps(path: Path, found: Found, labels: str) -> str:
    """Writes each branch of the trees as `prompt`, `completions` (its steps) and `labels`, estimated by the rollouts through each step.

    "hard": 1 where any of them was right; "soft": their mean score, cut to [0, 1] (Math-Shepherd, arXiv:2312.08935). A step that
    only closes the text is left out.
    """
    records = {}
    for item in _items(found):
        for chain in item["search"].get("chains", ()):
            steps = [(text, mean) for text, mean, _ in chain if text.strip()]
            values = [float(mean > 0) if labels == "hard" else min(max(mean, 0.0), 1.0) for _, mean in steps]
            if steps:
                record = {"prompt": item["prompt"], "completions": [text for text, _ in steps], "labels": values}
                records[key_of(record)] = record
    return _write(path, list(records.values()))


def _items(found: Found) -> Iterator[dict[str, Any]]:
    return (item for items in found.values() for item in items)


def _is_right(own: Mapping[str, Any], min_reward: float) -> bool:
    return "reward" not in own or (own["reward"] is not None and own["reward"] >= min_reward)


def _said(prompt: Any, text: str) -> Any:
    """A completion in the prompt's form: text, or the assistant's message."""
    return [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text


def _write(path: Path, records: list[dict[str, Any]]) -> str:
    """Writes the file whole, and says how many there are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return f"{path}: {len(records)} records"
