"""Python that the model writes and reads the output of, in the manner of PAL (arXiv:2211.10435)."""

from __future__ import annotations

import re
from typing import Any

_BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```", re.DOTALL)


class PythonTool:
    """placeholder"""

    gives_reward = False
    stop = ("```\n",)

    def __init__(self, *, seconds: float = 5.0, memory_mb: int = 512, max_characters: int = 2000) -> None:
        self.seconds, self.memory_mb, self.max_characters = seconds, memory_mb, max_characters

    def reset(self) -> None:
        """It has no state: every block runs by itself."""

    def step(self, text: str) -> tuple[str | None, None, bool]:
        raise NotImplementedError
