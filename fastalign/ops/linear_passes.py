"""The passes of linear_logp over all rows: forward, backward, and the frozen-head forward that leaves nothing to recompute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops.linear_chunks import Gradients, RowGrads, Rows, dlogits_, forward_chunk
from fastalign.ops.linear_head import Head, blas_ready, borrowed, check_targets, chunk_rows, even_chunks, head_logits


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

    def join(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """Per-chunk results of the kept rows → [N]."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return self.spread(torch.cat(parts) if parts else torch.empty(0, dtype=wide, device=like.device))


def logp_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    logit_softcap: float | None,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy | None), each [N] and 0 where ignored. 2TVH over the rows that are kept."""
    check_targets("linear_logp", targets, weight.shape[0], ignore_index)
    head = Head(blas_ready(weight), bias, temperature, logit_softcap)
    kept = Kept.where(targets != ignore_index)
    x, y = kept.of(hidden), kept.of(targets)
    found: list[Rows] = []
    rows, _ = chunk_rows(weight.shape[0], weight.element_size(), None)
    with borrowed(min(rows, len(y)), weight.shape[0], weight) as buffer:
        for s in even_chunks(0, len(y), rows):
            found.append(forward_chunk(head, x[s], y[s], entropy=entropy, buffer=buffer)[1])
    logp, lse = kept.join([r.logp for r in found], x), kept.join([r.lse for r in found], x)
    return logp, lse, kept.join([r.entropy for r in found if r.entropy is not None], x) if entropy else None


def logp_frozen(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    logit_softcap: float | None,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(logp [N], entropy [N] | None, dlogp/dhidden [N, H], dentropy/dhidden [N, H] | None) in one pass: 4TVH, 6 with entropy."""
    check_targets("linear_logp", targets, weight.shape[0], ignore_index)
    head = Head(blas_ready(weight), bias, temperature, logit_softcap)
    kept = Kept.where(targets != ignore_index)
    x, y = kept.of(hidden), kept.of(targets)
    found: list[Rows] = []
    unit, unit_entropy = torch.empty_like(x), torch.empty_like(x) if entropy else None
    rows, _ = chunk_rows(weight.shape[0], weight.element_size(), None)
    with borrowed(min(rows, len(y)), weight.shape[0], weight) as buffer:
        for s in even_chunks(0, len(y), rows):
            logits, r = forward_chunk(head, x[s], y[s], entropy=entropy, buffer=buffer)
            found.append(r)
            one, zero = torch.ones_like(r.lse), torch.zeros_like(r.lse)
            if unit_entropy is not None:
                unit_entropy[s] = dlogits_(head, logits.clone(), y[s], r, RowGrads(zero, one)) @ head.weight
            unit[s] = dlogits_(head, logits, y[s], r, RowGrads(one)) @ head.weight
    logp = kept.join([r.logp for r in found], x)
    ent = kept.join([r.entropy for r in found if r.entropy is not None], x) if entropy else None
    return logp, ent, kept.spread(unit), None if unit_entropy is None else kept.spread(unit_entropy)


def logp_backward(
    g_logp: Tensor,
    g_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in the dtypes of the inputs; rows that are ignored or have no upstream gradient cost nothing."""
    head = Head(blas_ready(weight), bias, temperature, logit_softcap)
    kept = Kept.where(RowGrads(g_logp, g_entropy).active() & (targets != ignore_index))
    x, y, lse = kept.of(hidden), kept.of(targets), kept.of(lse)
    grads = RowGrads(kept.of(g_logp), None if g_entropy is None else kept.of(g_entropy))
    entropy = None if entropy is None else kept.of(entropy)
    rows, _ = chunk_rows(weight.shape[0], weight.element_size(), None)
    chunks = even_chunks(0, len(y), rows)
    into = Gradients.of(head, len(y), (need_hidden, need_weight, need_bias), only_chunk=len(chunks) == 1)
    with borrowed(min(rows, len(y)), weight.shape[0], weight) as buffer:
        for s in chunks:
            logits = head_logits(x[s], head.weight, bias, out=buffer)
            known = Rows(lse[s], lse[s], None if entropy is None else entropy[s], lse[s])
            into.add(head, dlogits_(head, logits, y[s], known, grads.of(s)), x[s], s)
    d_weight = into.head_gradient()
    return (
        None if into.hidden is None else kept.spread(into.hidden),
        None if d_weight is None else d_weight.to(weight.dtype),
        None if into.bias is None else into.bias.to(weight.dtype),
    )
