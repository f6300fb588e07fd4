"""The passes of linear_logp over all rows: forward, backward, and the frozen-head forward that leaves nothing to recompute.

Each is a plain function and, for torch.compile, a custom op of flat arguments with a fake implementation. An output that was
not asked for is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.gemm import matmul
from fastalign.ops.linear_chunks import Gradients, RowGrads, Rows, dlogits_, forward_chunk, join_rows
from fastalign.ops.linear_head import Head, blas_ready, check_targets, even_chunks, head_logits


@dataclass(frozen=True)
class Kept:
    """The rows an op works on: all of `num_rows`, or those in `index` (ascending)."""

    num_rows: int
    index: Tensor | None

    @classmethod
    def where(cls, mask: Tensor) -> Kept:
        """The rows where the mask [N] is true."""
        return cls(len(mask), None if bool(mask.all()) else mask.nonzero().squeeze(1))

    def of(self, values: Tensor) -> Tensor:
        """Those rows of values [N, ...], contiguous."""
        return values.contiguous() if self.index is None else values[self.index]

    def spread(self, values: Tensor) -> Tensor:
        """values of the kept rows → [N, ...], zero elsewhere."""
        if self.index is None:
            return values
        out = values.new_zeros(self.num_rows, *values.shape[1:])
        out[self.index] = values
        return out

    def join(self, found: list[Rows], like: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per-chunk results of the kept rows → (logp, lse, entropy or empty, correct), [N]."""
        rows = join_rows(found, like)
        logp, lse, correct = self.spread(rows.logp), self.spread(rows.lse), self.spread(rows.correct)
        return logp, lse, self.spread(rows.entropy) if entropy and rows.entropy is not None else logp.new_empty(0), correct

    def gradients(self, into: Gradients, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dL/d(hidden, weight, bias) of all rows in the dtype of the weight, empty where not wanted."""
        none, d_weight = weight.new_empty(0), into.head_gradient()
        return (
            none if into.hidden is None else self.spread(into.hidden),
            none.clone() if d_weight is None else d_weight.to(weight.dtype),
            none.clone() if into.bias is None else into.bias.to(weight.dtype),
        )


@dataclass(frozen=True)
class Scored:
    """The rows that are scored, and the head that scores them."""

    head: Head
    kept: Kept
    hidden: Tensor
    targets: Tensor

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        logit_softcap: float | None,
        ignore_index: int,
        wide: bool,
    ) -> Scored:
        check_targets("linear_logp", targets, weight.shape[0], ignore_index)
        kept = Kept.where(targets != ignore_index)
        head = Head(blas_ready(weight), bias, temperature, logit_softcap, wide)
        return cls(head, kept, kept.of(hidden), kept.of(targets))

    def each(self, entropy: bool, work: Callable[[slice, Tensor, Rows], None] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(logp, lse, entropy or empty, correct), [N] and 0 where ignored; work(chunk, its logits, its rows) before the next reuses them.

        A call and not an iterator: a loop's variables would keep the last chunk's logits alive beside the next one's.
        """
        rows, _ = self.head.chunk_rows(None)
        found: list[Rows] = []
        with self.head.borrowed(min(rows, len(self.targets))) as buffer:
            for s in even_chunks(0, len(self.targets), rows):
                logits, known = forward_chunk(self.head, self.hidden[s], self.targets[s], entropy=entropy, buffer=buffer)
                found.append(known)
                if work is not None:
                    work(s, logits, known)
                del logits
        return self.kept.join(found, self.hidden, entropy)


def logp_forward(scored: Scored, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, lse, entropy, correct), each [N] and 0 where ignored. 2TVH over the rows that are kept."""
    return scored.each(entropy)


def logp_frozen(scored: Scored, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N], dlogp/dhidden [N, H], dentropy/dhidden [N, H]) in one pass: 4TVH, 6 with entropy."""
    head, targets, hidden = scored.head, scored.targets, scored.hidden
    slope, slope_entropy = torch.empty_like(hidden), torch.empty_like(hidden if entropy else hidden[:0])

    def work(s: slice, logits: Tensor, rows: Rows) -> None:
        one, zero = torch.ones_like(rows.lse), torch.zeros_like(rows.lse)
        if entropy:
            slope_entropy[s] = matmul(dlogits_(head, logits.clone(), targets[s], rows, RowGrads(zero, one)), head.weight)
        slope[s] = matmul(dlogits_(head, logits, targets[s], rows, RowGrads(one)), head.weight)

    logp, _, found, _ = scored.each(entropy, work)
    return logp, found, scored.kept.spread(slope), scored.kept.spread(slope_entropy) if entropy else slope_entropy


def logp_backward(
    g_logp: Tensor,
    g_entropy: Tensor | None,
    g_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    logit_softcap: float | None,
    ignore_index: int,
    wide: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtype of the GEMM; rows that are ignored or have no upstream gradient cost nothing."""
    head = Head(blas_ready(weight), bias, temperature, logit_softcap, wide)
    all_grads = RowGrads(g_logp, g_entropy, g_lse)
    kept = Kept.where(all_grads.active() & (targets != ignore_index))
    x, y, lse = kept.of(hidden), kept.of(targets), kept.of(lse)
    grads = all_grads if kept.index is None else all_grads.of(kept.index)
    ent = None if g_entropy is None else kept.of(entropy)
    rows, _ = head.chunk_rows(None)
    chunks = even_chunks(0, len(y), rows)
    into = Gradients.of(head, len(y), (need_hidden, need_weight, need_bias), only_chunk=len(chunks) == 1)
    with head.borrowed(min(rows, len(y))) as buffer:
        for s in chunks:
            logits = head_logits(x[s], head.weight, bias, out=buffer, wide=wide)
            known = Rows(lse[s], lse[s], None if ent is None else ent[s], lse[s])
            into.add(head, dlogits_(head, logits, y[s], known, grads.of(s)), x[s], s)
            del logits  # else it lives until the next chunk's are there
    return kept.gradients(into, weight)


FORWARD = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, float? logit_softcap, int ignore_index, bool wide,"
    " bool entropy) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _op(name: str, run: Callable[[Scored, bool], tuple[Tensor, ...]]) -> Any:
    def flat(*scored_and_entropy: Any) -> tuple[Tensor, ...]:
        return run(Scored.of(*scored_and_entropy[:-1]), scored_and_entropy[-1])

    return torch.library.custom_op(f"fastalign::linear_logp_{name}", flat, mutates_args=(), schema=FORWARD)


forward_op, frozen_op = _op("forward", logp_forward), _op("frozen", logp_frozen)
backward_op = torch.library.custom_op("fastalign::linear_logp_backward", logp_backward, mutates_args=())


@forward_op.register_fake
def _(hidden, weight, bias, targets, temperature, logit_softcap, ignore_index, wide, entropy):  # type: ignore[no-untyped-def]
    row = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    return row, torch.empty_like(row), torch.empty_like(row) if entropy else row.new_empty(0), torch.empty_like(row, dtype=torch.bool)


@frozen_op.register_fake
def _(hidden, weight, bias, targets, temperature, logit_softcap, ignore_index, wide, entropy):  # type: ignore[no-untyped-def]
    row = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    slope, none = hidden.new_empty(hidden.shape), hidden.new_empty(0, hidden.shape[1])
    return row, torch.empty_like(row) if entropy else row.new_empty(0), slope, torch.empty_like(slope) if entropy else none


@backward_op.register_fake
def _(g_logp, g_entropy, g_lse, hidden, weight, bias, targets, lse, entropy, temperature, logit_softcap, ignore_index, wide, *need):  # type: ignore[no-untyped-def]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(weight.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, need, strict=True))
