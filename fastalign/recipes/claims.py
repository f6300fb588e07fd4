"""A folder that belongs to one run of one command: what may go on there, and what must not."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..training.files import write_atomic

SETTINGS = "settings.json"
OTHERS = ("config.json", "adapter_config.json", "metrics.jsonl")  # a model's, an adapter's, a training run's


def weights_of(name: str) -> str:
    """What tells a local model's weights from others under the same path: each file's size and time; "" for a model of the Hub."""
    files = sorted(Path(name).expanduser().glob("*.safetensors")) if name else []
    return " ".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files)


def claim(folder: Path, flags: Mapping[str, Any], *, files: Sequence[str], free: Collection[str], overwrite: bool, what: str) -> None:
    """Makes the folder this run's; one that was broken off is recognized by its flags.

    Args:
        files: what the run writes, the one that it goes on with first.
        free: flags that may change when it goes on.
        overwrite: remove what is there.
        what: the run is called in the error.

    Raises:
        FileExistsError: it holds another run's files, or a model.
    """
    for name in OTHERS:
        if (folder / name).exists():
            raise FileExistsError(f"--output_dir {folder} holds a model or a training run ({name}), which stays as it is; name another")
    settings = {name: value for name, value in flags.items() if name not in free}
    settings["weights"] = weights_of(str(flags.get("model_name_or_path", "")))
    path = folder / SETTINGS
    if overwrite:
        for name in (*files, SETTINGS):
            (folder / name).unlink(missing_ok=True)
    elif (folder / files[0]).exists():
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        other = [name for name in settings if known.get(name) != settings[name]]
        if other:
            raise FileExistsError(
                f"--output_dir {folder} holds {what} with other {', '.join(other)}; add --overwrite_output_dir, or name another"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(settings, indent=1) + "\n")
