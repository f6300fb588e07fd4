"""Pairs for `fastalign dpo` out of samples: the best against the worst by their rewards, or the data's own answer against each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..data.dialects import Message
from ..training.files import write_atomic
from .feedback_arguments import PairArguments

Item = Mapping[str, Any]  # an object of the output file


def pairs_path(output_file: str) -> Path:
    """completions.jsonl → completions.pairs.jsonl."""
    return Path(output_file).with_suffix(".pairs.jsonl")


def check(given: PairArguments, output_file: str) -> None:
    """What can be said before a model is loaded.

    Raises:
        ValueError: pairs without a file or without what they need.
    """
    if given.save_pairs == "none":
        return
    if not output_file:
        raise ValueError(f"--save_pairs {given.save_pairs}: pairs are written beside --output_file; give one")
    if given.save_pairs == "best_worst" and not given.reward:
        raise ValueError("--save_pairs best_worst: --reward says which completion is the best; give one, as in --reward judge:model=self")


def write_pairs(given: PairArguments, output_file: str, wanted: Callable[[Item], bool]) -> int:
    """Writes the pairs of an output file's prompts beside it and returns how many there are.

    Raises:
        ValueError: the completions have no rewards, or the data no answer of their own.
    """
    lines = []
    for number, line in enumerate(Path(output_file).read_text(encoding="utf-8").splitlines(), 1):
        item = json.loads(line)
        if wanted(item):
            where = f"--save_pairs {given.save_pairs}: {output_file}: line {number}"
            lines += [json.dumps(pair, ensure_ascii=False) + "\n" for pair in PAIRS[given.save_pairs](item, given, where)]
    write_atomic(pairs_path(output_file), "".join(lines))
    return len(lines)


def best_and_worst(item: Item, given: PairArguments, where: str) -> list[dict[str, Any]]:
    """The first completion with the highest reward against the first with the lowest; none where they do not differ enough."""
    if any("reward" not in completion for completion in item["completions"]):
        raise ValueError(f"{where}: the completions were sampled without --reward; name another --output_file to sample them again")
    scored = [completion for completion in usable(item, given) if completion["reward"] is not None]
    if len(scored) < 2:
        return []
    best, worst = (choose(scored, key=lambda completion: completion["reward"]) for choose in (max, min))
    gap = best["reward"] - worst["reward"]
    if gap <= 0 or gap < given.min_margin:
        return []
    pair = {"prompt": item["prompt"], "chosen": as_side(item["prompt"], best["text"]), "rejected": as_side(item["prompt"], worst["text"])}
    return [{**pair, "chosen_reward": best["reward"], "rejected_reward": worst["reward"]}]


def truth_and_samples(item: Item, given: PairArguments, where: str) -> list[dict[str, Any]]:
    """The data's answer against every different sample (SPIN, arXiv:2401.01335)."""
    truth = truth_of(item)
    if truth is None:
        raise ValueError(f"{where}: expected the data's answer in a column completion (or messages), got {sorted(item)}; use --dataset_map")
    sides = [as_side(item["prompt"], text) for text in dict.fromkeys(c["text"] for c in usable(item, given))]
    return [{"prompt": item["prompt"], "chosen": truth, "rejected": side} for side in sides if side != truth]


def usable(item: Item, given: PairArguments) -> list[dict[str, Any]]:
    """The completions that may be a side: not empty and, where that is asked, ended by themselves."""
    return [c for c in item["completions"] if c["text"] and (c["finish_reason"] == "stop" or not given.finished_only)]


PAIRS = {"best_worst": best_and_worst, "truth": truth_and_samples}


def truth_of(item: Item) -> str | list[Message] | None:
    """The answer that the data give: `completion`, or the assistant's turns at the end of `messages`."""
    found, messages = item.get("completion"), item.get("messages")
    if found is None and isinstance(messages, list):
        end = len(messages)
        while end and isinstance(messages[end - 1], Mapping) and messages[end - 1].get("role") == "assistant":
            end -= 1
        found = messages[end:]
    if isinstance(found, str) and isinstance(item["prompt"], list):
        found = as_side(item["prompt"], found)
    return found or None


def as_side(prompt: str | list[Message], text: str) -> str | list[Message]:
    """A completion's text as a side of its prompt's kind."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
