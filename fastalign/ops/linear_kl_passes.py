"""The passes of linear_kl over all rows: forward, backward, the frozen-head forward, and the forward that takes the gradient along.

Each is a plain function of `Heads` and, for torch.compile, a custom op of flat arguments (`HEADS`) with a fake implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.divergence import STATE, Divergence, kl_grad_rows_, kl_rows
from fastalign.ops.gemm import matmul
from fastalign.ops.head_gradient import Loan, lend_for
from fastalign.ops.linear_chunks import Gradients
from fastalign.ops.linear_head import Head, blas_ready, borrowed, chunk_rows, compute_dtype, even_chunks, head_logits
from fastalign.ops.linear_passes import Kept

Wanted = tuple[bool, bool, bool]  # hidden, weight, bias


class Reading(NamedTuple):
    """One head and what it reads: hidden [N, H], weight [V, H], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def cast(self, op: str) -> Reading:
        """In the dtype of its GEMM."""
        dtype = compute_dtype(op, self.hidden, self.weight)
        return Reading(self.hidden.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def detached(self) -> Reading:
        """Without gradients."""
        return Reading(self.hidden.detach(), self.weight.detach(), None if self.bias is None else self.bias.detach())


@dataclass(frozen=True)
class Heads:
    """Student and teacher as the loops read them, and what lies between them."""

    student: Head
    teacher: Head
    hidden: Tensor
    teacher_hidden: Tensor
    which: Divergence

    @classmethod
    def of(cls, student: Reading, teacher: Reading, which: Divergence) -> Heads:
        mine, other = (Head(blas_ready(side.weight), side.bias, which.temperature, None) for side in (student, teacher))
        return cls(mine, other, student.hidden, teacher.hidden, which)

    def wide(self, *shape: int) -> Tensor:
        """An empty tensor in the dtype of divergences."""
        return _wide(self.hidden, self.teacher_hidden, *shape)

    def only(self, kept: Kept) -> Heads:
        """The same for some of the rows."""
        return replace(self, hidden=kept.of(self.hidden), teacher_hidden=kept.of(self.teacher_hidden))

    def chunks(self) -> list[slice]:
        """Rows whose logits exist at the same time."""
        itemsize = max(self.student.weight.element_size(), self.teacher.weight.element_size())
        return even_chunks(0, len(self.hidden), chunk_rows(len(self.student.weight), itemsize, None)[0])

    def each(self, chunks: list[slice], work: Callable[[slice, Tensor, Tensor], None], loan: Loan | None = None) -> None:
        """work(chunk, student's logits, teacher's logits) for each chunk, in memory that the next one reuses. 4TVH.

        A call and not an iterator: a loop's variables would keep the last chunk's logits alive beside the next one's.
        """
        if not chunks:
            return
        (student, teacher), rows, vocab_size = (self.student, self.teacher), chunks[0].stop - chunks[0].start, len(self.student.weight)
        own: AbstractContextManager[Tensor] = borrowed(rows, vocab_size, student.weight)
        if loan is not None and loan.for_factors:  # this chunk's logits live on until the backward
            own = nullcontext(loan.buffer())
        with own as buffer, borrowed(rows, vocab_size, teacher.weight) as other:
            for s in chunks:
                work(
                    s,
                    head_logits(self.hidden[s], student.weight, student.bias, out=buffer),
                    head_logits(self.teacher_hidden[s], teacher.weight, teacher.bias, out=other),
                )


def kl_forward(heads: Heads) -> tuple[Tensor, Tensor]:
    """(divergence [N], state [N, 5]). 4TVH."""
    found, state = heads.wide(len(heads.hidden)), heads.wide(len(heads.hidden), STATE)

    def work(s: slice, student: Tensor, teacher: Tensor) -> None:
        found[s], state[s] = kl_rows(student, teacher, heads.which)

    heads.each(heads.chunks(), work)
    return found, state


def kl_frozen(heads: Heads) -> tuple[Tensor, Tensor]:
    """(divergence [N], its gradient by hidden [N, H]) in one pass: 6TVH."""
    found, slope = heads.wide(len(heads.hidden)), torch.empty_like(heads.hidden, memory_format=torch.contiguous_format)
    ones = torch.ones_like(found)

    def work(s: slice, student: Tensor, teacher: Tensor) -> None:
        found[s] = kl_rows(student, teacher, heads.which, ones[s])[0]
        slope[s] = matmul(student, heads.student.weight)

    heads.each(heads.chunks(), work)
    return found, slope


def kl_backward(g: Tensor, state: Tensor, heads: Heads, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtype of the GEMM, empty where not needed; rows that have no upstream gradient cost nothing. 8TVH."""
    kept = Kept.where(g != 0)
    heads, g, state = heads.only(kept), kept.of(g), kept.of(state)
    chunks = heads.chunks()
    into = Gradients.of(heads.student, len(g), wanted, only_chunk=len(chunks) == 1)

    def work(s: slice, student: Tensor, teacher: Tensor) -> None:
        kl_grad_rows_(student, teacher, heads.which, state[s], g[s])
        into.add(heads.student, student, heads.hidden[s], s)

    heads.each(chunks, work)
    return kept.gradients(into, heads.student.weight)


def kl_fused(
    heads: Heads, row_weight: Tensor, wanted: Wanted, parameter: Tensor | None = None, *, may_narrow: bool = True
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None], Loan | None]:
    """(Σ row_weight · divergence, its gradients, the loan of the head gradient). 4TVH, and 2 for each of hidden and weight.

    Args:
        parameter: the student's weight as the caller holds it: its `main_grad` takes the head gradient.
        may_narrow: a head gradient of one chunk may stay in the dtype of its GEMM.
    """
    kept = Kept.where(row_weight != 0)
    heads, g = heads.only(kept), kept.of(row_weight)
    chunks = heads.chunks()
    single = len(g) if len(chunks) == 1 else 0
    loan = None if parameter is None else lend_for(parameter, heads.student.weight.dtype, single, op="linear_kl")
    into = Gradients.of(heads.student, len(g), wanted, loan=loan, only_chunk=may_narrow and single > 0)
    total = torch.zeros((), dtype=torch.float64, device=g.device)

    def work(s: slice, student: Tensor, teacher: Tensor) -> None:
        found, _ = kl_rows(student, teacher, heads.which, g[s] if any(wanted) else None)
        total.add_((found.double() * g[s]).sum())
        if any(wanted):
            into.add(heads.student, student, heads.hidden[s], s)

    heads.each(chunks, work, loan)
    d_hidden = None if into.hidden is None else kept.spread(into.hidden)
    return total.to(g.dtype), (d_hidden, into.head_gradient(), into.bias), loan


def _wide(hidden: Tensor, teacher_hidden: Tensor, *shape: int) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, teacher_hidden.dtype), torch.float32)
    return torch.empty(shape, dtype=dtype, device=hidden.device)


HEADS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias,"
    " int kind, float beta, float temperature"
)
WANTED = "bool need_hidden, bool need_weight, bool need_bias"


def _heads(*flat: Any) -> Heads:
    return Heads.of(Reading(*flat[:3]), Reading(*flat[3:6]), Divergence(*flat[6:]))


def _backward(g: Tensor, state: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    return kl_backward(g, state, _heads(*flat[:-3]), flat[-3:])


def _fused(row_weight: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kl_fused` as an op: (loss, dL/dhidden, dL/dweight fp32, dL/dbias fp32), empty where not needed."""
    loss, gradients, _ = kl_fused(_heads(*flat[:-3]), row_weight, flat[-3:], may_narrow=False)
    d_hidden, d_weight, d_bias = (flat[1].new_empty(0) if d is None else d for d in gradients)
    return loss, d_hidden, d_weight, d_bias


def _op(name: str, run: Callable[..., tuple[Tensor, ...]], arguments: str, results: int) -> Any:
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
    return torch.library.custom_op(f"fastalign::linear_kl_{name}", run, mutates_args=(), schema=schema)


forward_op = _op("forward", lambda *flat: kl_forward(_heads(*flat)), HEADS, 2)
frozen_op = _op("frozen", lambda *flat: kl_frozen(_heads(*flat)), HEADS, 2)
backward_op = _op("backward", _backward, f"Tensor g, Tensor state, {HEADS}, {WANTED}", 3)
fused_op = _op("fused", _fused, f"Tensor row_weight, {HEADS}, {WANTED}", 4)


@forward_op.register_fake
def _(hidden, weight, bias, teacher_hidden, *rest):  # type: ignore[no-untyped-def]
    return _wide(hidden, teacher_hidden, hidden.shape[0]), _wide(hidden, teacher_hidden, hidden.shape[0], STATE)


@frozen_op.register_fake
def _(hidden, weight, bias, teacher_hidden, *rest):  # type: ignore[no-untyped-def]
    return _wide(hidden, teacher_hidden, hidden.shape[0]), hidden.new_empty(hidden.shape)


@backward_op.register_fake
def _(g, state, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, kind, beta, temperature, *need):  # type: ignore[no-untyped-def]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(weight.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, need, strict=True))


@fused_op.register_fake
def _(row_weight, hidden, weight, bias, th, tw, tb, kind, beta, temperature, *need):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(weight.dtype, torch.float32)
    found = (hidden.new_empty(hidden.shape), weight.new_empty(weight.shape, dtype=wide), weight.new_empty(weight.shape[0], dtype=wide))
    gradients = (value if wanted else weight.new_empty(0) for value, wanted in zip(found, need, strict=True))
    return row_weight.new_empty(()), *gradients
