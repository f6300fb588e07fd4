"""The cheap reward of the GRPO comparison."""

from __future__ import annotations


def checksum(completions: list[str], **columns: object) -> list[float]:
    """A number in [0, 1) that depends on the text alone and differs within every group."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]
