"""Gradients that were computed in the forward pass can be differentiated once; a second time must raise, never be silently wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def once(op: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
    """The gradient itself; under create_graph=True a copy whose own backward raises RuntimeError."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    return _Once.apply(op, gradient, *inputs)


def unscaled(stored: Tensor) -> Tensor:
    """A gradient of the forward pass for upstream 1: the tensor itself, which autograd may take over, unless the graph runs again."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return stored.clone() if asked is None or asked() else stored


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: a second derivative was asked for, but its gradient can be differentiated only once;"
            " use fastalign.ops.reference for gradient penalties and Hessians"
        )
