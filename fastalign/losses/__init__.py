"""Losses: equations only, one file a family."""

from . import policy, preference, sft, unpaired

__all__ = ["policy", "preference", "sft", "unpaired"]
