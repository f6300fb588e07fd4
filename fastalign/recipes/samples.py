"""Greedy completions of a few prompts: what the report shows before and after training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..generation import Engine, SamplingParams

NUM_SHOWN = 4


def readable(prompts: Iterable[Sequence[int]], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """The first few different prompts, as text and as ids; those without a token are left out."""
    chosen: dict[tuple[int, ...], str] = {}
    for ids in prompts:
        if len(chosen) == NUM_SHOWN:
            break
        if ids:
            chosen.setdefault(tuple(ids), tokenizer.decode(list(ids), skip_special_tokens=True))
    return [(text, list(ids)) for ids, text in chosen.items()]


def greedy_samples(engine: Engine | None, prompts: Sequence[tuple[str, list[int]]], params: SamplingParams | None) -> list[dict[str, Any]]:
    """One completion a prompt; none without an engine."""
    if engine is None or not prompts:
        return []
    outputs = engine.generate([ids for _, ids in prompts], params)
    engine.release_cache()  # the update has the memory
    return [{"prompt": text, "completion": out.outputs[0].text} for (text, _), out in zip(prompts, outputs, strict=True)]
