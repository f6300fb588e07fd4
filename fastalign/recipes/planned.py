"""What --dry_run says of the models beside the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..models.adapters import is_adapted
from ..models.shared import why_apart
from .arguments import Arguments
from .rollout_engines import planned_copy
from .setup import Loaded

MIB = 2**20


def planned_models(args: Arguments, loaded: Loaded, *, reads_reference: bool) -> dict[str, Any]:
    """MiB of the frozen reference and of the copy that samples; 0 where the policy's own weights serve."""
    found: dict[str, Any] = {}
    if reads_reference:
        found["memory: reference, MiB"] = 0 if is_adapted(loaded.model) else round(_bytes(loaded.model) / MIB)
    return found | planned_copy(args, loaded)


def planned_critic(args: Arguments, loaded: Loaded) -> dict[str, Any]:
    """MiB of a critic with weights of its own: these, its fp32 gradients and what the optimizer keeps."""
    name = args.ppo.critic_model_name_or_path
    if loaded.shared is not None and not (name and why_apart(loaded.model, name)):
        return {"critic": "an adapter on the policy's weights"}
    count = _parameters(name) if name else sum(p.numel() for p in loaded.model.parameters())
    size = next(loaded.model.parameters()).element_size()
    tails = 2 if size == 2 else 0  # a 16-bit weight's lower half, kept by the optimizer
    return {"memory: critic, its gradients and optimizer, MiB": round(count * (size + 4 + 8 + tails) / MIB)}


def _parameters(folder: str) -> int:
    """How many a model has, without its weights; an adapter's base, which it is merged into."""
    adapter = Path(folder) / "adapter_config.json"
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter.is_file() else folder
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.base_model.parameters())  # type: ignore[union-attr, operator]


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
