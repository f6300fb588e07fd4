"""A completion as a reward gets it, and where its reference is."""

from __future__ import annotations

from typing import Any

Completion = str | list[dict[str, Any]]

GOLD_COLUMNS = ("answer", "solution", "gold", "ground_truth", "target", "completion")
"""Where `math`, `gsm8k` and `choice` look for the reference, in this order; a missing or null one leaves the sample out."""


def text_of(completion: Completion) -> str:
    """A completion as text: itself, or the contents of its assistant messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(m.get("content") or "") for m in completion if m.get("role", "assistant") == "assistant")
