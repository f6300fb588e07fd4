"""What a rollout looks like in numbers, under TRL's metric names."""

from __future__ import annotations

import math

import torch

from ..rollout import Rollout, Sample


def _mean_std(values: list[float]) -> tuple[float, float]:
    found = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    if not found.numel():
        return math.nan, math.nan
    return float(found.mean()), float(found.std(correction=0))


def reward_metrics(samples: list[Sample], weights: dict[str, float]) -> dict[str, float]:
    """The mean total reward, and mean, deviation and missing count by name."""
    out = {"reward": _mean_std([s.reward(weights) for s in samples])[0]}
    for name in weights:
        values = [s.rewards.get(name, math.nan) for s in samples]
        out[f"rewards/{name}/mean"], out[f"rewards/{name}/std"] = _mean_std(values)
        missing = sum(math.isnan(v) for v in values)
        if missing:
            out[f"rewards/{name}/missing"] = float(missing)
    return out


def group_metrics(rollout: Rollout, weights: dict[str, float]) -> dict[str, float]:
    """Spread within groups, the lengths of completions in tokens that the model wrote, and their turns."""
    spreads = [_mean_std([s.reward(weights) for s in samples])[1] for samples in rollout.samples]
    spreads = [s for s in spreads if not math.isnan(s)]
    lengths = [s.num_scored for s in rollout.flat]
    return {
        "reward_std": sum(spreads) / max(len(spreads), 1),
        "frac_reward_zero_std": sum(s < 1e-6 for s in spreads) / max(len(spreads), 1),
        "completions/mean_length": sum(lengths) / len(lengths) if lengths else math.nan,
        "completions/min_length": float(min(lengths, default=math.nan)),
        "completions/max_length": float(max(lengths, default=math.nan)),
        "completions/clipped_ratio": sum(s.finish_reason == "length" for s in rollout.flat) / len(lengths) if lengths else math.nan,
        **turn_metrics(rollout.flat),
    }


def turn_metrics(samples: list[Sample]) -> dict[str, float]:
    """Of conversations with an environment: their turns, what they were answered, and how many broke off; else empty."""
    if not samples or all(s.scored is None for s in samples):
        return {}
    turns = [s.turns for s in samples]
    return {
        "turns/mean": sum(turns) / len(turns),
        "turns/max": float(max(turns)),
        "tool_calls/frac": sum(t > 1 for t in turns) / len(turns),
        "tool_calls/mean_tokens": sum(len(s.ids) - s.num_scored for s in samples) / len(samples),
        "tool_calls/failed": float(sum(s.finish_reason == "abort" for s in samples)),
    }
