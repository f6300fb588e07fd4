"""Python that the model writes and reads the output of, in the manner of PAL (arXiv:2211.10435)."""

from __future__ import annotations

import re

from ..rewards.confinement import Limits, Outcome, confinement, run_python

_BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```", re.DOTALL)


class PythonTool:
    """Runs the last ```python block of a turn, and answers with what it printed in an ```output block; a turn without one is the last.

    Every block runs by itself, confined (`rewards.confinement`): no network, no files but its own, within limits. What a program
    that fails leaves behind is the end of its error message.

    Args:
        seconds: of time. memory_mb: of memory, in MiB.
        max_characters: of the answer; the middle of a longer one is left out.

    Raises:
        ValueError: programs cannot be confined here; says what is missing.
    """

    gives_reward = False
    stop = ("```\n",)  # the beginning of a block names its language, so that this is the end of one

    def __init__(self, *, seconds: float = 5.0, memory_mb: int = 512, max_characters: int = 1000) -> None:
        confinement()
        self.limits, self.max_characters = Limits(seconds=seconds, memory_mb=memory_mb), max_characters

    def reset(self) -> None:
        """It has no state."""

    def step(self, text: str) -> tuple[str | None, None, bool]:
        blocks = _BLOCK.findall(text)
        if not blocks:
            return None, None, True
        outcome = run_python(blocks[-1], limits=self.limits)
        return f"```output\n{self._shown(outcome)}\n```\n", None, False

    def _shown(self, outcome: Outcome) -> str:
        if outcome.exceeded:
            failure = f"error: the program was ended: it used too much: {outcome.exceeded}"
        else:
            failure = "".join(outcome.stderr.strip().splitlines()[-1:]) if outcome.returncode else ""
        shown, most = "\n".join(filter(None, (outcome.stdout.strip(), failure))), self.max_characters
        return shown if len(shown) <= most else f"{shown[: most // 2]} … {shown[len(shown) - most // 2 :]}"
