"""Rotary position embedding of queries and keys: each is read and written once, and the gradient is the transposed rotation."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backend import native_for, wants_gradient
from fastalign.ops.once import once


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin with rotate_half([x1, x2]) = [-x2, x1] (RoFormer, arXiv:2104.09864, Eq. 34), differentiable in x.

    Floor: 8 bytes an element in fp32, each way.

    Args:
        x: [B, H, L, D], D even; fp32 and bf16 on the CPU take the kernel (computed in fp32, rounded once), the rest plain torch.
        cos, sin: [B or 1, L, D], without a gradient of their own there.

    Returns:
        [B, H, L, D] in the dtype of x * cos; from the kernel a view of [B, L, H, D], the order in which attention reads it. A row's
        bits do not depend on the others.

    Raises:
        ValueError: shapes that do not fit together.
    """
    shape, angles = x.shape, cos.shape
    fits = len(shape) == 4 and len(angles) == 3 and angles[1:] == shape[2:] and angles[0] in (1, shape[0]) and angles == sin.shape
    if not fits or shape[3] % 2:
        got = f"{list(x.shape)}, {list(cos.shape)} and {list(sin.shape)}"
        raise ValueError(f"rope: expected x [B, H, L, D] with an even D, cos and sin [B or 1, L, D], got {got}")
    module = None if wants_gradient(cos, sin) else native_for("rope", x, cos, sin)
    if module is None:
        return _reference(x, cos, sin)
    cos, sin = cos.contiguous(), sin.contiguous()
    return _Rope.apply(module, x, cos, sin) if wants_gradient(x) else rotated(module, x, cos, sin)


def _reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def rotated(module: ModuleType, x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """`rope` by the native module, unchecked and without a gradient: cos and sin [B or 1, L, D] without gaps."""
    batch, heads, length, dim = x.shape
    out = torch.empty(batch, length, heads, dim, dtype=x.dtype).transpose(1, 2)
    module.rope(x if x.stride(3) == 1 else x.contiguous(), cos, sin, out, transposed)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: ModuleType, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.module = module
        return rotated(module, x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, once("rope", rotated(ctx.module, grad, cos, sin, transposed=True), grad), None, None
