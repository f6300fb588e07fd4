"""Evaluation: how good a model is at what it was trained for."""

from .estimators import best_at_k, interval, maj_at_k, pass_at_k
from .reward_bench import RewardBench, reward_bench

__all__ = ["RewardBench", "best_at_k", "interval", "maj_at_k", "pass_at_k", "reward_bench"]
