"""SwiGLU, the gate of an MLP: silu(gate) * up in one pass over memory, and its two gradients in one more."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastalign.ops.backend import native_for, wants_gradient
from fastalign.ops.once import once


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202, Eq. 6 without its products), differentiable in both.

    Floor: 12 bytes an element in fp32, 20 for the gradients; silu(gate) is computed again and never kept.

    Args:
        gate, up: any shape, the same; fp32 and bf16 on the CPU take the kernel (computed in fp32, rounded once), the rest plain torch.

    Returns:
        The shape and dtype of the gate. An element's bits do not depend on the others.

    Raises:
        ValueError: the shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate and up must have one shape, got {list(gate.shape)} and {list(up.shape)}")
    module = native_for("swiglu", gate, up)
    if module is None:
        return F.silu(gate) * up
    if wants_gradient(gate, up):
        return _Swiglu.apply(module, gate, up)
    return gated(module, gate.contiguous(), up.contiguous())


def gated(module: ModuleType, gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` by the native module, unchecked and without a gradient, of operands without gaps."""
    out = torch.empty(gate.shape, dtype=gate.dtype)
    module.swiglu(gate, up, out)
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: ModuleType, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.module = module
        return gated(module, gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(gate.shape, dtype=gate.dtype)
        ctx.module.swiglu_backward(gate, up, grad.contiguous(), d_gate, d_up)
        return None, once("swiglu", d_gate, gate, up), once("swiglu", d_up, gate, up)
