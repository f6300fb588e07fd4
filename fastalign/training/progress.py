"""What a run shows while it works: a bar on a terminal, one line a row elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

# the numbers worth a glance, in this order, with their short names
_SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "kl": "kl",
    "entropy": "entropy",
    "mean_token_accuracy": "acc",
    "accuracy": "acc",
    "margin": "margin",
    "completions/mean_length": "len",
    "grad_norm": "grad",
    "tokens_per_second": "tok/s",
}
_SECONDS_BETWEEN_LINES = 2.0  # a log file of a fast run stays readable


def headline(row: Mapping[str, float]) -> str:
    """The key numbers of a row on one line."""
    parts = []
    for name, short in _SHOWN.items():
        if (value := row.get(name)) is not None:
            parts.append(f"{short} {value:,.0f}" if abs(value) >= 1000 else f"{short} {value:.3g}")
    return "  ".join(parts)


class Progress:
    """Shows steps done and the last row.

    Args:
        total_steps: 0 where it is not known.
    """

    def __init__(self, total_steps: int) -> None:
        self.total = total_steps
        self.shown_at = -_SECONDS_BETWEEN_LINES
        self.bar = tqdm(total=total_steps or None, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, step: int, row: Mapping[str, float]) -> None:
        """Shows a row; one of held-out numbers alone always gets a line of its own."""
        held_out = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name.startswith("eval/"))
        if held_out:
            self._line(step, held_out)
        elif self.bar is not None:
            self.bar.set_postfix_str(headline(row), refresh=False)
            self.advance(step)
        elif step == self.total or time.monotonic() - self.shown_at >= _SECONDS_BETWEEN_LINES:
            self.shown_at = time.monotonic()
            self._line(step, headline(row))

    def _line(self, step: int, text: str) -> None:
        line = f"step {step}{f'/{self.total}' if self.total else ''}  {text}"
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
