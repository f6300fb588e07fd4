"""Our matrix product (csrc/cpu/gemm.cpp), for CPUs with AVX2 and no AVX-512, where torch's bf16 products take the slow way.

fp32 sums of fp32 or bf16 operands; a row's bits are its own, whatever the batch, the threads and the packing. Measured on 2 cores of
an AMD EPYC with AVX2: torch's bf16 products of [512, 896] and [32000, 896] reach 17 GFLOP/s forward, 5 and 0.9 for the two gradients;
in fp32 16 rows of [512, 512] take oneDNN's packed product 0.16 ms and this 0.08. bench/bench_gemm.py measures it.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastalign.ops.backend import backend_for, load_native

DTYPES = (torch.float32, torch.bfloat16)
_NONE = torch.empty(0)


def native_products() -> ModuleType | None:
    """The native module where its products are the ones to use, else None."""
    module = load_native()[0]
    return module if module is not None and module.isa() == "avx2" and backend_for("gemm", "cpu") == "native" else None


def multiply(module: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias [N] → [..., N] in the dtype of x."""
    out = torch.empty(*x.shape[:-1], weight.shape[0])
    add_(module, out.view(-1, weight.shape[0]), x.reshape(-1, x.shape[-1]), weight.t(), bias=bias, first=True)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def multiply_packed(module: ModuleType, x: Tensor, packed: Tensor, out: int, bias: Tensor | None = None) -> Tensor:
    """The same from the packed form of a weight of `out` rows; the call of every layer of a decode step."""
    result = torch.empty(*x.shape[:-1], out)
    module.gemm_packed(x.contiguous(), packed, _NONE if bias is None else bias.float(), result)
    return result if x.dtype == torch.float32 else result.to(x.dtype)


def product(module: ModuleType, a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] · b [K, N], of any strides, in their dtype."""
    out = torch.empty(a.shape[0], b.shape[1])
    add_(module, out, a, b, first=True)
    return out.to(a.dtype)


def add_(
    module: ModuleType, total: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, first: bool = False, bias: Tensor | None = None
) -> None:
    """total [M, N] fp32 (+)= alpha · (a · b + bias); `first` overwrites what was there. The rows of total are contiguous."""
    module.gemm(a, b, _NONE if bias is None else bias.float(), total, alpha, not first)


def pack(module: ModuleType, weight: Tensor) -> Tensor:
    """weight [N, K] as panels that are read in order; products with it have the bits of the dense ones."""
    out, width = weight.shape
    panel = module.gemm_panel()
    packed = torch.empty(-(-out // panel), width, panel, dtype=weight.dtype)
    module.gemm_pack(weight.t(), packed)
    return packed
