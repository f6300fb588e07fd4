"""policy: per-token log-probs → policy-gradient loss, dL/dlogp and metrics. The equations: fastalign/ops/policy_equations.py.

Formula, a token with log-ratio x = logp - old_logp (saturated at ±20), r = e^x, advantage A, weight w, correction c:
    share = w (c loss(A, r, logp) + kl_coef KL(logp, ref) - entropy_coef H),   grad = dshare/dlogp
For a row with a sequence ratio (gspo, gmpo) r = e^mean(x) of the sequence, and every token gets 1/length of the sequence's slope.
Layout: all [N] fp32 contiguous, offsets [runs+1] int32. Grid: one program a run. A run is `span` tokens, or one sequence where a
ratio or a correction is a sequence's: then a first sweep takes its means, the second its terms, a third spreads the slope; sweeps
after the first read from L2.
Bytes: 16 read a token (logp, old_logp, advantage, weight), 4 more each for ref_logp, sampler_logp and entropy, 4 written.
Numerics: terms in fp32, sums of a run in fp32 by a fixed tree, sums of runs in fp64 in a fixed order (one reduction after the
launch): no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_SUMS = 9
MAX_LOG_RATIO = tl.constexpr(20.0)
LOWEST_LOGP = tl.constexpr(-1e4)

# Branches, numbered as in csrc/math/policy.h.
REINFORCE, CLIP, CISPO, SAPO, GSPO, GSPO_TOKEN, GMPO = (tl.constexpr(i) for i in range(7))
K1, K2, K3 = (tl.constexpr(i) for i in (1, 2, 3))
NONE, TRUNCATE, MASK, SEQUENCE_TRUNCATE, SEQUENCE_MASK = (tl.constexpr(i) for i in range(5))


@triton.jit
def _saturated(x):
    """x inside ±20; NaN stays NaN."""
    return tl.where(x > MAX_LOG_RATIO, MAX_LOG_RATIO, tl.where(x < -MAX_LOG_RATIO, -MAX_LOG_RATIO, x))


@triton.jit
def _is_saturated(x):
    return (x > MAX_LOG_RATIO) | (x < -MAX_LOG_RATIO)


@triton.jit
def _inside(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _read_advantage(pointer, at, mask, RULE: tl.constexpr):
    """A, max(A, 0), or 1 where A > 0."""
    a = tl.load(pointer + at, mask, 0.0)
    if RULE == 1:
        a = tl.where(a < 0, 0.0, a)
    if RULE == 2:
        a = tl.where(a > 0, 1.0, 0.0)
    return a


@triton.jit
def _contribution(x, a, log_epsilon, LOSS: tl.constexpr):
    """What a token adds to its sequence's mean log-ratio, and the slope of that."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if LOSS == GMPO:
        sign = tl.where(a < 0, -1.0, 1.0)
        along = sign * _saturated(x)
        slope = tl.where((along > log_epsilon) | _is_saturated(x), 0.0, 1.0)
        x = sign * tl.where(along > log_epsilon, log_epsilon, along)
    return x, slope


@triton.jit
def _surrogate(logp, log_ratio, ratio, a, low, high, dual_clip, tau_positive, tau_negative, LOSS: tl.constexpr, DUAL: tl.constexpr):
    """Loss and slope of a token."""
    if LOSS == REINFORCE:
        loss, slope = tl.where(a == 0, 0.0, -a * logp), -a
    elif LOSS == CISPO:
        weight = a * _inside(ratio, low, high)
        loss, slope = tl.where(weight == 0, 0.0, -weight * logp), -weight
    else:
        if LOSS == SAPO:
            tau = tl.where(a > 0, tau_positive, tau_negative)
            e = tl.exp(tau * (1.0 - ratio))
            gate = 1.0 / (1.0 + e)
            loss, slope = -a * gate * (4.0 / tau), -a * (4.0 * gate * (e * gate)) * ratio
        elif LOSS == GMPO:
            loss, slope = -a * ratio, -a * ratio
        else:
            plain, limited = -a * ratio, -a * _inside(ratio, low, high)
            loss, slope = tl.where(plain < limited, limited, plain), tl.where(plain < limited, 0.0, plain)
            if DUAL:
                most = -a * dual_clip
                over = (a < 0) & (loss > most)
                loss, slope = tl.where(over, most, loss), tl.where(over, 0.0, slope)
        flat = logp < LOWEST_LOGP if LOSS == GSPO_TOKEN else _is_saturated(log_ratio)
        slope = tl.where(flat, 0.0, slope)
    return loss, slope


@triton.jit
def _divergence(logp, ref_logp, KL: tl.constexpr):
    """The KL's estimate from a token, and its slope; near 0 by series, where e^x - 1 would cancel."""
    d = logp - ref_logp
    if KL == K1:
        value, slope = d, tl.full(d.shape, 1.0, tl.float32)
    elif KL == K2:
        value, slope = 0.5 * d * d, d
    else:
        over = -d > MAX_LOG_RATIO
        x = tl.where(over, MAX_LOG_RATIO, -d)
        small = tl.abs(x) < 0.5
        z = tl.where(small, x, 0.0)
        series = z * z * (0.5 + z * (1 / 6 + z * (1 / 24 + z * (1 / 120 + z * (1 / 720 + z * (1 / 5040 + z / 40320))))))
        grown = tl.exp(x) - 1.0
        value = tl.where(small, series, grown - x)
        slope = tl.where(over, 0.0, -tl.where(small, series + x, grown))
    return value, slope


@triton.jit
def _correction(gap, low, high, CORRECTION: tl.constexpr):
    """The weight of an off-policy token, and 1 where its ratio was out of range."""
    ratio = tl.exp(_saturated(gap))
    if (CORRECTION == TRUNCATE) | (CORRECTION == SEQUENCE_TRUNCATE):
        outside = ratio > high
        ratio = tl.where(outside, high, ratio)
    else:
        outside = (ratio < low) | (ratio > high)
        ratio = tl.where(outside, 0.0, ratio)
    return ratio, tl.where(outside, 1.0, 0.0)


@triton.jit
def policy_kernel(
    logp_ptr, old_ptr, advantage_ptr, weight_ptr, ref_ptr, sampler_ptr, entropy_ptr, cu_ptr, grad_ptr, sums_ptr,
    num_tokens, span, low, high, dual_clip, tau_positive, tau_negative, log_epsilon, kl_coef, entropy_coef, correction_low, correction_high,
    LOSS: tl.constexpr, RULE: tl.constexpr, KL: tl.constexpr, CORRECTION: tl.constexpr, ENTROPY: tl.constexpr, DUAL: tl.constexpr,
    BY_SEQUENCE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One run; see the header."""
    run = tl.program_id(0).to(tl.int64)
    if BY_SEQUENCE:
        begin, end = tl.load(cu_ptr + run).to(tl.int64), tl.load(cu_ptr + run + 1).to(tl.int64)
    else:
        begin = run * span
        end = tl.minimum(begin + span, num_tokens)
    SEQUENCE_RATIO: tl.constexpr = LOSS >= GSPO
    SEQUENCE_CORRECTION: tl.constexpr = CORRECTION >= SEQUENCE_TRUNCATE
    lane = tl.arange(0, SIZE)
    mean = 0.0
    gap_total = 0.0
    if SEQUENCE_RATIO or SEQUENCE_CORRECTION:
        moved = tl.zeros([SIZE], tl.float32)
        gaps = tl.zeros([SIZE], tl.float32)
        for start in range(begin, end, SIZE):
            at = start + lane
            mask = at < end
            old = tl.load(old_ptr + at, mask, 0.0)
            if SEQUENCE_RATIO:
                x = tl.load(logp_ptr + at, mask, 0.0) - old
                moved += _contribution(x, _read_advantage(advantage_ptr, at, mask, RULE), log_epsilon, LOSS)[0]
            if SEQUENCE_CORRECTION:
                gaps += old - tl.load(sampler_ptr + at, mask, 0.0)
        mean = tl.sum(moved, 0) / tl.maximum(end - begin, 1).to(tl.float32)
        gap_total = tl.sum(gaps, 0)

    share = tl.zeros([SIZE], tl.float32)
    pull = tl.zeros([SIZE], tl.float32)
    clip_low = tl.zeros([SIZE], tl.float32)
    clip_high = tl.zeros([SIZE], tl.float32)
    kls = tl.zeros([SIZE], tl.float32)
    ratios = tl.zeros([SIZE], tl.float32)
    squares = tl.zeros([SIZE], tl.float32)
    entropies = tl.zeros([SIZE], tl.float32)
    corrections = tl.zeros([SIZE], tl.float32)
    corrected = tl.zeros([SIZE], tl.float32)
    for start in range(begin, end, SIZE):
        at = start + lane
        mask = at < end
        logp = tl.load(logp_ptr + at, mask, 0.0)
        old = tl.load(old_ptr + at, mask, 0.0)
        weight = tl.load(weight_ptr + at, mask, 0.0)
        a = _read_advantage(advantage_ptr, at, mask, RULE)
        own = logp - old
        near = _saturated(own)
        log_ratio = own
        if SEQUENCE_RATIO:
            log_ratio = tl.zeros([SIZE], tl.float32) + mean
        ratio = tl.exp(_saturated(log_ratio))
        loss, slope = _surrogate(logp, log_ratio, ratio, a, low, high, dual_clip, tau_positive, tau_negative, LOSS, DUAL)
        seen = ratio
        if LOSS == GMPO:
            seen = tl.exp(near)
        clip_low += tl.where(mask & (seen < low) & (a < 0), 1.0, 0.0)
        clip_high += tl.where(mask & (seen > high) & (a > 0), 1.0, 0.0)
        ratios += tl.where(mask, seen, 0.0)
        squares += 0.5 * near * near
        if CORRECTION != NONE:
            gap = tl.zeros([SIZE], tl.float32) + gap_total
            if not SEQUENCE_CORRECTION:
                gap = old - tl.load(sampler_ptr + at, mask, 0.0)
            c, out = _correction(gap, correction_low, correction_high, CORRECTION)
            corrections += tl.where(mask, c, 0.0)
            corrected += tl.where(mask, out, 0.0)
            loss, slope = tl.where(c == 0, 0.0, c * loss), tl.where(c == 0, 0.0, c * slope)
        if SEQUENCE_RATIO and LOSS != GSPO_TOKEN:
            pull += tl.where(weight == 0, 0.0, weight * slope)
            slope = tl.zeros([SIZE], tl.float32)
        if KL != NONE:
            kl, kl_slope = _divergence(logp, tl.load(ref_ptr + at, mask, 0.0), KL)
            kls += kl
            if kl_coef != 0:
                loss += kl_coef * kl
                slope += kl_coef * kl_slope
        if ENTROPY:
            entropy = tl.load(entropy_ptr + at, mask, 0.0)
            entropies += entropy
            if entropy_coef != 0:
                loss -= entropy_coef * entropy
        share += tl.where(weight == 0, 0.0, weight * loss)
        tl.store(grad_ptr + at, tl.where(weight == 0, 0.0, weight * slope), mask)

    if SEQUENCE_RATIO and LOSS != GSPO_TOKEN:
        each = tl.sum(pull, 0) / tl.maximum(end - begin, 1).to(tl.float32)
        for start in range(begin, end, SIZE):
            at = start + lane
            mask = at < end
            x = tl.load(logp_ptr + at, mask, 0.0) - tl.load(old_ptr + at, mask, 0.0)
            moves = _contribution(x, _read_advantage(advantage_ptr, at, mask, RULE), log_epsilon, LOSS)[1]
            tl.store(grad_ptr + at, tl.load(grad_ptr + at, mask, 0.0) + each * moves, mask)

    out = sums_ptr + run * 9
    tl.store(out, tl.sum(share, 0))
    tl.store(out + 1, tl.sum(clip_low, 0))
    tl.store(out + 2, tl.sum(clip_high, 0))
    tl.store(out + 3, tl.sum(kls, 0))
    tl.store(out + 4, tl.sum(ratios, 0))
    tl.store(out + 5, tl.sum(squares, 0))
    tl.store(out + 6, tl.sum(entropies, 0))
    tl.store(out + 7, tl.sum(corrections, 0))
    tl.store(out + 8, tl.sum(corrected, 0))


def policy(inputs: Any, codes: list[int], numbers: list[float], grad: Tensor) -> Tensor:
    """Writes the gradient [N] and returns the sums [9] fp64; `codes` and `numbers` as in csrc/math/policy.h."""
    logp, old_logp, advantages, weights, ref_logp, sampler_logp, entropy, cu_targets = inputs
    loss, rule, kl, correction = codes
    kl, correction = kl if ref_logp is not None else 0, correction if sampler_logp is not None else 0
    by_sequence = loss >= GSPO.value or correction >= SEQUENCE_TRUNCATE.value
    runs = cu_targets.numel() - 1 if by_sequence else triton.cdiv(len(logp), BLOCK)
    sums = torch.empty(runs, NUM_SUMS, dtype=torch.float32, device=logp.device)
    if runs:
        offsets = cu_targets.to(logp.device, non_blocking=True) if by_sequence else cu_targets.new_empty(0, device=logp.device)
        given = (logp, old_logp, advantages, weights, *(logp if t is None else t for t in (ref_logp, sampler_logp, entropy)))
        flags = {"LOSS": loss, "RULE": rule, "KL": kl, "CORRECTION": correction, "ENTROPY": entropy is not None}
        policy_kernel[(runs,)](
            *given, offsets, grad, sums, len(logp), BLOCK, *numbers, **flags, DUAL=numbers[2] > 0, BY_SEQUENCE=by_sequence, SIZE=BLOCK
        )
    return sums.sum(0, dtype=torch.float64)


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """(kernel, signature, constants) of what is launched: every loss plain, and every option once."""
    tensors = [name for name in policy_kernel.arg_names if name.endswith("_ptr")]
    numbers = policy_kernel.arg_names[policy_kernel.arg_names.index("low") : policy_kernel.arg_names.index("LOSS")]
    signature = {name: "*i32" if name == "cu_ptr" else "*fp32" for name in tensors} | {"num_tokens": "i32", "span": "i32"}
    signature |= dict.fromkeys(numbers, "fp32")
    flags = ("LOSS", "RULE", "KL", "CORRECTION", "ENTROPY", "DUAL", "BY_SEQUENCE")
    plain = [(loss, 0, 0, 0, False, False, loss >= GSPO.value) for loss in range(7)]
    full = [
        (1, 2, 3, 1, True, True, False),
        (1, 1, 2, 2, True, False, False),
        (4, 0, 3, 3, True, False, True),
        (0, 0, 1, 4, False, False, True),
    ]
    return [(policy_kernel, signature, dict(zip(flags, row, strict=True)) | {"SIZE": BLOCK}) for row in plain + full]
