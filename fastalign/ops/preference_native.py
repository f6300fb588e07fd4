"""The native preference losses and their autograd: a Function outside torch.compile, custom ops inside it.

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
    if like.is_cuda:
        with torch.cuda.device(like.device):
            getattr(module, name + "_cuda")(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        getattr(module, name)(*arguments)


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
    none = logp.new_empty(0)
    ref, margin, weight = (none if t is None else t for t in (ref_logp, margin, weight))
    _call("preference_pairs", logp, logp, ref, ref_per_token, cu_targets, margin, weight, name, numbers, tail, losses, metrics, slopes)
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
    none = logp.new_empty(0)
    ref, weight = (none if t is None else t for t in (ref_logp, weight))
    _call("preference_singles", logp, logp, ref, ref_per_token, cu_targets, labels, weight, name, numbers, losses, metrics, slopes)
    return losses, metrics, slopes


def _spread(upstream: Tensor, slopes: Tensor, cu_targets: Tensor, num_tokens: int, unit: int, tail: float) -> Tensor:
    gradient = slopes.new_empty(num_tokens)
    _call("preference_spread", slopes, upstream, slopes, cu_targets, unit, tail, gradient)
    return gradient


class PairLosses(torch.autograd.Function):
    """(logp, cu_targets, ref_logp, margin, weight, ref_per_token, name, numbers, tail) → (losses, metrics)."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, cu_targets: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        losses, metrics, slopes = _run_pairs(logp, cu_targets, *given)
        ctx.save_for_backward(logp, slopes, cu_targets)
        ctx.tail = given[-1]
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return losses, metrics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _metrics: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 9
        logp, slopes, cu_targets = ctx.saved_tensors
        gradient = _spread(upstream, slopes, cu_targets, logp.shape[0], 2, ctx.tail)
        return once("preference_loss", gradient, logp), *(None,) * 8


class SingleLosses(torch.autograd.Function):
    """(logp, cu_targets, labels, ref_logp, weight, ref_per_token, name, numbers) → (losses, metrics)."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, cu_targets: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        losses, metrics, slopes = _run_singles(logp, cu_targets, *given)
        ctx.save_for_backward(logp, slopes, cu_targets)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return losses, metrics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _metrics: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 8
        logp, slopes, cu_targets = ctx.saved_tensors
        gradient = _spread(upstream, slopes, cu_targets, logp.shape[0], 1, 1.0)
        return once("unpaired_loss", gradient, logp), *(None,) * 7


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


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2], inputs[1])
    ctx.num_tokens, ctx.inputs = inputs[0].shape[0], len(inputs)
    ctx.unit, ctx.tail = (2, inputs[-1]) if isinstance(inputs[-1], float) else (1, 1.0)


def _differentiate(ctx: Any, upstream: Tensor, _metrics: Tensor, _slopes: Tensor) -> tuple[Tensor | None, ...]:
    slopes, cu_targets = ctx.saved_tensors
    return (_spread_op(upstream, slopes, cu_targets, ctx.num_tokens, ctx.unit, ctx.tail), *(None,) * (ctx.inputs - 1))


pairs_op.register_autograd(_differentiate, setup_context=_save)
singles_op.register_autograd(_differentiate, setup_context=_save)
