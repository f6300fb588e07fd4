"""Trackers beside metrics.jsonl. Each is imported when asked for, and only then."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..catalogue import TRACKERS, nearest


class Tracker(Protocol):
    """Where a logged row also goes."""

    def log(self, step: int, row: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `output_dir/tensorboard`."""

    def __init__(self, output_dir: Path, run_name: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output_dir / "tensorboard"))
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; WANDB_PROJECT, WANDB_MODE=offline and its other variables are respected."""

    def __init__(self, output_dir: Path, run_name: str, config: dict[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "fastalign")
        self.run = wandb.init(project=project, name=run_name, config=config, dir=str(output_dir))

    def log(self, step: int, row: dict[str, float]) -> None:
        self.run.log(row, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio's local dashboard."""

    def __init__(self, output_dir: Path, run_name: str, config: dict[str, Any]) -> None:
        import trackio

        self.run = trackio.init(project=os.environ.get("TRACKIO_PROJECT", "fastalign"), name=run_name, config=config)

    def log(self, step: int, row: dict[str, float]) -> None:
        self.run.log(row, step=step)

    def close(self) -> None:
        self.run.finish()


_KINDS: dict[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def check_trackers(report_to: str) -> list[str]:
    """The names in `report_to` (comma-separated, or "none"); raises ValueError at one that there is not."""
    names = [part.strip() for part in report_to.split(",") if part.strip() not in ("", "none")]
    for name in names:
        if name not in _KINDS:
            raise ValueError(f"--report_to: {nearest(name, TRACKERS)}")
    return names


def open_trackers(report_to: str, output_dir: Path, run_name: str, config: dict[str, Any]) -> list[Tracker]:
    """The trackers named in `report_to` (comma-separated, or "none").

    Raises:
        ValueError: an unknown name, or a tracker whose package is not installed.
    """
    trackers: list[Tracker] = []
    for name in check_trackers(report_to):
        try:
            trackers.append(_KINDS[name](output_dir, run_name, config))
        except ImportError as error:
            remedy = f'pip install "fastalign[{name}]"'
            raise ValueError(f"--report_to {name} needs a package that is not installed ({error}): {remedy}") from error
    return trackers
