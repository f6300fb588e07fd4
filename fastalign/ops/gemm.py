"""x · weightᵀ + bias on the CPU in fp32 through oneDNN: a row has the same bits in any batch of two rows or more.

MKL, which torch's `F.linear` calls, changes a row's bits with the row count below 12 rows and is slower where rows are few.
Measured on 2 cores of an AMD EPYC with AVX-512, [64, 512] · [32000, 512]ᵀ: MKL 22.8 ms, oneDNN 13.5, packed 10.5. Dense and
packed weights give the same bits (tested), so the sampler packs and the trainer does not. Everything else goes to `F.linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_Packs = dict[int, tuple[Tensor, Tensor]]  # id of a weight → (the weight, its packed form)
_packing: ContextVar[_Packs | None] = ContextVar("fastalign_packing", default=None)  # one a thread: engines may generate side by side
_PLAIN = (Tensor, torch.nn.Parameter)  # not a fake, a wrapper or a quantized tensor
PACKED_ROWS = 64  # the row count that packed weights are laid out for; any count may use them


def uses_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `linear` takes the oneDNN route for these operands; anything unusual goes to torch, which says what is wrong with it."""
    if not AVAILABLE or torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        return False
    if bias is not None and not (bias.shape == weight.shape[:1] and bias.dtype == torch.float32 and bias.is_contiguous()):
        return False
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return plain and x.numel() > 0 and weight.is_contiguous() and not torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias [N] → [..., N], as `torch.nn.functional.linear`."""
    if not uses_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias)
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same without autograd; inside `packed_weights` each weight is packed at its first use."""
    packs = _packing.get()
    if packs is not None:
        kept = packs.get(id(weight))
        if kept is None:
            kept = packs[id(weight)] = (weight, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS))
        weight = kept[1]
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


@contextmanager
def packed_weights() -> Iterator[None]:
    """Inside, products without a gradient pack each weight once and keep that copy; no weight may change until the end."""
    packs = _packing.get()
    token = _packing.set({} if packs is None else packs)
    try:
        yield
    finally:
        _packing.reset(token)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, weight.shape[0])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            (flat @ weight).view(x.shape) if need_x else None,
            flat.t() @ x.reshape(-1, weight.shape[1]) if need_weight else None,
            flat.sum(0) if need_bias else None,
        )


def _probe() -> bool:
    """Whether this build of torch has the fp32 kernels and they are what is said above."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        x, weight = torch.ones(3, 5), torch.ones(2, 5)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        return all(torch.equal(torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), x @ weight.t()) for w in (weight, packed))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


AVAILABLE = _probe()
