"""Root-mean-square norm of the last dimension: each row is read once forward and twice backward, and nothing but the input is kept."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backend import native_for, wants_gradient
from fastalign.ops.once import once

_NONE = torch.empty(0, dtype=torch.float32)  # stands for an optional tensor in a native call


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x²) + eps) over the last dimension (arXiv:1910.07467, Eq. 4), differentiable in both.

    Floor: 8 bytes an element in fp32, 12 for the gradients.

    Args:
        x: [..., H]; fp32 and bf16 on the CPU take the kernel (computed in fp32, rounded once), the rest plain torch.
        weight: [H], of x's dtype for the kernel.
        eps: added to the mean square.

    Returns:
        [..., H] in the dtype of weight * x. A row's bits do not depend on the others; the weight's gradient is summed in fp32, in
        blocks of rows, the same whatever the threads.

    Raises:
        ValueError: the weight does not fit.
    """
    shape = weight.shape
    if len(shape) != 1 or x.shape[-1:] != shape:
        raise ValueError(f"rms_norm: expected x [..., H] and weight [H], got {list(x.shape)} and {list(shape)}")
    module = native_for("rms_norm", x, weight) if shape[0] else None
    if module is None:
        return _reference(x, weight, eps)
    if wants_gradient(x, weight):
        return _RmsNorm.apply(module, x, weight, eps)
    return normalized(module, x.contiguous(), weight.contiguous(), eps)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In fp32 (fp64 for fp64), rounded to x's dtype before the weight, as the models of transformers do."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def normalized(module: ModuleType, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` by the native module, unchecked and without a gradient, of operands without gaps."""
    out = torch.empty(x.shape, dtype=x.dtype)
    module.rms_norm(x, weight, eps, out)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: ModuleType, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.eps = module, eps
        return normalized(module, x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_x, d_weight, partial = torch.empty(x.shape, dtype=x.dtype), _NONE, _NONE
        if ctx.needs_input_grad[2]:
            rows = x.numel() // len(weight)
            d_weight, partial = (
                torch.empty(*shape, dtype=torch.float32) for shape in ((len(weight),), (-(-rows // ctx.module.rms_norm_rows), len(weight)))
            )
        ctx.module.rms_norm_backward(x, weight, ctx.eps, grad.contiguous(), d_x, d_weight, partial)
        if not ctx.needs_input_grad[2]:
            return None, once("rms_norm", d_x, x, weight), None, None
        return None, once("rms_norm", d_x, x, weight), once("rms_norm", d_weight.to(weight.dtype), x, weight), None
