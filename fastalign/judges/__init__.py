"""Judges: rewards and checks that need a model."""

from .reward_model import RewardModel

__all__ = ["RewardModel"]
