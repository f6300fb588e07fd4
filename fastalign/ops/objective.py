"""Calling an objective: a plain function of the log-probs of whole units, differentiated on those few numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CAPTURED = (
    "linear_loss: the objective uses {} that requires gradients, which would get none; detach it, or compute its loss outside the objective"
)


def evaluate(
    objective: Callable[..., Any], values: tuple[Tensor, ...], span: slice, differentiate: bool
) -> tuple[Tensor, dict[str, Any], tuple[Tensor, ...]]:
    """(share of the loss, {name: sum}, dshare/dvalue for each value or () when not differentiating), all detached.

    Raises:
        ValueError: the objective returns no scalar, or captures tensors that require gradients (they would get none).
    """
    if not differentiate:
        loss, sums = _unpack(objective(*values, span), values[0])
        return loss.detach(), _detached(sums), ()
    if torch.compiler.is_compiling():
        return _traceable(objective, values, span)
    with torch.enable_grad():
        leaves = tuple(v.detach().requires_grad_() for v in values)
        loss, sums = _unpack(objective(*leaves, span), leaves[0])
        if not loss.requires_grad:
            return loss, _detached(sums), tuple(torch.zeros_like(v) for v in values)
        _check_captured(loss, leaves)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), _detached(sums), grads


def _traceable(objective: Callable[..., Any], values: tuple[Tensor, ...], span: slice) -> tuple[Tensor, dict[str, Any], tuple[Tensor, ...]]:
    """The same for torch.compile, which traces torch.func but not autograd.grad in a forward."""

    def share(*leaves: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return _unpack(objective(*leaves, span), leaves[0])

    with torch.enable_grad():
        grads, (loss, sums) = torch.func.grad_and_value(share, argnums=tuple(range(len(values))), has_aux=True)(*values)
    if loss.requires_grad:
        raise ValueError(CAPTURED.format("a tensor"))
    return loss.detach(), _detached(sums), grads


def _unpack(out: Any, like: Tensor) -> tuple[Tensor, dict[str, Any]]:
    loss, sums = out if isinstance(out, tuple) else (out, {})
    if loss is None:
        raise ValueError("linear_loss: the objective returned None; it must return its share of the loss, or (share, {name: sum})")
    if not isinstance(loss, Tensor):
        loss = like.new_full((), loss)
    if loss.numel() != 1:
        raise ValueError(f"linear_loss: the objective must return a scalar (its share of the loss), got shape {list(loss.shape)}; sum it")
    return loss.reshape(()).to(like.dtype), sums


def _detached(sums: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in sums.items()}


def _check_captured(loss: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Walks the objective's graph: every leaf in it must be one of ours."""
    ours = {id(leaf) for leaf in leaves}
    seen: set[Any] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ours:
            raise ValueError(CAPTURED.format(f"a tensor {list(leaf.shape)}"))
        stack.extend(parent for parent, _ in node.next_functions)
