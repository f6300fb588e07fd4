"""The native preference losses and their autograd: a Function, whose passes are custom ops where torch.compile traces.

A forward keeps one slope a sequence, dloss/dsum; a backward writes upstream * slope to the sequence's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import load_native
from .once import once


def _call(name: str, like: Tensor, *arguments: Any) -> None:
    module, _ = load_native()
    if like.is_cpu:
        getattr(module, name)(*arguments)
        return
    with torch.cuda.device(like.device):
        getattr(module, name + "_cuda")(*arguments, torch.cuda.current_stream().cuda_stream)


def _run_pairs(
    logp: Tensor,
    cu_targets: Tensor,
    ref_logp: Tensor | None,
    margin: Tensor | None,
    weight: Tensor | None,
    ref_per_token: bool,
    name: str,
    numbers: list[float],
    tail: float,
) -> tuple[Tensor, Tensor, Tensor]:
    num_pairs = cu_targets.shape[0] // 2
    losses, metrics, slopes = logp.new_empty(num_pairs), logp.new_empty(6, num_pairs), logp.new_empty(2 * num_pairs)
    _call("preference_pairs", logp, logp, ref_logp, ref_per_token, cu_targets, margin, weight, name, numbers, tail, losses, metrics, slopes)
    return losses, metrics, slopes


def _run_singles(
    logp: Tensor,
    cu_targets: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None,
    weight: Tensor | None,
    ref_per_token: bool,
    name: str,
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    num = cu_targets.shape[0] - 1
    losses, metrics, slopes = logp.new_empty(num), logp.new_empty(2, num), logp.new_empty(num)
    _call("preference_singles", logp, logp, ref_logp, ref_per_token, cu_targets, labels, weight, name, numbers, losses, metrics, slopes)
    return losses, metrics, slopes


def _spread(upstream: Tensor, slopes: Tensor, cu_targets: Tensor, num_tokens: int, unit: int, tail: float) -> Tensor:
    gradient = slopes.new_empty(num_tokens)
    _call("preference_spread", slopes, upstream, slopes, cu_targets, unit, tail, gradient)
    return gradient


class _Tied(torch.autograd.Function):
    """(logp, losses, (op, slopes, cu_targets, num_tokens, unit, tail)) → losses as a function of logp.

    One output and few inputs: torch wraps each of them, and that is most of what a small batch costs.
    """

    @staticmethod
    def forward(ctx: Any, logp: Tensor, losses: Tensor, plan: tuple[Any, ...]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logp)
        ctx.plan = plan  # nothing in it has a gradient
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, None, None]:
        if upstream is None:
            return None, None, None
        gradient = _spread(upstream, *ctx.plan[1:])
        if torch.is_grad_enabled():  # create_graph
            gradient = once(ctx.plan[0], gradient, *ctx.saved_tensors)
        return gradient, None, None


class _TracedPairs(torch.autograd.Function):
    """The arguments of `_run_pairs` → its results, as torch.func and torch.compile want it: torch spends 20 us on binding this form."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return pairs_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _save(ctx, inputs, output, "preference_loss", 2, inputs[-1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, upstream), None, None, None, None, None, None, None, None


class _TracedSingles(torch.autograd.Function):
    """The same of `_run_singles`."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return singles_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _save(ctx, inputs, output, "unpaired_loss", 1, 1.0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, upstream), None, None, None, None, None, None, None


def pairs(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(losses, metrics) of the arguments of `_run_pairs`; autograd only where there is something to differentiate."""
    if torch.compiler.is_compiling():
        return _TracedPairs.apply(*arguments)[:2]
    losses, metrics, slopes = _run_pairs(*arguments)
    logp, cu_targets = arguments[:2]
    if logp.requires_grad and torch.is_grad_enabled():
        losses = _Tied.apply(logp, losses, ("preference_loss", slopes, cu_targets, logp.shape[0], 2, arguments[-1]))
    return losses, metrics


def singles(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(losses, metrics) of the arguments of `_run_singles`."""
    if torch.compiler.is_compiling():
        return _TracedSingles.apply(*arguments)[:2]
    losses, metrics, slopes = _run_singles(*arguments)
    logp, cu_targets = arguments[:2]
    if logp.requires_grad and torch.is_grad_enabled():
        losses = _Tied.apply(logp, losses, ("unpaired_loss", slopes, cu_targets, logp.shape[0], 1, 1.0))
    return losses, metrics


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor], op: str, unit: int, tail: float) -> None:
    _, metrics, slopes = output
    ctx.save_for_backward(inputs[0], slopes, inputs[1])
    ctx.mark_non_differentiable(metrics, slopes)
    ctx.set_materialize_grads(False)
    ctx.op, ctx.unit, ctx.tail = op, unit, tail


def _gradient(ctx: Any, upstream: Tensor | None) -> Tensor | None:
    if upstream is None:
        return None
    logp, slopes, cu_targets = ctx.saved_tensors
    run = _spread_op if torch.compiler.is_compiling() else _spread
    return once(ctx.op, run(upstream, slopes, cu_targets, logp.shape[0], ctx.unit, ctx.tail), logp)


@torch.library.custom_op("fastalign::preference_pairs", mutates_args=())
def pairs_op(
    logp: Tensor,
    cu_targets: Tensor,
    ref_logp: Tensor | None,
    margin: Tensor | None,
    weight: Tensor | None,
    ref_per_token: bool,
    name: str,
    numbers: list[float],
    tail: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _run_pairs(logp, cu_targets, ref_logp, margin, weight, ref_per_token, name, numbers, tail)


@pairs_op.register_fake
def _(logp: Tensor, cu_targets: Tensor, *_given: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_pairs = cu_targets.shape[0] // 2
    return logp.new_empty(num_pairs), logp.new_empty(6, num_pairs), logp.new_empty(2 * num_pairs)


@torch.library.custom_op("fastalign::preference_singles", mutates_args=())
def singles_op(
    logp: Tensor,
    cu_targets: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None,
    weight: Tensor | None,
    ref_per_token: bool,
    name: str,
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    return _run_singles(logp, cu_targets, labels, ref_logp, weight, ref_per_token, name, numbers)


@singles_op.register_fake
def _(logp: Tensor, cu_targets: Tensor, *_given: Any) -> tuple[Tensor, Tensor, Tensor]:
    num = cu_targets.shape[0] - 1
    return logp.new_empty(num), logp.new_empty(2, num), logp.new_empty(num)


@torch.library.custom_op("fastalign::preference_spread", mutates_args=())
def _spread_op(upstream: Tensor, slopes: Tensor, cu_targets: Tensor, num_tokens: int, unit: int, tail: float) -> Tensor:
    return _spread(upstream, slopes, cu_targets, num_tokens, unit, tail)


@_spread_op.register_fake
def _(upstream: Tensor, slopes: Tensor, cu_targets: Tensor, num_tokens: int, unit: int, tail: float) -> Tensor:
    return slopes.new_empty(num_tokens)
