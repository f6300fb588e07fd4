"""Losses: equations only, one file a family."""

from . import policy, preference, reward, sft, unpaired

__all__ = ["policy", "preference", "reward", "sft", "unpaired"]
