"""The native preference losses and their autograd: a Function, whose passes are custom ops where torch.compile traces.

A forward keeps one slope a sequence, dloss/dsum; a backward writes upstream * slope to the sequence's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import load_native, native
from .once import once


def fits(logp: Tensor, cu_targets: Tensor, ref_logp: Tensor | None, margin: Tensor | None, weight: Tensor | None, unit: int) -> int:
    """2 or 1: the native kernels on the CPU take these as they are, with a reference a token, or with sums or none; 0: they may not.

    unit: sequences of a loss; margin and weight have a number of each.
    """
    module = None if torch.compiler.is_compiling() else native()
    if module is None or not hasattr(module, "preference_fits"):
        return 0
    form: int = module.preference_fits(logp, cu_targets, ref_logp, margin, weight, unit)
    return form


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


class _Traced(torch.autograd.Function):
    """(unit, tail, the arguments of an op) → its results, as torch.func and torch.compile want it: this form costs more to bind."""

    @staticmethod
    def forward(unit: int, tail: float, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = LOSSES[unit].op(*inputs)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.unit, ctx.tail, logp, cu_targets, *others = inputs
        _, metrics, slopes = output
        ctx.num_others = len(others)
        ctx.save_for_backward(logp, slopes, cu_targets)
        ctx.mark_non_differentiable(metrics, slopes)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = None
        if upstream is not None:
            logp, slopes, cu_targets = ctx.saved_tensors
            run = spread_op if torch.compiler.is_compiling() else _spread
            gradient = once(LOSSES[ctx.unit].name, run(upstream, slopes, cu_targets, logp.shape[0], ctx.unit, ctx.tail), logp)
        return (None, None, gradient, *(None,) * (ctx.num_others + 1))


def pairs(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(losses, metrics) of the arguments of `_run_pairs`; autograd only where there is something to differentiate."""
    return _losses(2, arguments[-1], arguments)


def singles(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(losses, metrics) of the arguments of `_run_singles`."""
    return _losses(1, 1.0, arguments)


def _losses(unit: int, tail: float, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """unit: sequences of a loss; tail: as `Sequences` has it."""
    if torch.compiler.is_compiling():
        return _Traced.apply(unit, tail, *arguments)[:2]
    losses, metrics, slopes = LOSSES[unit].run(*arguments)
    logp, cu_targets = arguments[:2]
    if logp.requires_grad and torch.is_grad_enabled():
        losses = _Tied.apply(logp, losses, (LOSSES[unit].name, slopes, cu_targets, logp.shape[0], unit, tail))
    return losses, metrics


pairs_op = torch.library.custom_op("fastalign::preference_pairs", _run_pairs, mutates_args=())
singles_op = torch.library.custom_op("fastalign::preference_singles", _run_singles, mutates_args=())
spread_op = torch.library.custom_op("fastalign::preference_spread", _spread, mutates_args=())


class Loss(NamedTuple):
    """What errors call it, its forward, and the same as an op."""

    name: str
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]
    op: Any


LOSSES = {2: Loss("preference_loss", _run_pairs, pairs_op), 1: Loss("unpaired_loss", _run_singles, singles_op)}  # by sequences of a loss


@pairs_op.register_fake
def _(logp: Tensor, cu_targets: Tensor, *_given: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_pairs = cu_targets.shape[0] // 2
    return logp.new_empty(num_pairs), logp.new_empty(6, num_pairs), logp.new_empty(2 * num_pairs)


@singles_op.register_fake
def _(logp: Tensor, cu_targets: Tensor, *_given: Any) -> tuple[Tensor, Tensor, Tensor]:
    num = cu_targets.shape[0] - 1
    return logp.new_empty(num), logp.new_empty(2, num), logp.new_empty(num)


@spread_op.register_fake
def _(upstream: Tensor, slopes: Tensor, cu_targets: Tensor, num_tokens: int, unit: int, tail: float) -> Tensor:
    return slopes.new_empty(num_tokens)
