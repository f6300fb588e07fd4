"""Checkpoints: everything that a bit-exact continuation needs, whole on disk or not there at all.

`checkpoint-N/` is a Hugging Face model folder (adapters: PEFT format) plus `training_state.pt` (optimizer and RNG
tensors, read with weights_only) and `training_state.json` (step, schedule, data order; written last, with the size of
every other file, so that its presence means the checkpoint is complete).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .files import TEMPORARY_SUFFIX, disk_errors, files_below, fsync_directory, fsync_file
from .weights import save_pretrained

FORMAT = 1
_TENSORS, _STATE = "training_state.pt", "training_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read; the weights themselves are restored by `restore_weights`.

    Attributes:
        path: the folder.
        step: optimizer steps done.
        optimizer_state, scheduler_state, data_state, extra: as given to `save_checkpoint`.
        rng: for `restore_rng`.
        companions: name → optimizer and scheduler state of a model beside; its weights lie in the folder of that name.
    """

    path: Path
    step: int
    optimizer_state: dict[str, Any]
    scheduler_state: dict[str, Any]
    data_state: dict[str, Any]
    rng: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    companions: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Companion:
    """A model that is trained beside the main one, as a checkpoint takes it."""

    model: nn.Module
    tokenizer: Any
    optimizer_state: dict[str, Any]
    scheduler_state: dict[str, Any]


def rng_state() -> dict[str, Any]:
    """The states of torch (every device), numpy and python's `random`."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "python": list(random.getstate()),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` returned. CUDA states are put back where as many devices exist as when saving."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    *,
    model: nn.Module,
    tokenizer: Any = None,
    optimizer_state: dict[str, Any] | None = None,
    scheduler_state: dict[str, Any] | None = None,
    data_state: dict[str, Any] | None = None,
    rng: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    save_total_limit: int = 0,
    companions: Mapping[str, Companion] | None = None,
) -> Path:
    """Writes `output_dir/checkpoint-{step}` to a temporary name, syncs it and renames it.

    Args:
        model: a Hugging Face model or a PEFT model (adapter only).
        optimizer_state: tensors, numbers, strings, and lists and dicts of them.
        scheduler_state, data_state, extra: JSON values.
        rng: `rng_state()` taken earlier; None: taken now.
        save_total_limit: older checkpoints beyond this many are removed once the new one is whole; 0: none is.
        companions: other models that are trained beside (a critic), by name.

    Raises:
        OSError: the disk is full; earlier checkpoints are intact.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step}"
    with disk_errors(final), _staged(final) as folder:
        save_pretrained(folder, model, tokenizer)
        beside = dict(companions or {})
        for name, other in beside.items():
            (folder / name).mkdir()
            save_pretrained(folder / name, other.model, other.tokenizer)
        optimizers = {name: other.optimizer_state for name, other in beside.items()}
        torch.save({"optimizer": optimizer_state or {}, "companions": optimizers, "rng": rng or rng_state()}, folder / _TENSORS)
        state = {"format": FORMAT, "step": step, "scheduler": scheduler_state or {}, "data": data_state or {}, "extra": extra or {}}
        state["companions"] = {name: other.scheduler_state for name, other in beside.items()}
        _seal(folder, state)
    _rotate(output_dir, save_total_limit, newest=final)
    return final


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the training state of a checkpoint folder and checks that every file is there in full.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is not a checkpoint, or it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint: expected a folder, got {path}, which does not exist; `latest` takes the newest in output_dir")
    state = _read_state(path)
    try:
        tensors = torch.load(path / _TENSORS, map_location="cpu", weights_only=True)
        optimizer, rng = tensors["optimizer"], tensors["rng"]
        beside = {name: {"optimizer": own, "scheduler": state["companions"][name]} for name, own in tensors.get("companions", {}).items()}
    except Exception as error:  # torch reports damage as RuntimeError, UnpicklingError, EOFError, …
        raise _damaged(path, f"{_TENSORS} cannot be read ({type(error).__name__})") from error
    return Checkpoint(path, state["step"], optimizer, state["scheduler"], state["data"], rng, state["extra"], beside)


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, or None. What a killed write left is passed over."""
    found = _checkpoints(Path(output_dir))
    return found[-1] if found else None


def remove_leftovers(output_dir: str | Path) -> None:
    """Removes what killed writes left in `output_dir`."""
    for entry in Path(output_dir).glob(f"*{TEMPORARY_SUFFIX}"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


@contextmanager
def _staged(final: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `final` at the end of the block, and is removed when the block fails."""
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final.parent)
    temporary = final.with_name(final.name + TEMPORARY_SUFFIX)
    try:
        temporary.mkdir()
        yield temporary
        _replace_directory(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _seal(folder: Path, state: dict[str, Any]) -> None:
    """Syncs every file, then writes the state with their sizes."""
    names = files_below(folder)
    for name in names:
        fsync_file(folder / name)
    state["files"] = {name: (folder / name).stat().st_size for name in names}
    with open(folder / _STATE, "w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(folder)


def _replace_directory(temporary: Path, final: Path) -> None:
    if final.exists():  # a rerun over the same step: a non-empty folder cannot be the target of a rename
        old = final.with_name(final.name + ".old" + TEMPORARY_SUFFIX)
        os.rename(final, old)
        os.rename(temporary, final)
        shutil.rmtree(old)
    else:
        os.rename(temporary, final)
    fsync_directory(final.parent)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(m[1]), path) for path in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / _STATE).is_file()]


def _rotate(output_dir: Path, limit: int, newest: Path) -> None:
    if limit > 0:
        older = [path for path in _checkpoints(output_dir) if path != newest]
        for path in older[: max(0, len(older) - (limit - 1))]:
            shutil.rmtree(path)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        expected = state["files"]
    except FileNotFoundError:
        raise ValueError(f"{path} is not a checkpoint: it has no {_STATE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{_STATE} cannot be read") from error
    if state.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path}: expected format {FORMAT}, got {state.get('format')}; it was written by another version")
    for name, size in expected.items():
        got = (path / name).stat().st_size if (path / name).is_file() else None
        if got != size:
            raise _damaged(path, f"{name} should have {size} bytes, " + ("it is missing" if got is None else f"it has {got}"))
    return state


def _damaged(path: Path, why: str) -> ValueError:
    earlier = [p for p in _checkpoints(path.parent) if p != path]
    remedy = f"resume from {earlier[-1]} instead" if earlier else "there is no other checkpoint beside it"
    return ValueError(f"checkpoint {path} is damaged: {why}; {remedy}")
