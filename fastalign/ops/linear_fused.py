"""The loop of the ops whose gradient is known in the forward, and the Function that ties the result to autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.head_gradient import Loan
from fastalign.ops.linear_chunks import Gradients, RowGrads, Rows, backward_chunk, forward_chunk, join_rows
from fastalign.ops.linear_head import Head, even_chunks, head_logits
from fastalign.ops.once import once, unscaled

Judge = Callable[[Rows, slice], RowGrads | None]
KnownLogits = Callable[[slice, torch.dtype, Tensor], Tensor | None]  # (rows, dtype, buffer) → which of the rows it did not write, or None


def wanted_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Which of the inputs autograd wants a gradient for."""
    on = torch.is_grad_enabled()
    return on and hidden.requires_grad, on and weight.requires_grad, on and bias is not None and bias.requires_grad


class Fused:
    """Logits, judgement and gradients of one chunk after another, in one reused buffer."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        targets: Tensor,
        wanted: tuple[bool, bool, bool],
        loan: Loan | None,
        num_chunks: int,
        *,
        entropy: bool = True,
        known_logits: KnownLogits | None = None,
    ) -> None:
        self.head, self.hidden, self.targets, self.loan, self.known_logits = head, hidden, targets, loan, known_logits
        self.into = Gradients.of(head, len(targets), wanted, loan=loan, only_chunk=num_chunks == 1)
        self.wanted, self.entropy, self.num_chunks, self._gemm_rows = wanted, entropy, num_chunks, 0

    @property
    def flops_tvh(self) -> float:
        """Floating-point operations of the GEMMs in units of T·V·H."""
        return 2.0 * self._gemm_rows / max(1, len(self.targets))

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dL/dhidden, dL/dweight, dL/dbias."""
        return self.into.hidden, self.into.head_gradient(), self.into.bias

    def whole(self, span: slice, judge: Judge) -> None:
        """One chunk, one pass: 6TVH at most."""
        with self._buffer(span.stop - span.start) as buffer:
            logits, rows = self._forward(span, buffer)
            grads = judge(rows, span)
            if grads is not None:
                self._backward(logits, span, rows, grads)

    def twice(self, span: slice, judge: Judge, chunk: int) -> None:
        """A unit larger than a chunk: its log-probs first, then its logits again with the gradient. 8TVH at most."""
        parts = even_chunks(span.start, span.stop, chunk)
        self.num_chunks += len(parts) - 1
        self.into.keep_fp32()
        with self.head.borrowed(chunk) as buffer:
            found = [self._forward(part, buffer)[1] for part in parts]
            rows = join_rows(found, self.head.weight)
            grads = judge(rows, span)
            for part in parts if grads is not None else ():
                assert grads is not None
                here = slice(part.start - span.start, part.stop - span.start)
                if bool(grads.of(here).active().any()):
                    logits, _ = self._forward(part, buffer)
                    self._backward(logits, part, rows.of(here), grads.of(here))
                    del logits

    def _buffer(self, rows: int) -> AbstractContextManager[Tensor]:
        if self.loan is not None and self.loan.for_factors:
            return nullcontext(self.loan.buffer())
        return self.head.borrowed(rows)

    def _forward(self, span: slice, buffer: Tensor) -> tuple[Tensor, Rows]:
        known = None if self.known_logits is None else self._known(span, buffer, self.known_logits)
        self._gemm_rows += span.stop - span.start if known is None else 0
        return forward_chunk(self.head, self.hidden[span], self.targets[span], entropy=self.entropy, buffer=buffer, known=known)

    def _known(self, span: slice, buffer: Tensor, known_logits: KnownLogits) -> Tensor | None:
        """The logits of the rows in the buffer, those computed that nobody knows; None where all are to be computed."""
        head, rows = self.head, span.stop - span.start
        missing = known_logits(span, head.logits_dtype, buffer[:rows])
        if missing is None or len(missing) == rows:
            return None
        if len(missing):
            buffer[missing] = head_logits(self.hidden[span][missing], head.weight, head.bias, wide=head.wide)
            self._gemm_rows += len(missing)
        return buffer[:rows]

    def _backward(self, logits: Tensor, span: slice, rows: Rows, grads: RowGrads) -> None:
        used = backward_chunk(self.head, logits, self.hidden[span], self.targets[span], rows, grads, self.into, span)
        self._gemm_rows += used * self.into.gemms


def tie(
    op: str,
    loss: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    loan: Loan | None = None,
) -> Tensor:
    """The loss as a function of hidden, weight and bias whose backward scales the stored gradients."""
    if loan is None and all(gradient is None for gradient in gradients):
        return loss
    return _Tie.apply(op, *inputs, loss, *gradients, loan)


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        loan: Loan | None,
    ) -> Tensor:
        ctx.op, ctx.loan = op, loan
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
        ctx.save_for_backward(hidden, weight, bias, d_hidden, d_weight, d_bias)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if ctx.loan is not None:
            ctx.loan.add(ctx.op, g)
        hidden, weight, bias, *stored = ctx.saved_tensors
        inputs = [t for t in (hidden, weight, bias) if t is not None]
        grads = [None if d is None else once(ctx.op, _scaled(d, g).to(dtype), *inputs) for d, dtype in zip(stored, ctx.dtypes, strict=True)]
        return (None, *grads, None, None, None, None, None)


def _scaled(stored: Tensor, g: Tensor) -> Tensor:
    """g · stored; the tensor itself for g = 1, which spares a pass over [V, H] (autograd then takes it over without a copy)."""
    if not torch.compiler.is_compiling() and g.device.type == "cpu" and g.item() == 1.0:
        return unscaled(stored)
    return stored * g.to(stored.dtype)
