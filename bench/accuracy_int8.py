"""Products with int8 weights: our rounding against plain torch's with the same integers. What the integers themselves cost is no
rounding error of the kernel: with normal weights the product moves by about 0.9 % of its size, which `sampling_logp_difference` shows."""

from __future__ import annotations

from bench.accuracy import At, Case, Values, accuracy
from fastalign.ops.int8 import int8_linear, int8_linear_reference, quantize


@accuracy("int8")
def int8_product(at: At) -> Case:
    rows, width, out = (17, 173, 61) if at.quick else (130, 896, 500)
    x, weight, bias = at.randn(rows, width), quantize(at.randn(out, width)), at.randn(out).float()
    integers = weight.integers.to(at.dtype)  # exact in bf16, too

    def ours() -> Values:
        return {"out": int8_linear(x, weight, bias)}

    plain = ((x @ integers.t()).float() * weight.scale + bias).to(at.dtype)
    return Case(ours, {"out": plain}, {"out": int8_linear_reference(x.double(), weight, bias)})
