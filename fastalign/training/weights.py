"""The weights on disk, in Hugging Face format (adapters: PEFT format), bit for bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..models.switching import POLICY
from .files import TEMPORARY_SUFFIX, disk_errors, files_below, fsync_directory, fsync_file


def save_model(output_dir: str | Path, model: nn.Module, tokenizer: Any = None) -> None:
    """Saves the final model into `output_dir` itself, beside the logs; plain transformers (adapters: peft) loads it.

    The files are written to a temporary folder and moved in one by one with config.json last, so that a kill in
    between leaves a folder that does not load rather than one that loads a mixture.

    Raises:
        OSError: the disk is full; a model saved there before is intact.
    """
    output_dir = Path(output_dir)
    temporary = output_dir / ("model" + TEMPORARY_SUFFIX)
    with disk_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            save_pretrained(temporary, model, tokenizer)
            for file in files_below(temporary):
                fsync_file(temporary / file)
            _move_model(temporary, output_dir)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def restore_weights(model: nn.Module, path: str | Path) -> None:
    """Copies a checkpoint's weights into `model` bit for bit, in whatever dtypes they were saved.

    Raises:
        ValueError: names, shapes or dtypes do not match: the checkpoint belongs to another model.
    """
    path, own = Path(path), _named_weights(model)
    missing = set(own)
    for name, tensor in _saved_weights(model, path, own):
        target = own.get(name)
        if target is None or target.shape != tensor.shape or target.dtype != tensor.dtype:
            have = "no such weight" if target is None else f"{tuple(target.shape)} {target.dtype}"
            raise ValueError(f"checkpoint {path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, the model has {have}")
        with torch.no_grad():
            target.copy_(tensor)
        missing.discard(name)
    held = {own[name].data_ptr() for name in set(own) - missing}
    missing = {name for name in missing if own[name].data_ptr() not in held}  # tied weights are saved once
    if missing:
        raise ValueError(f"checkpoint {path}: {len(missing)} weights of the model are not in it, {min(missing)} first")


def save_pretrained(folder: Path, model: Any, tokenizer: Any) -> None:
    """The model (or its adapter) and the tokenizer, without a progress bar for what takes a moment."""
    from transformers.utils import logging  # deferred with the model: transformers takes a second to import

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # other adapters on the same base are others' to save
        model.save_pretrained(folder, **({"selected_adapters": [POLICY]} if POLICY in getattr(model, "peft_config", ()) else {}))
    finally:
        if bars:
            logging.enable_progress_bar()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card would say nothing true of this run


def _named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` writes, under the names it writes them."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict  # deferred: peft is an extra

        return dict(get_peft_model_state_dict(model))
    return dict(model.state_dict())


def _saved_weights(model: Any, path: Path, own: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The saved tensors, one at a time, so that a second copy of the model is never held."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"checkpoint {path}: expected .safetensors files, there are none")
    names = {file: _names(file) for file in files}
    if not hasattr(model, "peft_config") and any(name not in own for group in names.values() for name in group):
        # mixtures of experts are saved under other names than they are held: only transformers knows the mapping
        yield from type(model).from_pretrained(path, dtype="auto", local_files_only=True).state_dict().items()
        return
    for file, group in names.items():
        with safe_open(str(file), "pt") as saved:
            for name in group:
                yield name, saved.get_tensor(name)


def _names(file: Path) -> list[str]:
    with safe_open(str(file), "pt") as saved:
        return list(saved.keys())


def _move_model(temporary: Path, output_dir: Path) -> None:
    names = files_below(temporary)
    entry = ("config.json", "adapter_config.json")  # a loader starts from one of these
    for stale in [*output_dir.glob("config.json"), *output_dir.glob("model*.safetensors*"), *output_dir.glob("adapter_*")]:
        stale.unlink()
    for name in sorted(names, key=lambda name: name in entry):
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / name, output_dir / name)
    fsync_directory(output_dir)
