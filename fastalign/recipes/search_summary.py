"""What a search is worth: right answers against tokens, a line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.estimators import interval

COUNTS = ("num_tokens", "num_prefilled", "num_reused", "num_scored")


def summarize(found: Mapping[str, list[dict[str, Any]]], min_reward: float) -> dict[str, Any]:
    """By method: counts a prompt and, where there are rewards, the share of prompts answered right and of those with any right candidate.

    A completion without a reward counts as wrong.
    """
    return {method: _summary([item["search"] for item in items], min_reward) for method, items in found.items()}


def _summary(results: Sequence[Mapping[str, Any]], min_reward: float) -> dict[str, Any]:
    out: dict[str, Any] = {"num_prompts": len(results)}
    for name in COUNTS:
        out[name] = sum(own[name] for own in results) / len(results) if results else None
    if results and all("reward" in own for own in results):
        right = [float(_reaches(own, min_reward)) for own in results]
        low, high = interval(right)
        out["accuracy"] = {"value": sum(right) / len(right), "low": low, "high": high}
        out["any_right"] = sum(any(_reaches(c, min_reward) for c in own["candidates"]) for own in results) / len(results)
    return out


def _reaches(own: Mapping[str, Any], min_reward: float) -> bool:
    return own["reward"] is not None and own["reward"] >= min_reward


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """What is printed: accuracy with its 95 % interval over the prompts, and tokens a prompt."""
    lines = [f"{'method':<11}{'accuracy':>9}  {'95 %':<15}{'any right':>9}{'drawn':>9}{'prefilled':>10}{'reused':>9}{'scored':>8}"]
    for method, own in summary.items():
        measured = f"{'':9}  {'':15}{'':9}"
        if "accuracy" in own:
            value, low, high = (own["accuracy"][name] for name in ("value", "low", "high"))
            between = f"{low:.1%}-{high:.1%}"
            measured = f"{value:>9.1%}  {between:<15}{own['any_right']:>9.1%}"
        counts = [f"{own[name]:.1f}" if own[name] is not None else "" for name in COUNTS]
        lines.append(f"{method:<11}{measured}{counts[0]:>9}{counts[1]:>10}{counts[2]:>9}{counts[3]:>8}")
    num_prompts = max((own["num_prompts"] for own in summary.values()), default=0)
    lines.append(f"{num_prompts} prompts; tokens drawn, prefilled and reused, and paths scored, are a prompt")
    return "\n".join(lines)
