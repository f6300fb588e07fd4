"""What every op on hidden × head shares: input checks, the logits GEMM, chunk sizes, the buffers that outlive a call.

Numerics. The logits have the dtype of the GEMM: a bf16 GEMM rounds them to bf16 (up to 0.06 nats at logp ≈ −14), unless
`head_dtype=torch.float32` asks for its fp32 sums (`gemm_wide.wide_product`); everything after them (log-sum-exp, logp, entropy,
losses) is fp32. The head gradient is summed in fp32.
In fp32 and bf16 a row's logits depend on that row alone, bit for bit: torch's GEMMs of fewer than 16 rows are padded to 16, oneDNN's
of one row to 2. On an AVX-512 CPU the fp32 result was measured to depend on the number of rows below 2 (oneDNN, see `gemm`) or
below 12 (MKL), and never from 16 on; fp64 differs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.ops.gemm import MIN_ROWS, has_route, packed_product, product
from fastalign.ops.gemm_wide import wide_product
from fastalign.ops.logits import check_scales

MIN_GEMM_ROWS = 16
CHUNK_ROWS = 512  # with fewer, the bf16 head gradient's pass over [V, H], one a chunk, shows beside its GEMMs
CHUNK_BYTES = 64 << 20  # with a small vocabulary a chunk takes more rows, up to this many bytes of logits
MAX_CHUNK_BYTES = 1 << 30  # how far a chunk may grow to hold one unit


@dataclass(frozen=True)
class Head:
    """A head as the loops read it: detached, in the dtype of the GEMM. weight [V, H], bias [V] or None.

    wide: the logits of 16-bit operands are fp32; their gradient has the dtype of the weight again.
    """

    weight: Tensor
    bias: Tensor | None
    temperature: float
    logit_softcap: float | None
    wide: bool = False

    @property
    def logits_dtype(self) -> torch.dtype:
        """What the logits are stored in."""
        return torch.float32 if self.wide else self.weight.dtype

    def chunk_rows(self, max_chunk_bytes: int | None) -> tuple[int, int]:
        """`chunk_rows` of this head's logits."""
        return chunk_rows(self.weight.shape[0], self.logits_dtype.itemsize, max_chunk_bytes)

    def borrowed(self, rows: int) -> AbstractContextManager[Tensor]:
        """A work buffer for the logits of `rows` rows."""
        return borrowed(rows, self.weight.shape[0], self.weight, dtype=self.logits_dtype)


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None, wide: bool = False) -> Tensor:
    """hidden [N, H] · weight [V, H]ᵀ + bias → logits [N, V] in the inputs' dtype (`wide`: fp32); the same bits for a row in any batch.

    Args:
        out: a buffer of at least max(N, 16) rows of V; a view of its first N rows is returned, unless the GEMM is oneDNN's or ours,
            which allocates its own (and is faster all the same, see `gemm`).
    """
    rows = hidden.shape[0]
    if not wide:  # a row in place of none: a product of no rows goes the way of the others
        few = F.pad(hidden, (0, 0, 0, MIN_ROWS - rows)) if rows < MIN_ROWS else hidden
        if has_route(few, weight, bias):
            return product(few, weight, bias)[:rows]
        packed = packed_product(few, weight, bias)
        if packed is not None:
            return packed[:rows]
    if rows < MIN_GEMM_ROWS:
        hidden = F.pad(hidden, (0, 0, 0, MIN_GEMM_ROWS - rows))
    if wide:
        return wide_product(hidden, weight, bias, None if out is None else out[: hidden.shape[0]])[:rows]
    out = hidden.new_empty(hidden.shape[0], weight.shape[0]) if out is None else out[: hidden.shape[0]]
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)
    return out[:rows]


def chunk_rows(vocab_size: int, itemsize: int, max_chunk_bytes: int | None) -> tuple[int, int]:
    """(rows of an ordinary chunk, rows a chunk may grow to), from the bytes of one row of logits."""
    row_bytes = vocab_size * itemsize
    limit = max(1, (MAX_CHUNK_BYTES if max_chunk_bytes is None else max_chunk_bytes) // row_bytes)
    ordinary = max(CHUNK_ROWS, CHUNK_BYTES // row_bytes)
    return min(ordinary, limit), limit


def even_chunks(start: int, stop: int, rows: int) -> list[slice]:
    """Splits rows start:stop into equal chunks of at most `rows` rows."""
    count = max(1, -(-(stop - start) // rows))
    size = -(-(stop - start) // count)
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)] if stop > start else []


_free: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
MAX_FREE = 2  # work buffers kept a device and dtype
_lending = threading.RLock()  # an engine may sample beside an update; re-entered where a loan ends by garbage collection


def take(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat buffer of at least `numel` elements, kept between calls; return it with `give`.

    A fresh one of this size goes back to the system at every free, and its page faults cost more than the row pass.
    """
    with _lending:
        kept = _free.setdefault((device, dtype), [])
        for i, flat in enumerate(kept):  # ascending in size
            if flat.numel() >= numel:
                return kept.pop(i)
        if kept:
            kept.pop(0)
    return torch.empty(numel, dtype=dtype, device=device)


def give(flat: Tensor) -> None:
    """Takes a buffer back; beyond two the smallest is freed."""
    with _lending:
        kept = _free.setdefault((flat.device, flat.dtype), [])
        kept.append(flat)
        kept.sort(key=Tensor.numel)
        del kept[: max(0, len(kept) - MAX_FREE)]


@contextmanager
def borrowed(rows: int, columns: int, like: Tensor, *, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """A work buffer [max(rows, 16), columns] on the device of `like`, with its dtype unless another is named; kept between calls."""
    rows = max(rows, MIN_GEMM_ROWS)
    flat = take(rows * columns, dtype or like.dtype, like.device)
    try:
        yield flat[: rows * columns].view(rows, columns)
    finally:
        give(flat)


def release_buffers() -> None:
    """Gives the work buffers back to the system; the next call allocates them again."""
    _free.clear()


def compute_dtype(op: str, hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the GEMM: autocast's where it applies, else the one both inputs have; raises ValueError if they differ."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"{op}: hidden and weight must have one dtype outside autocast, got {_name(hidden)} and {_name(weight)};"
            " cast one of them or run under torch.autocast"
        )
    return hidden.dtype


def wants_wide(op: str, dtype: torch.dtype, head_dtype: torch.dtype | None) -> bool:
    """Whether the logits must be wider than the GEMM's operands; raises ValueError for a head_dtype that is not offered."""
    if head_dtype not in (None, torch.float32):
        raise ValueError(f"{op}: head_dtype must be None (the inputs' dtype) or torch.float32, got {head_dtype}")
    return head_dtype is torch.float32 and dtype.itemsize < 4


def check_inputs(
    op: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, logit_softcap: float | None
) -> None:
    """Shapes, dtypes and options; raises ValueError or TypeError that says what was expected, RuntimeError inside torch.func."""
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: torch.func and vmap are not supported: the gradient is taken chunk by chunk, outside autograd; call backward() or"
            " torch.autograd.grad, or transform the plain torch version in fastalign.ops.reference"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: expected hidden [N, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{op}: expected targets [{hidden.shape[0]}], one a row of hidden, got {list(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: expected int64 targets, got {_name(targets)}")
    if not hidden.dtype.is_floating_point or not weight.dtype.is_floating_point:
        raise TypeError(f"{op}: expected floating-point hidden and weight, got {_name(hidden)} and {_name(weight)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: expected bias [{weight.shape[0]}], one a row of weight, got {list(bias.shape)}")
    check_scales(op, temperature, logit_softcap)


def check_targets(op: str, targets: Tensor, vocab_size: int, ignore_index: int | None) -> None:
    """Every target is a row of the head (or ignore_index); raises ValueError naming the first row that is not."""
    bad = (targets < 0) | (targets >= vocab_size)
    if ignore_index is not None:
        bad &= targets != ignore_index
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    value = int(targets[row])
    if value >= vocab_size:
        raise ValueError(
            f"{op}: targets must be < vocab size {vocab_size}, got {value} at row {row}; is the tokenizer larger than the head?"
        )
    remedy = "drop the rows that are not scored first" if ignore_index is None else f"only ignore_index {ignore_index} may be negative"
    raise ValueError(f"{op}: targets must be >= 0, got {value} at row {row}; {remedy}")


def blas_ready(matrix: Tensor) -> Tensor:
    """The matrix itself when a GEMM reads it in place (rows or columns contiguous), else a contiguous copy."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
