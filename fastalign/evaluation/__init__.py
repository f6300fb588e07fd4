"""Evaluation: how good a model is at what it was trained for."""

from .reward_bench import RewardBench, reward_bench

__all__ = ["RewardBench", "reward_bench"]
