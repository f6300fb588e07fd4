"""One chunk of rows of a head: forward to per-row numbers, back from per-row gradients. The loops of all linear ops use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.gemm import matmul
from fastalign.ops.head_gradient import Loan, add_product_
from fastalign.ops.linear_head import Head, head_logits
from fastalign.ops.logits import grad_rows_, logp_rows


class Rows(NamedTuple):
    """Per-row results [n], fp32 (fp64 for fp64 inputs): nats; `correct` is bool."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None
    correct: Tensor

    def of(self, index: slice | Tensor) -> Rows:
        """The same for some of the rows."""
        return Rows(self.logp[index], self.lse[index], None if self.entropy is None else self.entropy[index], self.correct[index])


def join_rows(found: list[Rows], like: Tensor) -> Rows:
    """The rows of several chunks, in order; of none: empty, with the dtypes that rows of a head `like` have."""
    if len(found) == 1:
        return found[0]
    if found:
        logp, lse, correct = (torch.cat([r[i] for r in found]) for i in (0, 1, 3))  # type: ignore[misc]
        return Rows(logp, lse, None if found[0].entropy is None else torch.cat([r.entropy for r in found]), correct)  # type: ignore[misc]
    empty = torch.empty(0, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return Rows(empty, empty, empty, empty.bool())


class RowGrads(NamedTuple):
    """dL/d(per-row results), each [n]; None: no gradient."""

    logp: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None

    def of(self, index: slice | Tensor) -> RowGrads:
        """The same for some of the rows."""
        entropy, lse = (None if g is None else g[index] for g in self[1:])
        return RowGrads(self.logp[index], entropy, lse)

    def active(self) -> Tensor:
        """Which rows have any gradient [n] bool; a NaN counts."""
        nonzero = self.logp != 0
        for other in self[1:]:
            if other is not None:
                nonzero = nonzero | (other != 0)
        return nonzero


def forward_chunk(
    head: Head, hidden: Tensor, targets: Tensor, *, entropy: bool, buffer: Tensor | None = None, known: Tensor | None = None
) -> tuple[Tensor, Rows]:
    """hidden [n, H] → (logits [n, V] in `buffer`, per-row results). 2nVH; nothing where the logits are known."""
    logits = head_logits(hidden, head.weight, head.bias, out=buffer, wide=head.wide) if known is None else known
    found = logp_rows(logits, targets, temperature=head.temperature, logit_softcap=head.logit_softcap, entropy=entropy)
    return logits, Rows(*found)


def dlogits_(head: Head, logits: Tensor, targets: Tensor, rows: Rows, grads: RowGrads) -> Tensor:
    """Turns the logits of a chunk into their gradient in the dtype of the head, in the memory of the logits (a GPU's wide ones: beside)."""
    out = logits
    if head.wide:
        out = torch.empty_like(logits, dtype=head.weight.dtype) if logits.is_cuda else front_half(logits, head.weight.dtype)
    g_logp = grads.logp if grads.lse is None else grads.logp - grads.lse
    cap, temperature = head.logit_softcap, head.temperature
    grad_rows_(logits, targets, rows.lse, rows.entropy, g_logp, grads.entropy, temperature=temperature, logit_softcap=cap, out=out)
    if grads.lse is not None:  # g_lse·p = g_lse·onehot − g_lse (onehot − p)
        assert head.logit_softcap is None
        out.scatter_add_(1, targets[:, None], (grads.lse / head.temperature)[:, None].to(out.dtype))
    if out.stride(0) > out.shape[1]:
        settle_tail(logits, out)
    return out


def front_half(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The first half of each fp32 row [n, V] as a row of V 16-bit elements."""
    return logits.view(dtype)[:, : logits.shape[1]]


TILE = 32  # 16-bit columns of an AMX tile


def settle_tail(logits: Tensor, half: Tensor) -> None:
    """Zeros behind each row of `front_half`, up to the end of a tile.

    There lie the other halves of fp32 numbers, which may read as NaN. torch.mm does not mask a 16-bit row's last tile where rows have a
    stride of their own: with 2.13 on a CPU with AMX, 64 rows of 50,257 such columns times finite weights were NaN all over.
    """
    width = half.shape[1]
    logits.view(half.dtype)[:, width : width + -width % TILE] = 0


@dataclass
class Gradients:
    """dL/dhidden [N, H] in the dtype of hidden, dL/dweight [V, H] and dL/dbias [V] summed in fp32 (fp64); None: not wanted.

    One exception saves a pass over [V, H]: when `only_chunk`, a 16-bit head gradient stays what its one GEMM wrote.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    only_chunk: bool = False
    started: bool = False
    loan: Loan | None = None

    @classmethod
    def of(
        cls, head: Head, num_rows: int, wanted: tuple[bool, bool, bool], *, loan: Loan | None = None, only_chunk: bool = False
    ) -> Gradients:
        """wanted: hidden, weight, bias. loan: where the head gradient waits for its `main_grad`."""
        like, (vocab_size, width) = head.weight, head.weight.shape
        wide = torch.promote_types(like.dtype, torch.float32)
        only_chunk = only_chunk and wide != like.dtype
        weight = None
        if wanted[1] and loan is None:
            weight = torch.empty(vocab_size, width, dtype=like.dtype if only_chunk else wide, device=like.device)
        elif loan is not None and not loan.for_factors:
            weight, only_chunk = loan.buffer(), False
        return cls(
            like.new_zeros(num_rows, width) if wanted[0] else None,
            weight,
            torch.zeros(vocab_size, dtype=wide, device=like.device) if wanted[2] else None,
            only_chunk,
            loan=loan,
        )

    @property
    def gemms(self) -> int:
        """GEMMs a row costs on the way back, each 2VH."""
        return (self.hidden is not None) + (self.weight is not None or self.loan is not None)

    def keep_fp32(self) -> None:
        """There will be more than one chunk after all."""
        if self.only_chunk and self.weight is not None:
            self.weight = torch.empty_like(self.weight, dtype=torch.float32)
        self.only_chunk = False

    def add(self, head: Head, dlogits: Tensor, hidden: Tensor, at: slice | Tensor) -> None:
        """Adds one chunk: dlogits [n, V], its hidden rows [n, H], and where they lie in dL/dhidden."""
        if self.hidden is not None:
            self.hidden[at] = matmul(dlogits, head.weight)
        if self.loan is not None and self.loan.for_factors:
            self.loan.factors = (dlogits, hidden)
        elif self.weight is not None:
            add_product_(self.weight, dlogits, hidden, first=not self.started)
            self.started = True
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)

    def head_gradient(self) -> Tensor | None:
        """dL/dweight, zero if no chunk had a gradient; None when it waits in the loan."""
        if self.loan is not None:
            self.loan.total = self.weight if self.started else None
            return None
        if self.weight is not None and not self.started:
            self.weight.zero_()
            self.started = True
        return self.weight


def backward_chunk(
    head: Head, logits: Tensor, hidden: Tensor, targets: Tensor, rows: Rows, grads: RowGrads, into: Gradients, at: slice
) -> int:
    """Logits of a chunk → its share of the gradients; returns how many rows had any. Rows without are dropped first."""
    keep = grads.active().nonzero().squeeze(1)
    if len(keep) == 0:
        return 0
    where: slice | Tensor = at
    if len(keep) < len(targets):
        logits = compact_(logits, keep)
        hidden, targets, grads, rows = hidden[keep], targets[keep], grads.of(keep), rows.of(keep)
        where = keep + at.start
    into.add(head, dlogits_(head, logits, targets, rows, grads), hidden, where)
    return len(keep)


def compact_(logits: Tensor, keep: Tensor) -> Tensor:
    """Moves rows `keep` (ascending) to the front of the same memory, run by run; returns them as a view.

    On a GPU through a copy: a run would cost a launch and a synchronization there.
    """
    if logits.is_cuda:
        logits[: len(keep)] = logits[keep]
        return logits[: len(keep)]
    front = 0
    breaks = (keep[1:] - keep[:-1] != 1).nonzero().squeeze(1) + 1
    for run in keep.tensor_split(breaks.cpu()):
        first, count = int(run[0]), len(run)
        if first >= front + count or first == front:
            if first != front:
                logits[front : front + count] = logits[first : first + count]
        else:  # the run overlaps its new place: row by row, front to back
            for i in range(count):
                logits[front + i] = logits[first + i]
        front += count
    return logits[:front]
