"""One draw a row of logits [N, V] by inverse CDF in vocabulary order, and the counter-based uniforms (Philox4x32-10) it takes.

weight      w_j = e^((cap(x_j) - cap(max x)) / temperature), fp32; 0 where x_j = -inf
truncation  top-k, then top-p of what it left, both as one threshold on the logit: the largest key t with count(key >= t) >= k, then
            with mass(key >= t) >= p * mass; a key is a logit's bits in the order of its value, so equal logits stay together and the
            threshold is exact. Bisection over the 32-bit keys: at most 32 passes a threshold, over a row that is in the L2 cache by
            then. Last min-p: w >= min_p.
draw        the block of 4096 tokens where the running sum of kept weights passes u * total, then the token inside it.

Grid        stats_kernel (N, blocks): each block's maximum and its sum of e^(x - own maximum). draw_kernel (N): the draw.
Bytes       nothing truncated: one read of the logits by all SMs, and one block a row. Truncated: 3 to 68 reads more by the row's program.
Numerics    sums are fp32 inside a block, in a fixed tree, fp64 across blocks and at the draw. A row's draw depends on that row alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_logp import soften

BLOCK = 4096
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def key_of(x):
    """int32 in the order of fp32 values; -0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def weigh(x, top, inv_temperature, softcap, inv_softcap, SOFTCAP: tl.constexpr):
    """Weights relative to the logit `top`; the soft-cap would lift -inf to -softcap."""
    if SOFTCAP:
        down = soften(x, inv_temperature, softcap, inv_softcap, True) - soften(top, inv_temperature, softcap, inv_softcap, True)
    else:
        down = x * inv_temperature - top * inv_temperature
    return tl.where(x == float("-inf"), 0.0, tl.exp(down))


@triton.jit
def block_at(row, block, vocab, BLOCK: tl.constexpr):
    """fp32 logits of a block, -inf behind the row's end."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(row + index, mask=index < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def heat_of(temperature):
    """1 / temperature, and 1 for a greedy row."""
    return 1.0 / tl.where(temperature > 0.0, temperature, 1.0)


@triton.jit
def stats_kernel(
    logits, temperature, tops, sums, vocab, row_stride, softcap, inv_softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    n, block = tl.program_id(0), tl.program_id(1)
    x = block_at(logits + n.to(tl.int64) * row_stride, block, vocab, BLOCK)
    top = tl.max(x, 0)
    around = tl.where(top == float("-inf"), 0.0, top)
    w = weigh(x, around, heat_of(tl.load(temperature + n)), softcap, inv_softcap, SOFTCAP)
    at = n.to(tl.int64) * tl.num_programs(1) + block
    bad = tl.max((x != x).to(tl.int32), 0)
    tl.store(tops + at, tl.where(bad != 0, float("nan"), top))
    tl.store(sums + at, tl.sum(w, 0))


@triton.jit
def above(
    row, vocab, top, key, floor, inv_temperature, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """fp64: the mass (MASS) or the number of a row's tokens whose key reaches `key`; their weights must reach `floor` to add mass."""
    found = tl.full([], 0.0, tl.float64)
    for first in range(0, vocab, BLOCK):
        index = first + tl.arange(0, BLOCK)
        x = tl.load(row + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
        bits = (x + 0.0).to(tl.int32, bitcast=True)  # key_of, spelt out: a call costs the interpreter more than all of this
        reaches = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >= key
        if MASS:
            if SOFTCAP:
                w = weigh(x, top, inv_temperature, softcap, inv_softcap, True)
            else:
                w = tl.exp(x * inv_temperature - top * inv_temperature)  # e^-inf is 0
            found += tl.sum(tl.where(reaches & (w >= floor), w, 0.0), 0).to(tl.float64)
        else:
            found += tl.sum((reaches & (index < vocab)).to(tl.int32), 0).to(tl.float64)
    return found


@triton.jit
def threshold(
    row, vocab, top, key, high, wanted, inv_temperature, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key in [key, high] above which there is at least what is wanted; at `key` there is."""
    while key < high:
        middle = (key + high + 1) >> 1
        found = above(
            row, vocab, top, middle.to(tl.int32), 0.0, inv_temperature, softcap, inv_softcap, SOFTCAP, MASS, BLOCK
        )  # fmt: skip
        if found >= wanted:
            key = middle
        else:
            high = middle - 1
    return key


@triton.jit
def draw_kernel(
    logits, uniforms, temperature, top_k, top_p, min_p, tops, sums, tokens, kept,
    vocab, row_stride, num_blocks, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * row_stride
    slot = tl.arange(0, BLOCKS)
    at = n.to(tl.int64) * num_blocks + slot
    block_tops = tl.load(tops + at, mask=slot < num_blocks, other=float("-inf"))
    top = tl.max(block_tops, 0)
    bad = tl.max((block_tops != block_tops).to(tl.int32), 0)
    heat = tl.load(temperature + n)
    if (bad != 0) | (tl.abs(top) == float("inf")):
        tl.store(tokens + n, -1)
        tl.store(kept + n, float("nan"))
    elif heat == 0.0:
        block = tl.min(tl.where(block_tops == top, slot, BLOCKS), 0)
        index = block * BLOCK + tl.arange(0, BLOCK)
        x = block_at(row, block, vocab, BLOCK)
        tl.store(tokens + n, tl.min(tl.where(x == top, index, vocab), 0).to(tl.int64))
        tl.store(kept + n, 1.0)
    else:
        inv_t = heat_of(heat)
        k = tl.load(top_k + n)
        p = tl.load(top_p + n)
        floor = tl.load(min_p + n)
        lowest = key_of(tl.full([1], float("-inf"), tl.float32))
        highest = tl.max(key_of(tl.zeros([1], tl.float32) + top), 0).to(tl.int64)
        key = tl.max(lowest, 0).to(tl.int64)
        total = tl.full([], 0.0, tl.float64)
        left = total
        block = 0
        before = total
        cuts = ((k > 0) & (k < vocab)) | (p < 1.0) | (floor > 0.0)
        if cuts:
            if (k > 0) & (k < vocab):
                wanted = k.to(tl.float64)
                key = threshold(row, vocab, top, key, highest, wanted, inv_t, softcap, inv_softcap, SOFTCAP, False, BLOCK)
            if p < 1.0:
                wanted = p.to(tl.float64) * above(
                    row, vocab, top, key.to(tl.int32), 0.0, inv_t, softcap, inv_softcap, SOFTCAP, True, BLOCK
                )  # fmt: skip
                key = threshold(row, vocab, top, key, highest, wanted, inv_t, softcap, inv_softcap, SOFTCAP, True, BLOCK)
            total = above(row, vocab, top, -(2**31), 0.0, inv_t, softcap, inv_softcap, SOFTCAP, True, BLOCK)
            left = above(row, vocab, top, key.to(tl.int32), floor, inv_t, softcap, inv_softcap, SOFTCAP, True, BLOCK)
            target = tl.load(uniforms + n) * left
            running = total * 0.0
            for b in range(0, num_blocks):
                x = block_at(row, b, vocab, BLOCK)
                w = weigh(x, top, inv_t, softcap, inv_softcap, SOFTCAP)
                mass = tl.sum(tl.where((key_of(x) >= key.to(tl.int32)) & (w >= floor), w, 0.0), 0).to(tl.float64)
                here = (mass > 0.0) & (running <= target)  # the last of these passes the target, or is the last that lives
                block = tl.where(here, b, block)
                before = tl.where(here, running, before)
                running += mass
        else:
            block_mass = tl.load(sums + at, mask=slot < num_blocks, other=0.0)
            block_mass = (block_mass * weigh(block_tops, top, inv_t, softcap, inv_softcap, SOFTCAP)).to(tl.float64)
            target = tl.load(uniforms + n) * tl.sum(block_mass, 0)
            passes = (tl.cumsum(block_mass, 0) > target) & (block_mass > 0.0)
            block = tl.min(tl.where(passes, slot, BLOCKS), 0)
            last = tl.max(tl.where(block_mass > 0.0, slot, 0), 0)
            block = tl.where(block == BLOCKS, last, block)
            before = tl.sum(tl.where(slot < block, block_mass, 0.0), 0)
            key = key * 0 - 2**31
            floor = floor * 0.0
            total = before * 0.0 + 1.0
            left = total
        index = block * BLOCK + tl.arange(0, BLOCK)
        x = block_at(row, block, vocab, BLOCK)
        w = weigh(x, top, inv_t, softcap, inv_softcap, SOFTCAP)
        alive = (w > 0.0) & (key_of(x) >= key.to(tl.int32)) & (w >= floor)
        w = tl.where(alive, w, 0.0)
        passes = alive & (before + tl.cumsum(w.to(tl.float64), 0) > target)
        first = tl.min(tl.where(passes, index, vocab), 0)
        last = tl.max(tl.where(alive, index, -1), 0)  # should rounding leave the target just past the block's sum
        tl.store(tokens + n, tl.where(first < vocab, first, last).to(tl.int64))
        tl.store(kept + n, (left / total).to(tl.float32))


@triton.jit(do_not_specialize=["size"])  # it changes from step to step
def philox_kernel(seed, request, sample, position, out, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = index < size
    key = tl.load(seed + index, mask=there, other=0)
    high = tl.load(request + index, mask=there, other=0)
    c0 = tl.load(position + index, mask=there, other=0).to(tl.uint32)
    c1 = tl.load(sample + index, mask=there, other=0).to(tl.uint32)
    c2, c3 = high.to(tl.uint32), (high >> 32).to(tl.uint32)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0, k1 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32), (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    bits = (c0.to(tl.int64) << 21) | (c1 >> 11).to(tl.int64)
    tl.store(out + index, bits.to(tl.float64) * (1.0 / 9007199254740992.0), mask=there)


def sample(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    softcap: float,
    tokens: Tensor,
    kept: Tensor,
) -> None:
    """As the native module's: tokens [N] int64 and kept [N] fp32 of one draw a row. softcap 0: none."""
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    if vocab > 1 and logits.stride(1) != 1:
        raise ValueError(f"sample: logits: expected contiguous rows, got a stride of {logits.stride(1)}")
    num_blocks = triton.cdiv(vocab, BLOCK)
    tops, sums = torch.empty(2, num_rows, num_blocks, device=logits.device)
    scalars = (softcap, 1.0 / softcap if softcap else 0.0)
    shape = {"SOFTCAP": softcap > 0, "BLOCK": BLOCK}
    stats_kernel[num_rows, num_blocks](logits, temperature, tops, sums, vocab, logits.stride(0), *scalars, **shape, **OPTIONS)
    draw_kernel[(num_rows,)](
        logits, uniforms, temperature, top_k, top_p, min_p, tops, sums, tokens, kept, vocab, logits.stride(0), num_blocks, *scalars,
        **shape, BLOCKS=triton.next_power_of_2(num_blocks), **OPTIONS,
    )  # fmt: skip


def philox_uniform(seed: Tensor, request: Tensor, sample: Tensor, position: Tensor, out: Tensor) -> None:
    """As the native module's: out [N] fp64 in [0, 1) from four [N] int64 columns."""
    if out.numel():
        philox_kernel[(triton.cdiv(out.numel(), 128),)](seed, request, sample, position, out, out.numel(), BLOCK=128, num_warps=4)


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what is launched."""
    found: list[Any] = []
    columns = {"uniforms": "*fp64", "temperature": "*fp32", "top_k": "*i64", "top_p": "*fp32", "min_p": "*fp32"}
    scalars = {"softcap": "fp32", "inv_softcap": "fp32"}
    for dtype, softcap in (("fp32", False), ("bf16", False), ("bf16", True)):
        logits, blocks = {"logits": f"*{dtype}"}, {"tops": "*fp32", "sums": "*fp32"}
        shape = {"SOFTCAP": softcap, "BLOCK": BLOCK}
        sizes = {"vocab": "i32", "row_stride": "i32"}
        found.append((stats_kernel, logits | {"temperature": "*fp32"} | blocks | sizes | scalars, shape, OPTIONS))
        results = {"tokens": "*i64", "kept": "*fp32"}
        draw = logits | columns | blocks | results | sizes | {"num_blocks": "i32"} | scalars
        found.append((draw_kernel, draw, shape | {"BLOCKS": 64}, OPTIONS))
    keys = dict.fromkeys(("seed", "request", "sample", "position"), "*i64")
    found.append((philox_kernel, keys | {"out": "*fp64", "size": "i32"}, {"BLOCK": 128}, {"num_warps": 4}))
    return found
