"""Rewards: verifiers, shaping, and users' functions in processes of their own. Nothing here imports torch."""

from .builtin import BUILTIN, GOLD_COLUMNS
from .early import EarlyScoring
from .reward_set import Reward, RewardSet
from .specifications import load_rewards

__all__ = ["BUILTIN", "GOLD_COLUMNS", "EarlyScoring", "Reward", "RewardSet", "load_rewards"]
