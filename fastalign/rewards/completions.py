"""A completion as a reward gets it."""

from __future__ import annotations

from typing import Any

Completion = str | list[dict[str, Any]]


def text_of(completion: Completion) -> str:
    """A completion as text: itself, or the contents of its assistant messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(m.get("content") or "") for m in completion if m.get("role", "assistant") == "assistant")
