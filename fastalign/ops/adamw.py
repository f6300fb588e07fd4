"""One AdamW step in one pass over memory, for fp32 weights and for bf16 weights whose fp32 master is kept as 16 more bits.

The master of a bf16 weight is not a second copy: master_bits = (weight_bits << 16) + tail, with a signed 16-bit tail. The
weight is the bf16 number nearest to its master (ties away from zero), so the model computes with the best bf16 weights there
are, and the master is recovered exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .backend import backend_for, load_native

_NONE = torch.empty(0, dtype=torch.float32)  # stands for an optional tensor in a native call


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 master weights as (bf16 weights, int16 tails), both of the master's shape. Exact, NaN payloads aside.

    Raises:
        TypeError: the master is not fp32.
    """
    if master.dtype != torch.float32:
        raise TypeError(f"split_master: expected float32 master weights, got {master.dtype}")
    bits = master.detach().contiguous().view(torch.int32)
    nan = master.isnan()
    high = torch.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)  # the sum may wrap; its high half is right all the same
    low = torch.where(nan, 0, bits & 0xFFFF)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_master(weight: Tensor, tail: Tensor) -> Tensor:
    """The fp32 master weights of bf16 weights and their int16 tails.

    Raises:
        TypeError: wrong dtypes.
        ValueError: the shapes differ.
    """
    if weight.dtype != torch.bfloat16 or tail.dtype != torch.int16:
        raise TypeError(f"join_master: expected bfloat16 weights and int16 tails, got {weight.dtype} and {tail.dtype}")
    if weight.shape != tail.shape:
        raise ValueError(f"join_master: expected tails of shape {list(weight.shape)}, got {list(tail.shape)}")
    bits = (weight.detach().contiguous().view(torch.int16).to(torch.int32) << 16) + tail.to(torch.int32)
    return bits.view(torch.float32)


@torch.no_grad()
def adamw_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float | Tensor = 1.0,
    tail: Tensor | None = None,
) -> Tensor:
    """AdamW (arXiv:1711.05101, Algorithm 2), in place, with the arithmetic of `torch.optim.AdamW`.

    Args:
        param: fp32, or bf16 with `tail`; any shape, contiguous.
        grad: fp32 or bf16, of the same shape.
        exp_avg, exp_avg_sq: fp32 moments of the same shape, zeros before the first step.
        step: 1 for the first step.
        lr, beta1, beta2, eps, weight_decay: as in `torch.optim.AdamW`.
        grad_scale: multiplies the gradient (clipping, loss scaling) without a pass of its own; a number, or one fp32 element on the
            parameter's device, so that a coefficient computed on a GPU is used there and nothing waits for it. (The norm that
            clipping needs is a pass over the gradients before this one.)
        tail: int16, the low bits of a bf16 parameter's master: zeros at first, or from `split_master`.

    Returns:
        `param`.

    Raises:
        ValueError: shapes, dtypes, devices or step are wrong, a tensor has gaps, or a bf16 parameter comes without its tail.
    """
    scale = grad_scale if isinstance(grad_scale, Tensor) else None
    _check(param, grad, exp_avg, exp_avg_sq, step, tail, scale)
    correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
    rate, constant = lr / correction1, 1.0 if isinstance(grad_scale, Tensor) else grad_scale
    moments = [1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2]
    if backend_for("adamw", param.device) != "native":
        options = [*moments, rate, correction2, eps, constant]
        _reference(param, grad if scale is None else grad.float() * scale, exp_avg, exp_avg_sq, options, tail)
        return param
    module, _ = load_native()
    assert module is not None
    options = [*moments, rate * correction2, eps * correction2, constant]
    tensors = (param, param if tail is None else tail, grad, exp_avg, exp_avg_sq, _NONE if scale is None else scale)
    if param.is_cuda:
        with torch.cuda.device(param.device):
            module.adamw_step_cuda(*tensors, options, torch.cuda.current_stream().cuda_stream)
    else:
        module.adamw_step(*tensors, options)
    if not param.is_inference():
        increment_version(param)  # so that a backward that saved the old weight raises, as after any in-place op of torch
    return param


def _check(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, tail: Tensor | None, scale: Tensor | None) -> None:
    if step < 1:
        raise ValueError(f"adamw_step_: step counts from 1, got {step}")
    expected = torch.float32 if tail is None else torch.bfloat16
    if param.dtype != expected:
        remedy = "; a bfloat16 parameter needs its int16 tail" if tail is None else "; a tail belongs to a bfloat16 parameter"
        raise ValueError(f"adamw_step_: param: expected {expected}, got {param.dtype}{remedy}")
    allowed = {
        "grad": (grad, (torch.float32, torch.bfloat16)),
        "exp_avg": (exp_avg, (torch.float32,)),
        "exp_avg_sq": (exp_avg_sq, (torch.float32,)),
    }
    if tail is not None:
        allowed["tail"] = (tail, (torch.int16,))
    for name, (tensor, dtypes) in allowed.items():
        if tensor.shape != param.shape or tensor.dtype not in dtypes:
            wanted = f"{' or '.join(str(dtype) for dtype in dtypes)} {list(param.shape)}"
            raise ValueError(f"adamw_step_: {name}: expected {wanted}, got {tensor.dtype} {list(tensor.shape)}")
    for name, tensor in (("param", param), *((name, tensor) for name, (tensor, _) in allowed.items())):
        if not tensor.is_contiguous():
            raise ValueError(f"adamw_step_: {name}: expected a contiguous tensor, got strides {tensor.stride()}")
        if tensor.device != param.device:
            raise ValueError(f"adamw_step_: {name}: expected a tensor on {param.device}, where param is, got one on {tensor.device}")
    if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32 or scale.device != param.device):
        got = f"{scale.dtype} {list(scale.shape)} on {scale.device}"
        raise ValueError(f"adamw_step_: grad_scale: expected a number or one float32 element on {param.device}, got {got}")


def _reference(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, options: list[float], tail: Tensor | None) -> None:
    keep, one_minus_beta1, beta2, one_minus_beta2, step_size, correction2, eps, grad_scale = options
    grad = grad.float() * grad_scale
    exp_avg.lerp_(grad, one_minus_beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=one_minus_beta2)
    master = param if tail is None else join_master(param, tail)
    master.mul_(keep).addcdiv_(exp_avg, (exp_avg_sq.sqrt() / correction2).add_(eps), value=-step_size)
    if tail is not None:
        weight, low = split_master(master)
        param.copy_(weight)
        tail.copy_(low)
