"""linear_loss: hidden × head → any objective of the log-probs, with the gradient taken while the chunk's logits are there.

6TVH for a trainable head, 4TVH for a frozen one, 2TVH without gradients; rows whose gradient is zero stop at 2. Memory:
one chunk of logits, dL/dhidden, dL/dweight. Autograd is tied on at the end: `backward` only scales what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.head_gradient import lend_for
from fastalign.ops.linear_chunks import RowGrads, Rows, join_rows
from fastalign.ops.linear_fused import Fused, KnownLogits, tie, wanted_gradients
from fastalign.ops.linear_head import Head, blas_ready, check_inputs, check_targets, compute_dtype, even_chunks, wants_wide
from fastalign.ops.linear_traced import Traced
from fastalign.ops.objective import evaluate

Objective = Callable[..., Any]


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    units: Tensor | Sequence[int] | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    max_chunk_bytes: int | None = None,
    head_dtype: torch.dtype | None = None,
    known_logits: KnownLogits | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Sum of an objective over units of rows, and its gradient, without the [N, V] logits.

    Args:
        hidden: [N, H] scored rows only; weight: [V, H]; targets: [N] int64 (no ignore index here); bias: [V].
        objective: `objective(logp, span)`, with `return_entropy` `objective(logp, entropy, span)`: fp32 log-probs (nats)
            of rows span.start:span.stop, always whole units. Returns their share of the final scalar as a tensor or a
            number, or (share, {name: sum}); tensors it captures must not require gradients. Not called for N = 0.
        units: CPU int offsets [U+1] from 0 to N, empty units allowed; None: every row is a unit.
        max_chunk_bytes: how many bytes of logits may exist at once (None: 1 GiB, of which a chunk takes what is fast).
            A chunk grows to hold one unit; a unit that does not fit takes two passes, 8TVH.
        head_dtype: torch.float32 keeps the logits of 16-bit inputs in fp32, as in `linear_logp`.
        known_logits: `known_logits(span, dtype, buffer)`, asked before rows span.start:span.stop are multiplied: writes their logits
            hidden · weightᵀ + bias of this dtype into the buffer [n, V], as far as they are known, and returns the others' indices
            in 0:n as int64; or None, and nothing is known. Saves 2TVH; not asked under torch.compile.

    Returns:
        The scalar (fp32) and metrics: detached `logp`, `entropy` (nats) and `correct` (bool) [N], `flops_tvh` (in T·V·H),
        `num_chunks`, and the objective's sums. With NaN logits the loss and the logp of their rows are NaN.
        When `weight.main_grad` is a fp32 [V, H] tensor, backward adds the head gradient to it and leaves weight.grad alone.

    Raises:
        ValueError: shapes, dtypes, targets outside the vocabulary (named by row), units that do not cover the rows, an
            objective that returns no scalar or captures tensors that require gradients.
        RuntimeError: on a second differentiation, or inside torch.func and vmap.
    """
    check_inputs("linear_loss", hidden, weight, targets, bias, temperature, logit_softcap)
    dtype = compute_dtype("linear_loss", hidden, weight)
    targets = targets.long()
    if not torch.compiler.is_compiling():
        check_targets("linear_loss", targets, weight.shape[0], None)
    bias_read = None if bias is None else bias.detach().to(dtype)
    wide = wants_wide("linear_loss", dtype, head_dtype)
    head = Head(blas_ready(weight.detach().to(dtype)), bias_read, float(temperature), logit_softcap, wide)
    rows, limit = head.chunk_rows(max_chunk_bytes)
    chunks = plan(_offsets(units, len(targets)), len(targets), rows, limit)
    wanted = wanted_gradients(hidden, weight, bias)
    judge = _Judge(objective, return_entropy, any(wanted))
    x = hidden.detach().to(dtype).contiguous()
    only_chunk = len(targets) if len(chunks) == 1 and len(targets) <= limit else 0
    loan = lend_for(weight, head.logits_dtype, only_chunk) if wanted[1] else None
    with torch.no_grad():
        if torch.compiler.is_compiling():
            fused: Fused | Traced = Traced(head, x, targets, wanted, len(chunks))
        else:
            fused = Fused(head, x, targets, wanted, loan, len(chunks), known_logits=known_logits)
        for span in chunks:
            if span.stop - span.start <= limit:
                fused.whole(span, judge)
            else:
                fused.twice(span, judge, rows)
        gradients = fused.gradients()
    metrics = {**judge.sums, **judge.numbers(head.weight), "flops_tvh": fused.flops_tvh, "num_chunks": fused.num_chunks}
    return tie("linear_loss", judge.loss(head.weight), (hidden, weight, bias), gradients, loan), metrics


def plan(offsets: Sequence[int] | None, num_rows: int, rows: int, limit: int) -> list[slice]:
    """Chunks of whole units: as many as fit `rows` rows; one larger unit alone (above `limit` rows it takes two passes).

    offsets None: every row is a unit, and chunks are even.
    """
    if offsets is None:
        return even_chunks(0, num_rows, rows)
    chunks: list[slice] = []
    start = end = 0
    for _, stop in pairwise(offsets):
        if stop - start > rows and end > start:
            chunks.append(slice(start, end))
            start = end
        end = stop
    return [*chunks, slice(start, end)] if end > start else chunks


def units_of(span: slice, units: Tensor) -> slice:
    """Which units [U+1] a span given to the objective holds; each empty unit belongs to exactly one span."""
    starts = units[:-1]
    first = int(torch.searchsorted(starts, span.start))
    last = len(starts) if span.stop >= int(units[-1]) else int(torch.searchsorted(starts, span.stop))
    return slice(first, last)


class _Judge:
    """Calls the objective on each chunk's rows; keeps the loss, its sums and the rows' numbers."""

    def __init__(self, objective: Objective, return_entropy: bool, differentiate: bool) -> None:
        self.objective, self.return_entropy, self.differentiate = objective, return_entropy, differentiate
        self.losses: list[Tensor] = []
        self.sums: dict[str, Any] = {}
        self.rows: list[Rows] = []

    def __call__(self, rows: Rows, span: slice) -> RowGrads | None:
        assert rows.entropy is not None
        values = (rows.logp, rows.entropy) if self.return_entropy else (rows.logp,)
        loss, sums, grads = evaluate(self.objective, values, span, self.differentiate)
        self.losses.append(loss)
        self.rows.append(rows)
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        return RowGrads(*grads) if grads else None

    def loss(self, like: Tensor) -> Tensor:
        """The sum of the shares, fp32; 0 when there were no rows."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return torch.stack(self.losses).sum() if self.losses else torch.zeros((), dtype=wide, device=like.device)

    def numbers(self, like: Tensor) -> dict[str, Tensor | None]:
        """The rows' logp, entropy and correct [N]."""
        rows = join_rows(self.rows, like)
        return {"logp": rows.logp, "entropy": rows.entropy, "correct": rows.correct}


def _offsets(units: Tensor | Sequence[int] | None, num_rows: int) -> list[int] | None:
    """Unit offsets as Python ints, checked. A tensor cannot be read while torch.compile traces: then all rows are one unit."""
    if units is None:
        return None
    if isinstance(units, Tensor):
        if torch.compiler.is_compiling():
            return [0, num_rows]
        if units.device.type != "cpu" or units.is_floating_point():
            raise ValueError(f"linear_loss: units must be integer offsets on the CPU, got {units.dtype} on {units.device}")
        units = units.tolist()
    offsets = list(units)
    if not offsets or offsets[0] != 0 or offsets[-1] != num_rows or any(b < a for a, b in pairwise(offsets)):
        raise ValueError(
            f"linear_loss: units must ascend from 0 to the number of rows {num_rows}, got {offsets[:4]} … {offsets[-2:]}"
            f" ({len(offsets)} offsets)"
        )
    return offsets
