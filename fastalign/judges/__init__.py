"""Judges: rewards and checks that need a model."""

from .reward_model import RewardModel
from .verifier import Verifier, verifier_records

__all__ = ["RewardModel", "Verifier", "verifier_records"]
