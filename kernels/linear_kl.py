"""linear_kl's row kernel: divergence of a student's row of logits from a teacher's, and its gradient in the student's place.

Formula: csrc/math/divergence.h (the same terms, which are never negative, and the same series where the two are close).
Layout: student, teacher [N, V] fp32, bf16 or fp16, rows contiguous, any row stride; state [N, 5] fp32 (student's raw maximum
and sum of e^((x - maximum) / temperature), teacher's, center of the gradient).
Grid: one program a row, which loops over blocks of the vocabulary, so that a row's result does not depend on the others.
Bytes a row of V elements: each side is read twice for the divergence, once more for the gradient, which is written once; after
the first read a row is in the L2 cache.
Numerics: fp32; every lane of the block has its own sums, added in a fixed tree at the end. No atomics: the same bits each run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
NEAR = tl.constexpr(0.5)  # |d| below which the second-order series is used
FORWARD, REVERSE, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _bregman(d):
    """e^-d - 1 + d for |d| < NEAR."""
    p = d * -2.7557319e-6 + 2.4801587e-5
    p = p * d - 1.9841270e-4
    p = p * d + 1.3888889e-3
    p = p * d - 8.3333333e-3
    p = p * d + 4.1666667e-2
    p = p * d - 1.6666667e-1
    p = p * d + 0.5
    return (p * d) * d


@triton.jit
def _kl_term(p, q, d):
    """p (d - 1) + q with q = p e^-d."""
    term = tl.where(tl.abs(d) < NEAR, p * _bregman(d), p * (d - 1.0) + q)
    return tl.where(p == 0.0, q, term)


@triton.jit
def _mixed(p_s, p_t, d, beta, rest):
    """The term of a JSD element, and s - m; everything is taken from the larger of the two probabilities."""
    larger = tl.where(d > 0.0, p_t, p_s)
    weight, near = tl.where(d > 0.0, rest, beta), tl.where(d > 0.0, beta, rest)
    a = tl.abs(d)
    a = tl.where(larger == 0.0, 0.0, tl.where(a > 100.0, 100.0, a))
    down = tl.exp(-a)
    x = weight * tl.where(a < NEAR, _bregman(a) - a, down - 1.0)
    y = near + weight * down
    p = x * 7.0376836292e-2 - 1.1514610310e-1  # log(1 + x) = x - x^2 / 2 + x^3 p for x > -0.29
    p = p * x + 1.1676998740e-1
    p = p * x - 1.2420140846e-1
    p = p * x + 1.4249322787e-1
    p = p * x - 1.6668057665e-1
    p = p * x + 2.0000714765e-1
    p = p * x - 2.4999993993e-1
    p = p * x + 3.3333331174e-1
    small = x > -0.29
    log1p = tl.where(small, x + (x * x) * (p * x - 0.5), tl.log(y))
    excess = tl.where(small, (x * x) * (x * (p * y - 0.5) + 0.5), y * log1p - x)
    back = tl.where(a < NEAR, down * _bregman(-a), (1.0 - down) - a * down)
    return larger * (weight * back - excess), tl.where(d > 0.0, -(a + log1p), -log1p)


@triton.jit
def _load(row, at, vocab):
    return tl.load(row + at, mask=at < vocab, other=-float("inf")).to(tl.float32)


@triton.jit
def _row_sum(row, vocab, inv_temperature, BLOCK: tl.constexpr):
    """(raw maximum, sum of e^((x - maximum) / temperature)) of a row."""
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, vocab, BLOCK):
        x = _load(row, begin + lanes, vocab)
        higher = tl.where(x > top, x, top)
        base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing but -inf so far: any finite number will do
        total = total * tl.exp((top - base) * inv_temperature) + tl.exp((x - base) * inv_temperature)
        top = higher
    highest = tl.max(top, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    return highest, tl.sum(total * tl.exp((top - base) * inv_temperature), 0)


@triton.jit
def _element(student, teacher, at, vocab, inv_temperature, s_max, s_sum, t_max, t_sum):
    """p_s, p_t and d = t - s; beyond the row, as where both logits are -inf, both probabilities are 0 and d is NaN."""
    x, y = _load(student, at, vocab), _load(teacher, at, vocab)
    s, t = (x - s_max) * inv_temperature, (y - t_max) * inv_temperature
    ratio = tl.log(tl.div_rn(t_sum, s_sum))
    shift = (t_max - s_max) * inv_temperature + ratio
    d = tl.where(tl.abs(shift) < 8.0, (y - x) * inv_temperature - shift, (t - s) - ratio)
    return tl.exp(s) * tl.div_rn(1.0, s_sum), tl.exp(t) * tl.div_rn(1.0, t_sum), d


@triton.jit
def _slope(p_s, p_t, d, center, beta, rest, KIND: tl.constexpr):
    if KIND == FORWARD:
        return tl.where(tl.abs(d) < NEAR, p_t * (_bregman(d) - d), p_s - p_t)
    elif KIND == REVERSE:
        return tl.where(p_s == 0.0, 0.0, p_s * (-d - center))
    else:
        return (p_s * rest) * (_mixed(p_s, p_t, d, beta, rest)[1] - center)


@triton.jit
def kl_rows_kernel(
    student, teacher, found, state, g,
    vocab, student_stride, teacher_stride, inv_temperature, beta, rest,
    KIND: tl.constexpr, KNOWN: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KNOWN: the state is given. GRADIENT: the student's logits become g · their gradient. beta + rest = 1."""
    index = tl.program_id(0).to(tl.int64)
    student += index * student_stride
    teacher += index * teacher_stride
    state += index * 5
    lanes = tl.arange(0, BLOCK)
    if KNOWN:
        s_max, s_sum, t_max, t_sum = tl.load(state), tl.load(state + 1), tl.load(state + 2), tl.load(state + 3)
        center = tl.load(state + 4)
    else:
        s_max, s_sum = _row_sum(student, vocab, inv_temperature, BLOCK)
        t_max, t_sum = _row_sum(teacher, vocab, inv_temperature, BLOCK)
        values, centers = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for begin in range(0, vocab, BLOCK):
            p_s, p_t, d = _element(student, teacher, begin + lanes, vocab, inv_temperature, s_max, s_sum, t_max, t_sum)
            if KIND == FORWARD:
                values += _kl_term(p_t, p_s, d)
            elif KIND == REVERSE:
                values += _kl_term(p_s, p_t, -d)
                centers += tl.where(p_s == 0.0, 0.0, -p_s * d)
            else:
                term, to_mixture = _mixed(p_s, p_t, d, beta, rest)
                values += term
                centers += p_s * to_mixture
        center = tl.sum(centers, 0)
        tl.store(found + index, tl.sum(values, 0))
        tl.store(state, s_max)
        tl.store(state + 1, s_sum)
        tl.store(state + 2, t_max)
        tl.store(state + 3, t_sum)
        tl.store(state + 4, center)
    if GRADIENT:
        upstream = tl.load(g + index)
        for begin in range(0, vocab, BLOCK):
            at = begin + lanes
            p_s, p_t, d = _element(student, teacher, at, vocab, inv_temperature, s_max, s_sum, t_max, t_sum)
            slope = _slope(p_s, p_t, d, center, beta, rest, KIND) * (upstream * inv_temperature)
            slope = tl.where(upstream == 0.0, 0.0, slope)
            tl.store(student + at, slope.to(student.dtype.element_ty), mask=at < vocab)


def kl_rows(
    student: Tensor,
    teacher: Tensor,
    kind: int,
    beta: float,
    inv_temperature: float,
    found: Tensor | None,
    state: Tensor,
    g: Tensor | None,
) -> None:
    """Fills found [N] and state [N, 5]; without `found` the state is given. With g [N] the gradient replaces the student's logits."""
    num_rows, vocab = student.shape
    if num_rows == 0:
        return
    assert student.stride(1) == 1 or vocab == 1
    assert teacher.stride(1) == 1 or vocab == 1
    assert state.is_contiguous()
    with torch.cuda.device_of(student):
        kl_rows_kernel[(num_rows,)](
            student, teacher, state if found is None else found, state, state if g is None else g,
            vocab, student.stride(0), teacher.stride(0), inv_temperature, beta, 1.0 - beta,
            KIND=kind, KNOWN=found is None, GRADIENT=g is not None, BLOCK=_block(vocab), num_warps=WARPS,
        )  # fmt: skip


def _block(vocab: int) -> int:
    return min(BLOCK, max(128, triton.next_power_of_2(vocab)))


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """What is launched, for ahead-of-time compilation: (kernel, types of its arguments, constants)."""
    rest = {
        "found": "*fp32", "state": "*fp32", "g": "*fp32",
        "vocab": "i32", "student_stride": "i64", "teacher_stride": "i64", "inv_temperature": "fp32", "beta": "fp32", "rest": "fp32",
    }  # fmt: skip
    uses = ((False, False), (False, True), (True, True))  # forward alone, with its gradient, gradient alone
    return [
        (
            kl_rows_kernel,
            {"student": student, "teacher": teacher, **rest},
            {"KIND": kind, "KNOWN": known, "GRADIENT": gradient, "BLOCK": BLOCK},
        )
        for kind in range(3)
        for known, gradient in uses
        for student, teacher in (("*bf16", "*bf16"), ("*fp32", "*fp32"), ("*fp32", "*bf16"), ("*bf16", "*fp32"), ("*fp16", "*fp16"))
    ]
