"""Our matrix product against torch's, for the three products of a linear layer: forward, and the gradients of input and weight.

    python bench/bench_gemm.py [--quick] [--rounds 5] [--dtype float32] [--clock wall|cpu] [--threads N]

torch is F.linear or torch.mm in the same dtype; "onednn" is the fp32 product that `ops.gemm` takes where there is AVX-512. ours is
`ops.gemm_native` whatever the machine takes by itself, "packed" the same with the weight packed before. The floor is the same number of
multiplications in fp32 on a square matrix that stays in the cache, by torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import run_file
from fastalign.ops import gemm_native
from fastalign.ops.backend import load_native

SHAPES = {"decode": (64, 512, 512), "prefill": (2048, 512, 1376), "head": (512, 512, 32000)}  # rows, width, out
QUICK = {"decode": (16, 128, 128), "prefill": (128, 128, 344), "head": (64, 128, 2000)}


@pytest.mark.parametrize("kind", ["forward", "input gradient", "weight gradient"])
@pytest.mark.parametrize("name", SHAPES)
def bench_gemm(versus, device, quick, dtype, name, kind):
    module = load_native()[0]
    if device != "cpu" or module is None:
        pytest.skip("our products are for the CPU, and need the native module")
    rows, width, out = (QUICK if quick else SHAPES)[name]
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(*size, generator=generator).to(dtype) for size in ((rows, width), (out, width), (rows, out)))
    flop = 2.0 * rows * width * out
    square = torch.randn(256, 256, generator=generator)
    times = max(1, round(flop / (2 * 256**3)))

    def multiply() -> None:
        for _ in range(times):
            torch.mm(square, square)

    with torch.no_grad():
        versus(
            f"gemm {kind}", f"M={rows} K={width} N={out}", dtype, sides_of(module, kind, x, weight, grad) | {"floor": multiply}, flop=flop
        )


def sides_of(module, kind, x, weight, grad):
    """Who computes it: name → call."""
    if kind == "input gradient":
        return {"fastalign": lambda: gemm_native.product(module, grad, weight), "torch": lambda: torch.mm(grad, weight)}
    if kind == "weight gradient":
        return {"fastalign": lambda: gemm_native.product(module, grad.t(), x), "torch": lambda: torch.mm(grad.t(), x)}
    from_packed = gemm_native.product_with(module, gemm_native.pack(module, weight), len(weight), weight.dtype)
    sides = {
        "fastalign": lambda: gemm_native.multiply(module, x, weight),
        "torch": lambda: F.linear(x, weight),
        "packed": lambda: from_packed(x, None),
    }
    if x.dtype == torch.float32:
        sides["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return sides


if __name__ == "__main__":
    run_file(__file__)
