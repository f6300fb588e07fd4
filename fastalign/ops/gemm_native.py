"""Our matrix product (csrc/cpu/gemm.cpp, gemm_tiles.cpp), for CPUs whose products in torch are slow or depend on the batch.

- AVX2 and no AVX-512: torch's bf16 products take the slow way. Measured on 2 cores of an AMD EPYC, [512, 896] and [32000, 896]: 17 GFLOP/s
  forward, 5 and 0.9 for the two gradients; in fp32 16 rows of [512, 512] take oneDNN's packed product 0.16 ms and this 0.08.
- AVX-512, fp32 alone: a decode step has its layers in one call, as products of ours can be called from it. On 2 cores of an AMD EPYC
  (family 25 model 17) against oneDNN's products, in turn: a sequence of a 40M model 1.5 times the tokens a second, 16 sequences 1.2, 256
  as many; an update of it 6 % faster, as the gradients are MKL's otherwise.
- AMX, bf16 alone: a row of torch's product has other bits from some 256 rows on.

fp32 sums of fp32 or bf16 operands; a row's bits are its own, whatever the batch, the threads and the packing. Measured by
bench/bench_gemm.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fastalign.ops.backend import backend_for, load_native

# instruction set → the dtypes that are multiplied here
TAKEN = {"avx2": (torch.float32, torch.bfloat16), "avx512": (torch.float32,), "amx": (torch.bfloat16,)}
STORE_BYTES = 8 << 20
_NONE = torch.empty(0, dtype=torch.float32)


def native_products(dtype: torch.dtype) -> ModuleType | None:
    """The native module where its products of this dtype are the ones to use, else None."""
    module = load_native()[0]
    if module is None or dtype not in TAKEN.get(module.isa(), ()) or backend_for("gemm", "cpu") != "native":
        return None
    return module


def _rounds(module: ModuleType, dtype: torch.dtype, depth: int) -> bool:
    """Whether the product itself writes bf16."""
    return dtype == torch.bfloat16 and depth <= module.gemm_tiles_depth and module.isa() == "amx"


def multiply(module: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias [N] → [..., N] in the dtype of x."""
    return product(module, x.reshape(-1, x.shape[-1]), weight.t(), bias).view(*x.shape[:-1], weight.shape[0])


def product_with(module: ModuleType, packed: Tensor, out: int, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """(x, bias) → x · weightᵀ + bias from the packed form of a weight of `out` rows and this dtype: what a decode step's layers call."""
    gemm_packed, empty = module.gemm_packed, torch.empty

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        result = empty((*x.shape[:-1], out), dtype=torch.float32)
        gemm_packed(x.contiguous(), packed, _NONE if bias is None else bias.float(), result)
        return result

    def multiply_16(x: Tensor, bias: Tensor | None) -> Tensor:
        rounds = _rounds(module, dtype, x.shape[-1])
        result = empty((*x.shape[:-1], out), dtype=dtype if rounds else torch.float32)
        gemm_packed(x.contiguous(), packed, _NONE if bias is None else bias.float(), result)
        return result if rounds else result.to(dtype)

    return multiply if dtype == torch.float32 else multiply_16


def product(module: ModuleType, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] · b [K, N] + bias [N], of any strides, in their dtype."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype)
    if a.dtype == torch.bfloat16:
        store_(module, out, a, b, bias=bias)
    else:
        add_(module, out, a, b, first=True, bias=bias)
    return out


def add_(
    module: ModuleType, total: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, first: bool = False, bias: Tensor | None = None
) -> None:
    """total [M, N] fp32 (+)= alpha · (a · b + bias); `first` overwrites what was there. The rows of total are contiguous."""
    module.gemm(a, b, _NONE if bias is None else bias.float(), total, alpha, not first)


def store_(module: ModuleType, out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, bias: Tensor | None = None) -> None:
    """out [M, N] bf16 = alpha · (a [M, K] · b [K, N] + bias [N]), rounded once; its fp32 sums a part at a time, along the longer side."""
    rows, columns = out.shape
    if _rounds(module, out.dtype, a.shape[1]) and out.stride(1) == 1:
        module.gemm(a, b, _NONE if bias is None else bias.float(), out, alpha, False)
    elif rows >= columns:
        step = max(16, STORE_BYTES // (4 * max(1, columns)))
        for m in range(0, rows, step):
            out[m : m + step] = _sums(module, a[m : m + step], b, alpha, bias)
    else:
        step = max(16, STORE_BYTES // (4 * max(1, rows)))
        for n in range(0, columns, step):
            out[:, n : n + step] = _sums(module, a, b[:, n : n + step], alpha, None if bias is None else bias[n : n + step])


def _sums(module: ModuleType, a: Tensor, b: Tensor, alpha: float, bias: Tensor | None) -> Tensor:
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32)
    add_(module, out, a, b, alpha=alpha, first=True, bias=bias)
    return out


def pack(module: ModuleType, weight: Tensor) -> Tensor:
    """weight [N, K] as panels [·, ·, ·] that are read in order; products with it have the bits of the dense ones."""
    packed = torch.empty(module.gemm_packed_shape(weight.t()), dtype=weight.dtype)
    module.gemm_pack(weight.t(), packed)
    return packed
