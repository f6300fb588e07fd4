"""The model as the engine wants it, and whether it is still what it was, however it was changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models.backbone import causal_lm

SAMPLES = 8  # elements of each parameter that are compared: an optimizer's step moves nearly all


def fingerprint(model: nn.Module) -> list[Any]:
    """Equal for two calls unless a weight or buffer changed in between, an adapter was switched on or off, or a hook was set.

    In-place changes count up a tensor's version; those behind torch's back (`.data`, a native kernel) show in the values.
    """
    seen: list[Any] = []
    values = []
    for buffer in causal_lm(model).buffers():
        seen.append((buffer.data_ptr(), _version(buffer)))
    for parameter in causal_lm(model).parameters():
        seen.append((parameter.data_ptr(), _version(parameter)))
        flat = parameter.detach().reshape(-1)
        stride = int(flat.numel() / (SAMPLES + 0.472)) | 1  # golden-ratio steps: no divisor of the width, which would stay in one column
        values.append(flat[::stride][:SAMPLES].float())
    if values:
        seen.append(torch.cat(values).tolist())
    for module in causal_lm(model).modules():
        if module._forward_hooks or module._forward_pre_hooks:
            seen.append([id(hook) for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values()])
        if "_disable_adapters" in vars(module):  # a PEFT layer
            scaling = str(getattr(module, "scaling", None))
            seen.append((module._disable_adapters, str(module.active_adapters), getattr(module, "merged", False), scaling))
    return seen


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() inside; afterwards the modules that were training train again, the others not."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
