"""The head gradient [V, H]: its sum in fp32, and where it waits between forward and backward when `weight.main_grad` takes it.

With several chunks it waits as a sum in a work buffer. With one chunk only its factors wait, dlogits [n, V] and hidden
[n, H]: the GEMM runs in the backward and adds straight into main_grad, which spares a buffer and two passes over [V, H].
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fastalign.ops.gemm_wide import add_natively, add_widened_
from fastalign.ops.linear_head import MIN_GEMM_ROWS, give, take

BLOCK_BYTES = 4 << 20  # a block of a 16-bit product that stays in cache until it is added
CUDA_BLOCK_BYTES = 128 << 20  # a block of fp32 sums on a GPU: large enough for its GEMM to fill the device
_returnable: list[weakref.ref[Loan]] = []


def add_product_(total: Tensor, dlogits: Tensor, hidden: Tensor, *, alpha: float = 1.0, first: bool = False) -> None:
    """total [V, H] += alpha · dlogits [n, V]ᵀ · hidden [n, H]; `first` overwrites what was there."""
    if add_natively(total, dlogits, hidden, alpha=alpha, first=first):
        return
    if dlogits.dtype == total.dtype:
        total.addmm_(dlogits.t(), hidden, beta=0 if first else 1, alpha=alpha)
        return
    if total.is_cuda:
        _add_on_cuda_(total, dlogits, hidden, alpha=alpha, first=first)
        return
    block = max(64, BLOCK_BYTES // (hidden.shape[1] * dlogits.element_size()))  # no GEMM of torch's adds bf16 products into fp32
    for v in range(0, dlogits.shape[1], block):
        part = torch.mm(dlogits[:, v : v + block].t(), hidden)
        if first:
            torch.mul(part, alpha, out=total[v : v + block])
        else:
            add_widened_(total[v : v + block], part, alpha)


def _add_on_cuda_(total: Tensor, dlogits: Tensor, hidden: Tensor, *, alpha: float, first: bool) -> None:
    """The same by GEMMs that write fp32 sums; before torch 2.11 or so none of torch's adds 16-bit products into fp32."""
    block = dlogits.shape[1] if first else max(64, CUDA_BLOCK_BYTES // (4 * hidden.shape[1]))
    for v in range(0, dlogits.shape[1], block):
        factors, here = (dlogits[:, v : v + block].t(), hidden), total[v : v + block]
        if first:
            torch.mm(*factors, out_dtype=torch.float32, out=here)
        else:
            here.add_(torch.mm(*factors, out_dtype=torch.float32), alpha=alpha)
    if first and alpha != 1.0:
        total.mul_(alpha)


class Loan:
    """Work memory of one loss. It goes back when the loss is freed, or when the next one asks after its backward has run."""

    def __init__(self, main_grad: Tensor, shape: tuple[int, int], dtype: torch.dtype, *, for_factors: bool) -> None:
        while _returnable:
            loan = _returnable.pop()()
            if loan is not None:
                loan.give_back()
        self.main_grad, self.shape, self.for_factors = main_grad, shape, for_factors
        self.flat: Tensor | None = take(shape[0] * shape[1], dtype, main_grad.device)
        self.factors: tuple[Tensor, Tensor] | None = None
        self.total: Tensor | None = None

    def buffer(self) -> Tensor:
        """The memory as [rows, columns]."""
        assert self.flat is not None
        return self.flat[: self.shape[0] * self.shape[1]].view(self.shape)

    def add(self, op: str, scale: Tensor) -> None:
        """main_grad += scale · the head gradient."""
        if self.flat is None:
            raise RuntimeError(
                f"{op}: the head gradient of this loss was given to a later call; call backward twice before the next forward"
            )
        if self.factors is not None:
            add_product_(self.main_grad, *self.factors, alpha=scale.item())
        elif self.total is not None:
            self.main_grad.add_(self.total, alpha=scale.item())
        _returnable.append(weakref.ref(self))

    def give_back(self) -> None:
        """Returns the memory; a later backward of this loss raises."""
        if self.flat is not None:
            give(self.flat)
        self.flat = self.factors = self.total = None

    def __del__(self) -> None:
        self.give_back()


def lend_for(weight: Tensor, dtype: torch.dtype, only_chunk: int, *, op: str = "linear_loss") -> Loan | None:
    """Memory for the gradient of a weight [V, H] that has a `main_grad`; None for one that has not.

    Args:
        dtype: of the GEMM; only_chunk: the rows of the one chunk, 0 when there are several.

    Raises:
        ValueError: main_grad is not fp32 [V, H] on the weight's device, or torch.compile is tracing.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError(f"{op}: weight.main_grad is not available under torch.compile; remove the attribute or do not compile")
    if main_grad.shape != weight.shape or main_grad.dtype != torch.float32 or main_grad.device != weight.device:
        raise ValueError(
            f"{op}: weight.main_grad must be float32 {list(weight.shape)} on {weight.device},"
            f" got {main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}"
        )
    if only_chunk:
        return Loan(main_grad, (max(only_chunk, MIN_GEMM_ROWS), weight.shape[0]), dtype, for_factors=True)
    return Loan(main_grad, (weight.shape[0], weight.shape[1]), torch.float32, for_factors=False)
