"""The loop of linear_loss as torch.compile traces it: the same chunks, as custom ops that return what `Fused` keeps in buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.linear_chunks import Gradients, RowGrads, Rows, backward_chunk, forward_chunk
from fastalign.ops.linear_fused import Judge
from fastalign.ops.linear_head import Head, check_targets, even_chunks


class Traced:
    """The interface of `Fused`, without data-dependent control flow outside the ops."""

    def __init__(self, head: Head, hidden: Tensor, targets: Tensor, wanted: tuple[bool, bool, bool], num_chunks: int) -> None:
        self.head, self.hidden, self.targets = head, hidden, targets
        self.wanted, self.num_chunks, self.loan = wanted, num_chunks, None
        self._parts: list[Tensor] = []
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._gemm_rows = 0

    @property
    def flops_tvh(self) -> float:
        """Floating-point operations of the GEMMs in units of T·V·H, with no row skipped."""
        return 2.0 * self._gemm_rows / max(1, self.targets.shape[0])

    def whole(self, span: slice, judge: Judge) -> None:
        """One chunk, one pass."""
        logits, rows = self._forward(span)
        grads = judge(rows, span)
        if grads is not None:
            self._backward(logits, span, rows, grads)

    def twice(self, span: slice, judge: Judge, chunk: int) -> None:
        """Log-probs of all parts first, then their logits again with the gradient."""
        parts = even_chunks(span.start, span.stop, chunk)
        self.num_chunks += len(parts) - 1
        found = [self._forward(part)[1] for part in parts]
        logp, lse, entropy, correct = (torch.cat([r[i] for r in found]) for i in range(4))  # type: ignore[misc]
        rows = Rows(logp, lse, entropy, correct)
        grads = judge(rows, span)
        for part in parts if grads is not None else ():
            assert grads is not None
            here = slice(part.start - span.start, part.stop - span.start)
            self._backward(self._forward(part)[0], part, rows.of(here), grads.of(here))

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dL/dhidden, dL/dweight, dL/dbias."""
        width = self.head.weight.shape[1]
        hidden = torch.cat(self._parts) if self._parts else self.hidden.new_zeros(0, width)
        weight = torch.zeros_like(self.head.weight) if self._weight is None else self._weight
        bias = self.head.weight.new_zeros(self.head.weight.shape[0]) if self._bias is None else self._bias
        found = zip((hidden, weight, bias), self.wanted, strict=True)
        d_hidden, d_weight, d_bias = (value if wanted else None for value, wanted in found)
        return d_hidden, d_weight, d_bias

    def _forward(self, span: slice) -> tuple[Tensor, Rows]:
        self._gemm_rows += span.stop - span.start
        head = self.head
        out = chunk_op(self.hidden[span], head.weight, head.bias, self.targets[span], head.temperature, head.logit_softcap, head.wide)
        return out[0], Rows(*out[1:])

    def _backward(self, logits: Tensor, span: slice, rows: Rows, grads: RowGrads) -> None:
        head = self.head
        assert rows.entropy is not None
        known = (rows.lse, rows.entropy, grads.logp, grads.entropy)
        options = (head.temperature, head.logit_softcap, head.wide, *self.wanted)
        d_hidden, d_weight, d_bias = chunk_grads_op(logits, self.hidden[span], head.weight, head.bias, self.targets[span], *known, *options)
        self._parts.append(d_hidden)
        self._weight = d_weight if self._weight is None else self._weight + d_weight
        self._bias = d_bias if self._bias is None else self._bias + d_bias
        self._gemm_rows += (span.stop - span.start) * (self.wanted[0] + self.wanted[1])


def chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, logit_softcap: float | None, wide: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logits [n, V], logp, lse, entropy, correct [n]) of one chunk."""
    check_targets("linear_loss", targets, weight.shape[0], None)
    head = Head(weight, bias, temperature, logit_softcap, wide)
    logits, rows = forward_chunk(head, hidden, targets, entropy=True)
    assert rows.entropy is not None
    return logits, rows.logp, rows.lse, rows.entropy, rows.correct


def chunk_grads(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    wide: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dhidden [n, H], dL/dweight [V, H] fp32, dL/dbias [V] fp32) of one chunk, empty where not needed; overwrites the logits."""
    head = Head(weight, bias, temperature, logit_softcap, wide)
    into = Gradients.of(head, len(targets), (need_hidden, need_weight, need_bias))
    rows = Rows(lse, lse, entropy, lse)
    backward_chunk(head, logits, hidden, targets, rows, RowGrads(g_logp, g_entropy), into, slice(0, len(targets)))
    found = (into.hidden, into.head_gradient(), into.bias)
    d_hidden, d_weight, d_bias = (weight.new_empty(0) if value is None else value for value in found)
    return d_hidden, d_weight, d_bias


chunk_op = torch.library.custom_op("fastalign::linear_chunk", chunk, mutates_args=())
chunk_grads_op = torch.library.custom_op("fastalign::linear_chunk_grads", chunk_grads, mutates_args=("logits",))


@chunk_op.register_fake
def _(hidden, weight, bias, targets, temperature, logit_softcap, wide):  # type: ignore[no-untyped-def]
    row = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32 if wide else hidden.dtype)
    return logits, row, torch.empty_like(row), torch.empty_like(row), torch.empty_like(row, dtype=torch.bool)


@chunk_grads_op.register_fake
def _(logits, hidden, weight, bias, targets, lse, entropy, g_logp, g_entropy, temperature, softcap, wide, *need):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(weight.dtype, torch.float32)
    found = (torch.empty_like(hidden), torch.empty_like(weight, dtype=wide), weight.new_empty(weight.shape[0], dtype=wide))
    return tuple(value if wanted else weight.new_empty(0) for value, wanted in zip(found, need, strict=True))
