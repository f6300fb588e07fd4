"""Linear layers with int8 weights for rollouts on the CPU: a quarter of fp32's bytes, which is what a decoding step waits for.

Weight-only: the weights are 8-bit integers with one scale an output, the activations stay fp32 or bf16, the sums are fp32. An
output is one running sum over K, so a row has the same bits in any batch. The log-probs of what is sampled with such weights are not
the trainer's: on a pretrained model of 260K parameters (fp32, 12,752 sampled tokens) they differ by 0.017 nats in the mean and 0.24 at
most, so the trainer's own forward gives the log-probs that it learns from, and ratios are corrected.

Measured on one core of an AMD EPYC with AVX-512, cold caches, [M, 896] · [4864, 896]ᵀ against packed fp32: M = 1 3.7 times as fast,
4 2.6, 16 1.5, 64 1.1, 256 1.0: from some 16 rows on multiplications are what a product costs, and they stay fp32's.

The head is not quantized. Its own integers would add 0.010 nats in the mean (0.11 at most) to that difference, for a product
[16, 512] · [32000, 512]ᵀ that is 1.26 times as fast in fp32 and no faster in bf16 against packed weights, or at 64 rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastalign.ops.backend import backend_for, load_native

QUANTIZATIONS = ("int8",)
LARGEST = 127  # symmetric: -128 is not used, so a weight and its negative are each other's negative
COLUMNS, DEPTH = 16, 4  # of the packed layout, csrc/cpu/int8.h


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight [N, K] as integers, packed for the kernel.

    Attributes:
        words: [ceil(N / 16), ceil(K / 4), 16] int32: four consecutive K of one output in a word, the first in its low byte; zeros
            where N and K have ended.
        scale: [N] fp32; a weight is its integer times its output's scale.
        shape: (N, K).
    """

    words: Tensor
    scale: Tensor
    shape: tuple[int, int]

    @property
    def integers(self) -> Tensor:
        """[N, K] int8."""
        outputs, width = self.shape
        panels, depth = self.words.shape[:2]
        flat = self.words.transpose(1, 2).reshape(-1).view(torch.int8)
        return flat.view(panels * COLUMNS, depth * DEPTH)[:outputs, :width]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.words.nbytes + self.scale.nbytes


def quantize(weight: Tensor) -> Int8Weight:
    """weight [N, K] fp32 or bf16 on the CPU → integers in [-127, 127], the scale of an output its largest magnitude / 127.

    Rounds to the nearest, halves to even; the error of a weight is at most half its output's scale. An output with a weight that is
    not finite gives NaN in every product, as it does unquantized.

    Raises:
        ValueError: another dtype, shape or device.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16) or weight.device.type != "cpu":
        found = f"{weight.dtype} {list(weight.shape)} on {weight.device}"
        raise ValueError(f"int8: weight: expected float32 or bfloat16 [N, K] on the CPU, got {found}")
    outputs, width = weight.shape
    panels, depth = -(-outputs // COLUMNS), -(-width // DEPTH)
    words = torch.zeros(panels, depth, COLUMNS, dtype=torch.int32)
    scale = torch.zeros(outputs, dtype=torch.float32)
    at_once = max(1, (1 << 18) // max(1, COLUMNS * width))  # panels whose fp32 copies stay in the cache
    for panel in range(0, panels if width else 0, at_once):
        rows = slice(panel * COLUMNS, (panel + at_once) * COLUMNS)
        part = weight.detach()[rows].float().contiguous()
        scale[rows] = part.abs().amax(1) / LARGEST
        integers = (part / scale[rows, None]).nan_to_num_(0.0).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        padded = F.pad(integers, (0, depth * DEPTH - width, 0, -len(part) % COLUMNS))
        words[panel : panel + at_once] = padded.view(torch.int32).view(-1, COLUMNS, depth).transpose(1, 2)
    return Int8Weight(words, scale, (outputs, width))


def int8_linear_reference(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """The definition: (x · integersᵀ) · scale + bias, in fp32 (fp64 for fp64 inputs), rounded to x's dtype at the end."""
    wide = x if x.dtype == torch.float64 else x.float()
    out = wide @ weight.integers.to(wide.dtype).t() * weight.scale.to(wide.dtype)
    return (out if bias is None else out + bias.to(wide.dtype)).to(x.dtype)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] fp32 or bf16 · weight [N, K]ᵀ + bias [N] → [..., N] in x's dtype; no gradient.

    Raises:
        ValueError: shapes that do not fit, another dtype or device.
    """
    outputs, width = weight.shape
    if x.shape[-1:] != (width,) or x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
        found = f"{x.dtype} {list(x.shape)} on {x.device}"
        raise ValueError(f"int8_linear: x: expected float32 or bfloat16 [..., {width}] on the CPU, got {found}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"int8_linear: bias: expected [{outputs}], got {list(bias.shape)}")
    x = x.detach()
    if backend_for("int8", "cpu") != "native":
        return int8_linear_reference(x, weight, None if bias is None else bias.detach())
    rows = x.reshape(-1, width) if width else x.new_empty(x.shape[:-1].numel(), 0)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = x.new_empty(len(rows), outputs)
    start = torch.empty(0, dtype=torch.float32) if bias is None else bias.detach().float().contiguous()
    module, _ = load_native()
    assert module is not None
    module.int8_product(rows, weight.words, weight.scale, start, out)
    return out.view(*x.shape[:-1], outputs)


class QuantizedWeights:
    """Weights as integers, each quantized at its first product and kept until `clear`, which every change of the weights asks for."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Int8Weight]] = {}  # id of a weight → (the weight, so that its id stays its own; its integers)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`int8_linear` with the integers of weight [N, K]."""
        kept = self._kept.get(id(weight))
        if kept is None:
            kept = self._kept[id(weight)] = (weight, quantize(weight))
        return int8_linear(x, kept[1], bias)

    def clear(self) -> None:
        """Forgets every weight; the next product quantizes its weight again."""
        self._kept.clear()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, on this thread, `models.linear.RowLinear`s without a gradient multiply by these integers."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


_active: ContextVar[QuantizedWeights | None] = ContextVar("fastalign_quantized", default=None)  # one a thread, as gemm's packs


def active_weights() -> QuantizedWeights | None:
    """The weights whose `active` block this is."""
    return _active.get()
