"""Losses: equations only, one file a family."""

from . import policy, sft

__all__ = ["policy", "sft"]
