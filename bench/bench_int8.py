"""A linear layer with int8 weights, against the exact weights as the engine multiplies by them, at the row counts of decoding and prefill.

    python bench/bench_int8.py [--quick] [--rounds 5] [--dtype float32] [--clock wall|cpu] [--threads N]

torch is `ops.gemm.linear` with packed weights (bf16: what F.linear makes of them); "dense" is F.linear. The floor is one read of the
integers up to 8 rows, and from there the same multiplications on a square matrix that stays in the cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import run_file
from fastalign.ops import gemm
from fastalign.ops.int8 import int8_linear, quantize

FEW_ROWS = 8
ROWS = (1, 4, 16, 64, 256)


@pytest.mark.parametrize("rows", ROWS)
def bench_int8(versus, device, quick, dtype, rows):
    if device != "cpu":
        pytest.skip("int8 weights are for the CPU")
    out, width = (512, 512) if quick else (4864, 896)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, out))
    packed = quantize(weight)
    bytes_read, flop = float(packed.nbytes + x.nbytes + rows * out * x.element_size()), 2.0 * rows * out * width
    square = torch.randn(256, 256, generator=generator).to(dtype)
    times = max(1, round(flop / (2 * 256**3)))

    def read() -> None:
        packed.words.sum()

    def multiply() -> None:
        for _ in range(times):
            torch.mm(square, square)

    with torch.no_grad(), gemm.packed_weights():
        sides = {
            "fastalign": lambda: int8_linear(x, packed),
            "torch": lambda: gemm.linear(x, weight),
            "dense": lambda: F.linear(x, weight),
            "floor": read if rows <= FEW_ROWS else multiply,
        }
        work = {"bytes": bytes_read} if rows <= FEW_ROWS else {"flop": flop}
        versus("int8 linear", f"M={rows} K={width} N={out}", dtype, sides, **work)


if __name__ == "__main__":
    run_file(__file__)
