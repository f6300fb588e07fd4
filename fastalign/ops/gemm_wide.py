"""Products of 16-bit operands with their fp32 sums as results, or added to fp32 sums."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from fastalign.ops import gemm_native
from fastalign.ops.backend import backend_for, load_native
from fastalign.ops.gemm import linear
from fastalign.ops.gemm_native import native_products

WIDE_BLOCK_BYTES = 1 << 20  # of the head, widened at a time: it stays in cache for its GEMM


def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x [N, K] · weight [V, K]ᵀ + bias [V] of 16-bit operands → [N, V] fp32: the sums themselves, not rounded to 16 bits.

    A GPU's GEMM writes them. On the CPU torch's cannot; ours does in bf16, elsewhere blocks of the weight are widened for an fp32
    GEMM. Measured on one core of an AMD EPYC with AVX-512, [512, 896] · [18992, 896]ᵀ: torch's bf16 GEMM 86 ms, ours 90 with
    vdpbf16ps and 228 with AVX2, widened blocks 185, the whole weight widened 236.
    """
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32) if out is None else out
    bias = None if bias is None else bias.float()
    if x.is_cuda:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
        return out if bias is None else out.add_(bias)
    module = native_products(torch.bfloat16)
    if module is not None and x.dtype == weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        gemm_native.add_(module, out, x, weight.t(), bias=bias, first=True)
        return out
    module = _native_bf16(x, weight)
    if module is not None and module.isa() != "baseline" and x.numel():
        even = F.pad(x, (0, x.shape[1] % 2)).contiguous()  # the kernel reads pairs
        module.bf16_product_rows(even, weight, x.new_empty(0, dtype=torch.float32) if bias is None else bias, out)
        return out
    wide = x.float()
    block = max(64, WIDE_BLOCK_BYTES // (4 * max(1, x.shape[1])))
    with torch.autocast("cpu", enabled=False):  # it would narrow them again
        for v in range(0, weight.shape[0], block):
            out[:, v : v + block] = linear(wide, weight[v : v + block].float(), None if bias is None else bias[v : v + block])
    return out


def add_natively(total: Tensor, a: Tensor, b: Tensor, *, alpha: float, first: bool) -> bool:
    """total [M, N] (+)= alpha · a [K, M]ᵀ · b [K, N] as one kernel; False, and nothing done, where torch's GEMM is faster.

    torch rounds the product to bf16 and adds it in a second pass. Measured as above, K=512 M=75968 N=896: torch's GEMM alone
    358 ms, with the sums in blocks 405, this 348. On 2 cores of an Intel Xeon with AMX, K=512 M=151936 N=896: torch's GEMM, which
    writes bf16, 123 ms, this 101.
    """
    if a.dtype == b.dtype == total.dtype == torch.float32 and total.device.type == "cpu":
        module = native_products(torch.float32) if total.stride(1) == 1 else None
        if module is not None:
            gemm_native.add_(module, total, a.t(), b, alpha=alpha, first=first)
        return module is not None
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16 or total.device.type != "cpu":
        return False
    module = native_products(torch.bfloat16)
    if module is not None and total.dtype == torch.float32:
        gemm_native.add_(module, total, a.t(), b, alpha=alpha, first=first)
        return True
    if module is not None and first and total.dtype == torch.bfloat16:
        gemm_native.store_(module, total, a.t(), b, alpha=alpha)
        return True
    module = _native_bf16(a, b)
    if module is None or not module.has_bf16_dot() or total.dtype != torch.float32 or total.stride(1) != 1:
        return False
    module.bf16_product_columns(a, b, total, alpha, not first)
    return True


def add_widened_(total: Tensor, part: Tensor, alpha: float) -> None:
    """total += alpha · part, fp32 += bf16 on the CPU, both contiguous; torch would write a fp32 copy of the part and read it back."""
    module = load_native()[0]
    if module is None or part.dtype != torch.bfloat16 or total.device.type != "cpu" or backend_for("gemm", "cpu") != "native":
        total.add_(part, alpha=alpha)
    else:
        module.add_widened(total, part, alpha)


def _native_bf16(a: Tensor, b: Tensor) -> ModuleType | None:
    """The native module, if these operands are for its bf16 products."""
    plain = a.dtype == b.dtype == torch.bfloat16 and a.device.type == b.device.type == "cpu"
    fits = plain and a.stride(1) == b.stride(1) == 1 and backend_for("linear_logp", "cpu") == "native"
    return load_native()[0] if fits else None
