"""Row kernels over logits [N, V] for a GPU without the native CUDA ones; Triton twins of csrc/cuda/linear_logp.cu.

logp_rows   S = sum e^(z-m), W = sum (z-m) e^(z-m) over z = softcap * tanh(x / softcap) / temperature, m = max z
            logp = (z_target - m) - log S    lse = m + log S    H = log S - W / S
            correct: no logit beats the target's (none before it is as large, none after it larger)
grad_rows   x <- (g_logp (onehot - p) - g_H p (log p + H)) / temperature * dsoftcap, in place, p = e^(z - lse)

Layout      rows contiguous, row_stride apart, read as packs of 16 bytes; ALIGNED says that every row starts on a 16-byte boundary and
            holds whole packs, and makes each pack one load. Otherwise (an odd vocabulary, a view) elements are loaded one by one.
Grid        logp_rows: N programs, a row each, 512 packs a step; grad_rows: (N, tiles of 512 packs).
Bytes       logp_rows reads the logits once; grad_rows reads and writes them once; rows that get no gradient are only written.
Numerics    fp32. Each of 512 lanes keeps (m, S, W) and rescales once a pack; the lanes are merged in a fixed tree, so a row's result
            depends on that row alone (in its last bits on ALIGNED too: on the vocabulary, not on the batch). Products are not
            contracted into sums: z is one rounded number wherever it appears, and a target that is the maximum has z - m = 0 at any
            size of z. At the target 1 - p is taken as -expm1(log p).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PACKS = 512  # packs a program handles at once: 2 a thread
NUM_WARPS = 8


@triton.jit
def tanh(x):
    """Without libdevice: an odd polynomial below 0.625 (Cephes), where 1 - 2 / (e^2x + 1) would cancel."""
    y = x * x
    p = y * -5.70498872745e-3 + 2.06390887954e-2
    p = p * y - 5.37397155531e-2
    p = p * y + 1.33314422036e-1
    p = p * y - 3.33332819422e-1
    return tl.where(y < 0.390625, (p * y) * x + x, 1.0 - 2.0 / (tl.exp(x + x) + 1.0))


@triton.jit
def soften(x, inv_temperature, softcap, inv_softcap, SOFTCAP: tl.constexpr):
    """A logit after soft-cap and temperature, fp32. -inf stays, as probability 0; the cap would lift it to -softcap."""
    z = x.to(tl.float32)
    if SOFTCAP:
        z = tl.where(z == float("-inf"), z, tanh(z * inv_softcap) * softcap)
    return z * inv_temperature


@triton.jit
def expm1(x):
    """For x <= 0: the Taylor series above -0.5, where e^x - 1 would cancel."""
    series = 1.0 + x * (1.0 / 9)
    for k in tl.static_range(8, 1, -1):
        series = 1.0 + x * series * (1.0 / k)
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def tile_of(vocab, first, PACKS: tl.constexpr, PACK: tl.constexpr, ALIGNED: tl.constexpr):
    """(indices [PACKS, PACK] of a tile, which of them there are)."""
    pack = first + tl.arange(0, PACKS)
    index = pack[:, None] * PACK + tl.arange(0, PACK)[None, :]
    if ALIGNED:
        return index, (pack < vocab // PACK)[:, None]  # the same for a whole pack: one load
    else:
        return index, index < vocab


@triton.jit
def beats(raw, index, at_target, target):
    """1 where a logit makes the target not the first arg-max."""
    return tl.where(index < target, raw >= at_target, raw > at_target).to(tl.int32)


@triton.jit
def weights(z, m):
    """(e^(z-m), (z-m) e^(z-m)); a term of z = -inf is 0 in both, around m = -inf too."""
    down = z - tl.where(m == float("-inf"), 0.0, m)
    e = tl.exp(down)
    return e, tl.maximum(down, -100.0) * e


@triton.jit
def rescale(m, top, total, weighted):
    """(total, weighted) around m, moved to the maximum top >= m."""
    down = tl.where(m == top, 0.0, m - top)
    scale = tl.exp(down)
    return total * scale, tl.where(scale == 0.0, 0.0, scale * (weighted + tl.maximum(down, -100.0) * total))


@triton.jit(do_not_specialize=["vocab", "row_stride"])
def logp_kernel(
    logits, targets, logp, lse, entropy, correct,
    vocab, row_stride, inv_temperature, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, PACKS: tl.constexpr, PACK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * row_stride
    if ALIGNED:
        row = tl.multiple_of(row, 16)
    target = tl.load(targets + n)
    inside = (target >= 0) & (target < vocab)  # outside: NaN, loud and in bounds
    raw_target = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)

    m = tl.full([PACKS], float("-inf"), tl.float32)
    s = tl.zeros([PACKS], tl.float32)
    w = tl.zeros([PACKS], tl.float32)
    lost = tl.zeros([PACKS], tl.int32)
    for first in range(0, tl.cdiv(vocab, PACK), PACKS):
        index, present = tile_of(vocab, first, PACKS, PACK, ALIGNED)
        raw = tl.load(row + index, mask=present, other=float("-inf")).to(tl.float32)
        lost |= tl.max(tl.where(present, beats(raw, index, raw_target, target), 0), 1)
        z = tl.where(present, soften(raw, inv_temperature, softcap, inv_softcap, SOFTCAP), float("-inf"))
        top = tl.maximum(m, tl.max(z, 1))
        s, w = rescale(m, top, s, w)
        m = top
        e, we = weights(z, m[:, None])
        s += tl.sum(e, 1)
        if ENTROPY:
            w += tl.sum(we, 1)

    top = tl.max(m, 0)
    s, w = rescale(m, top, s, w)
    total = tl.sum(s, 0)
    log_sum = tl.log(total)
    own = (soften(raw_target, inv_temperature, softcap, inv_softcap, SOFTCAP) - top) - log_sum
    tl.store(logp + n, own)
    tl.store(lse + n, top + log_sum)
    if ENTROPY:
        tl.store(entropy + n, log_sum - tl.sum(w, 0) / total)
    tl.store(correct + n, ((tl.max(lost, 0) == 0) & (own == own)).to(tl.uint8))


@triton.jit
def grad_of(
    raw, is_target, at_target, lse, row_entropy, g_logp, g_entropy, inv_temperature, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """The gradient at logits that are not the target; at the target, `at_target` stands for the part of the log-prob."""
    z = raw
    slope = inv_temperature
    if SOFTCAP:
        t = tanh(z * inv_softcap)
        z = t * softcap
        slope = inv_temperature * (1.0 - t * t)
    log_p = z * inv_temperature - lse
    p = tl.exp(log_p)
    from_logp = tl.where(is_target, at_target, -g_logp * p)
    if ENTROPY:
        from_logp -= g_entropy * p * (tl.maximum(log_p, -100.0) + row_entropy)
    return from_logp * slope


@triton.jit(do_not_specialize=["vocab", "row_stride"])
def grad_kernel(
    logits, targets, lse, entropy, g_logp, g_entropy,
    vocab, row_stride, inv_temperature, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, PACKS: tl.constexpr, PACK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * row_stride
    if ALIGNED:
        row = tl.multiple_of(row, 16)
    index, present = tile_of(vocab, tl.program_id(1) * PACKS, PACKS, PACK, ALIGNED)
    g = tl.load(g_logp + n)
    h, row_entropy = 0.0, 0.0
    if ENTROPY:
        h = tl.load(g_entropy + n)
        row_entropy = tl.load(entropy + n)
    if (g == 0.0) & (h == 0.0):
        tl.store(row + index, tl.zeros([PACKS, PACK], logits.dtype.element_ty), mask=present)
    else:
        target = tl.load(targets + n)
        inside = (target >= 0) & (target < vocab)
        row_lse = tl.load(lse + n)
        # Every thread reads the target's logit, and one of them writes its gradient there: that one has read it before, and only
        # its copy is used.
        own = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)
        at_target = -g * expm1(soften(own, inv_temperature, softcap, inv_softcap, SOFTCAP) - row_lse)
        raw = tl.load(row + index, mask=present, other=0.0).to(tl.float32)
        slope = grad_of(
            raw, index == target, at_target, row_lse, row_entropy, g, h, inv_temperature, softcap, inv_softcap, SOFTCAP, ENTROPY
        )
        tl.store(row + index, slope.to(logits.dtype.element_ty), mask=present)


def logp_rows(
    logits: Tensor,
    targets: Tensor,
    inv_temperature: float,
    softcap: float,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor,
    correct: Tensor,
) -> None:
    """As the native module's: results go to logp, lse, correct [N], and entropy [N] unless it is empty. softcap 0: none."""
    if len(logits) == 0:
        return
    with_entropy = entropy.numel() > 0
    logp_kernel[(len(logits),)](
        logits, targets, logp, lse, entropy if with_entropy else lse, correct.view(torch.uint8),
        logits.shape[1], logits.stride(0), inv_temperature, softcap, 1.0 / softcap if softcap else 0.0,
        SOFTCAP=softcap > 0, ENTROPY=with_entropy, **layout_of("logp_rows", logits), **OPTIONS,
    )  # fmt: skip


def grad_rows(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor,
    inv_temperature: float,
    softcap: float,
) -> None:
    """As the native module's: logits become their gradient; entropy and g_entropy [N], or empty. softcap 0: none."""
    if logits.numel() == 0:
        return
    with_entropy = g_entropy.numel() > 0
    grad_kernel[len(logits), triton.cdiv(logits.shape[1], PACKS * 16 // logits.element_size())](
        logits, targets, lse, entropy if with_entropy else lse, g_logp, g_entropy if with_entropy else g_logp,
        logits.shape[1], logits.stride(0), inv_temperature, softcap, 1.0 / softcap if softcap else 0.0,
        SOFTCAP=softcap > 0, ENTROPY=with_entropy, **layout_of("grad_rows", logits), **OPTIONS,
    )  # fmt: skip


OPTIONS: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


def layout_of(what: str, logits: Tensor) -> dict[str, Any]:
    """How the kernels read these rows."""
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"{what}: logits: expected contiguous rows, got a stride of {logits.stride(1)}")
    pack = 16 // logits.element_size()
    aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % pack == 0 and logits.shape[1] % pack == 0
    return {"PACKS": PACKS, "PACK": pack, "ALIGNED": aligned}


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what is launched."""
    scalars = {"vocab": "i32", "row_stride": "i32", "inv_temperature": "fp32", "softcap": "fp32", "inv_softcap": "fp32"}
    found = []
    for dtype, pack in (("fp32", 4), ("bf16", 8)):
        for softcap, entropy, aligned in ((0, 0, 1), (0, 1, 1), (1, 1, 1), (0, 1, 0)):
            constexprs = {"SOFTCAP": bool(softcap), "ENTROPY": bool(entropy), "PACKS": PACKS, "PACK": pack, "ALIGNED": bool(aligned)}
            rows = {"logits": f"*{dtype}", "targets": "*i64"}
            logp = rows | {"logp": "*fp32", "lse": "*fp32", "entropy": "*fp32", "correct": "*u8"}
            grad = rows | {"lse": "*fp32", "entropy": "*fp32", "g_logp": "*fp32", "g_entropy": "*fp32"}
            found += [(logp_kernel, logp | scalars, constexprs, OPTIONS), (grad_kernel, grad | scalars, constexprs, OPTIONS)]
    return found
