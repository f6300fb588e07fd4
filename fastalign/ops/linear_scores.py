"""linear_scores: linear_logp with the other per-token numbers that trainers log, all from one chunk of logits.

For a loss that is not known in the forward. Without gradients 2TVH; frozen head 4TVH (the slope of each row is kept); a
trainable head 8TVH (the logits are computed again for rows whose upstream gradient is not zero), or 6TVH when the upstream
gradient turns out to be one number for all rows, as a mean of log-probs has it (`one_slope`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.gemm import matmul
from fastalign.ops.linear_chunks import Gradients, RowGrads, Rows, dlogits_, forward_chunk, join_rows
from fastalign.ops.linear_head import Head, blas_ready, borrowed, check_inputs, check_targets, chunk_rows, compute_dtype, even_chunks
from fastalign.ops.linear_passes import logp_backward
from fastalign.ops.logits import logp_rows
from fastalign.ops.once import once

OP = "linear_scores"
FIELDS = ("entropy", "correct", "mean_logit", "log_square_sum")


class Scores(NamedTuple):
    """Per row [N], fp32 (fp64 for fp64 inputs); None where it was not asked for.

    logp and entropy in nats; correct (bool): the target is the arg-max; mean_logit: the mean of the capped and tempered
    logits over the vocabulary; log_square_sum: log Σ p², of which exp is the chance that two draws agree.
    """

    logp: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    mean_logit: Tensor | None
    log_square_sum: Tensor | None


@torch.compiler.disable
def linear_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    fields: Collection[str] = (),
    entropy_gradient: bool = False,
    one_slope: bool = False,
    max_chunk_bytes: int | None = None,
) -> Scores:
    """Log-prob of each target, differentiable, and the `fields` that are asked for, without the [N, V] logits.

    Args:
        hidden: [N, H], scored rows only; weight: [V, H], of the same dtype outside autocast; targets: [N] int64; bias: [V].
        fields: which of "entropy", "correct", "mean_logit" and "log_square_sum" to compute.
        entropy_gradient: whether the entropy is differentiable too; nothing else but logp ever is.
        one_slope: expect dL/dlogp to be the same number in every row; the gradient is then taken in the forward. Any other
            upstream gradient is right as well, and costs the logits once more.
        max_chunk_bytes: logits held at once in the forward; None: chosen from the caches.

    Raises:
        ValueError: shapes or dtypes that do not fit, a target outside the vocabulary, an unknown field.
        RuntimeError: on a second differentiation.
    """
    check_inputs(OP, hidden, weight, targets, bias, temperature, logit_softcap)
    unknown = set(fields) - set(FIELDS)
    if unknown:
        raise ValueError(f"{OP}: unknown fields {sorted(unknown)}; there are {', '.join(FIELDS)}")
    targets = targets.long()
    check_targets(OP, targets, weight.shape[0], None)
    dtype = compute_dtype(OP, hidden, weight)
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    options = _Options(
        float(temperature), logit_softcap, frozenset(fields), entropy_gradient and "entropy" in fields, one_slope, max_chunk_bytes
    )
    return Scores(*_Scores.apply(hidden, weight, bias, targets, options))


@dataclass(frozen=True)
class _Options:
    temperature: float
    logit_softcap: float | None
    fields: frozenset[str]
    entropy_gradient: bool
    one_slope: bool
    max_chunk_bytes: int | None


@dataclass
class _Pass:
    """One pass over the chunks: the rows' numbers and, where the forward can give them, gradients."""

    head: Head
    options: _Options
    into: Gradients | None = None  # dL/d(...) for dL/dlogp = 1 in every row
    slope: Tensor | None = None  # dlogp/dhidden [N, H]
    slope_entropy: Tensor | None = None
    rows: list[Rows] = field(default_factory=list)
    mean_logit: list[Tensor] = field(default_factory=list)
    log_square_sum: list[Tensor] = field(default_factory=list)

    def chunk(self, x: Tensor, y: Tensor, span: slice, buffer: Tensor) -> None:
        head, options = self.head, self.options
        logits, rows = forward_chunk(head, x[span], y[span], entropy="entropy" in options.fields, buffer=buffer)
        self.rows.append(rows)
        if "mean_logit" in options.fields:
            self.mean_logit.append(_mean_logit(head, x[span], logits))
        if "log_square_sum" in options.fields:  # Σ p² is the partition sum at half the temperature over the squared one
            _, squares, _, _ = logp_rows(logits, y[span], temperature=head.temperature / 2, logit_softcap=head.logit_softcap)
            self.log_square_sum.append(squares - 2 * rows.lse)
        one = torch.ones_like(rows.lse)
        if self.slope_entropy is not None:
            d_entropy = dlogits_(head, logits.clone(), y[span], rows, RowGrads(torch.zeros_like(one), one))
            self.slope_entropy[span] = matmul(d_entropy, head.weight)
        if self.slope is not None:
            self.slope[span] = matmul(dlogits_(head, logits, y[span], rows, RowGrads(one)), head.weight)
        elif self.into is not None:
            self.into.add(head, dlogits_(head, logits, y[span], rows, RowGrads(one)), x[span], span)

    def scores(self) -> Scores:
        rows, fields = join_rows(self.rows, self.head.weight), self.options.fields
        logp = rows.logp
        return Scores(
            logp,
            (rows.entropy if self.rows else logp.clone()) if "entropy" in fields else None,  # of no rows, both are one tensor
            rows.correct if "correct" in fields else None,
            torch.cat([logp[:0], *self.mean_logit]) if "mean_logit" in fields else None,
            torch.cat([logp[:0], *self.log_square_sum]) if "log_square_sum" in fields else None,
        )


def _mean_logit(head: Head, hidden: Tensor, logits: Tensor) -> Tensor:
    """The mean over the vocabulary, [n]; linear in the head unless it is capped, so it then needs no pass over the logits."""
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    if head.logit_softcap is not None:
        return (torch.tanh(logits.to(wide) / head.logit_softcap) * head.logit_softcap).mean(-1) / head.temperature
    mean = hidden.to(wide) @ head.weight.mean(0, dtype=wide)
    return (mean if head.bias is None else mean + head.bias.mean(dtype=wide)) / head.temperature


class _Scores(torch.autograd.Function):
    """(hidden, weight, bias, targets, options) → the fields of Scores."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        wanted = tuple(ctx.needs_input_grad[:3])
        head = Head(blas_ready(weight), bias, options.temperature, options.logit_softcap)
        rows, _ = chunk_rows(weight.shape[0], weight.element_size(), options.max_chunk_bytes)
        chunks = even_chunks(0, len(targets), rows)
        this = _Pass(head, options)
        ctx.frozen = wanted == (True, False, False)
        if ctx.frozen:
            this.slope = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            this.slope_entropy = torch.empty_like(this.slope) if options.entropy_gradient else None
        elif any(wanted) and options.one_slope and not options.entropy_gradient:
            this.into = Gradients.of(head, len(targets), wanted, only_chunk=len(chunks) == 1)
        x = hidden.contiguous()
        with borrowed(min(rows, len(targets)), weight.shape[0], weight) as buffer:
            for span in chunks:
                this.chunk(x, targets, span, buffer)
        found = this.scores()
        ctx.options, ctx.wanted, ctx.into = options, wanted, this.into
        lse = join_rows(this.rows, weight).lse
        entropy = found.entropy if options.entropy_gradient else None
        if ctx.frozen:
            ctx.save_for_backward(hidden, this.slope, this.slope_entropy)
        elif any(wanted):
            ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        fixed = (None if options.entropy_gradient else found.entropy, *found[2:])
        ctx.mark_non_differentiable(*(t for t in fixed if t is not None))
        return found

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, *_: Any) -> Any:
        if g_logp is None and g_entropy is None:
            return (None,) * 5
        with torch.no_grad():
            grads = _frozen(ctx, g_logp, g_entropy) if ctx.frozen else _trainable(ctx, g_logp, g_entropy)
        inputs = [t for t in ctx.saved_tensors[: 1 if ctx.frozen else 3] if t is not None]
        return (*(once(OP, g, *inputs) if n and g is not None else None for g, n in zip(grads, ctx.wanted, strict=True)), None, None)


def _frozen(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    _, slope, slope_entropy = ctx.saved_tensors
    d_hidden = torch.zeros_like(slope) if g_logp is None else slope * g_logp[:, None].to(slope.dtype)
    if g_entropy is not None:
        d_hidden = d_hidden + slope_entropy * g_entropy[:, None].to(slope.dtype)
    return d_hidden, None, None


def _trainable(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
    into, ctx.into = ctx.into, None  # what is handed out belongs to autograd; a second backward computes it again
    g_logp = torch.zeros_like(lse) if g_logp is None else g_logp
    if into is not None and (len(g_logp) == 0 or bool((g_logp == g_logp[0]).all())):
        scale = g_logp.new_zeros(()) if len(g_logp) == 0 else g_logp[0]
        stored = (into.hidden, into.head_gradient(), into.bias)
        return tuple(
            None if d is None else d.mul_(scale.to(d.dtype)).to(t.dtype) for d, t in zip(stored, (hidden, weight, bias), strict=True)
        )
    options = ctx.options
    more = (hidden, weight, bias, targets, lse, lse.new_empty(0) if entropy is None else entropy)
    return logp_backward(g_logp, g_entropy, None, *more, options.temperature, options.logit_softcap, -100, False, *ctx.wanted)
