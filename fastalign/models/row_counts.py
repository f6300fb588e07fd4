"""With how many rows a model must run on the CPU, so that a row's bits do not depend on how many others there are.

Three things depend on the row count (measured with torch 2.13 on an AMD EPYC with AVX-512):
- GEMMs of few rows: MKL's fp32 below 12 rows, oneDNN's fp32 and bf16 at one row. So there is a least number of rows; each distinct
  linear of the model is run with few and with many rows to find it.
- ATen's activations, sines and cosines, which finish a run of elements that is no multiple of two vectors with scalar code (at a
  width of 172, fp32: up to 1.2e-7 of silu's value), and cut long runs among the threads. So rows come in a multiple; it follows
  from the widths, and each distinct activation is run to see that it holds.
- How the threads divide a run when their number is no power of two: nothing settles that, and differences of one rounding stay.

What no padding settles is said once, with its size. Experts kept as one 3-D parameter are not looked at.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastalign.ops.gemm import MIN_ROWS, PackedWeights

MOST_ROWS = 256
LOOK_FLOP = 1e9  # of the largest product of one look
LEAST_ROWS = (MIN_ROWS, 4, 8, 16, 32)
LARGEST_MULTIPLE = 64


@dataclass(frozen=True)
class RowCounts:
    """The row counts that give a row the same bits: at least `least`, and a multiple of `multiple`."""

    least: int
    multiple: int

    def padding(self, rows: int) -> int:
        """Rows to add to `rows`; none to none."""
        return max(rows, self.least) + -max(rows, self.least) % self.multiple - rows if rows else 0


_known: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, int], RowCounts]] = WeakKeyDictionary()


@torch.no_grad()
def row_counts(base: nn.Module) -> RowCounts:
    """The row counts of a causal LM on the CPU, looked for once a model, dtype and number of threads."""
    setting = (next(base.parameters()).dtype, torch.get_num_threads())
    known = _known.setdefault(base, {})
    if setting not in known:
        with torch.autocast("cpu", enabled=False):
            known[setting] = _find(base, *setting)
    return known[setting]


def _find(base: nn.Module, dtype: torch.dtype, threads: int) -> RowCounts:
    look = _Look(dtype, type(base).__name__)
    least = max((look.least(linear, width) for linear, width in _linears(base)), default=MIN_ROWS)
    multiple = _multiple_of_widths(base, dtype.itemsize, threads)
    return RowCounts(least, max((look.multiple(act, width, multiple) for act, width in _activations(base)), default=multiple))


def _multiple_of_widths(base: nn.Module, element_size: int, threads: int) -> int:
    """The rows that end every run of elements at the end of two 64-byte vectors, for each of the threads that share it."""
    threads = 1 << max(1, threads).bit_length() - 1
    wanted = [(2 * 64 // element_size * threads, width) for width in _widths(base)]
    wanted += [(2 * 64 // 4 * threads, 2 * b.numel()) for name, b in base.named_buffers() if name.endswith("inv_freq")]  # always fp32
    multiple = 1
    while multiple < LARGEST_MULTIPLE and any(multiple * width % step for step, width in wanted):
        multiple *= 2
    return multiple


def _head(base: nn.Module) -> nn.Module | None:
    """What the backbone's rows go into, run by itself: the LM head, or a reward model's score."""
    return base.get_output_embeddings() or getattr(base, "score", None)  # type: ignore[operator]


def _widths(base: nn.Module) -> set[int]:
    head = _head(base)
    inner = [m for m in base.modules() if m is not head and not isinstance(m, nn.Embedding)]
    linears = {width for m in inner if isinstance(m, nn.Linear) for width in _shape(m)}
    return linears | {
        width for m in inner for p in m.parameters(recurse=False) if p.dim() > 1 and p.is_floating_point() for width in p.shape[-2:]
    }


def _linears(base: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """(module, input width), one of each type, shape and bias."""
    head, seen = _head(base), set()
    for module in base.modules():
        if module is head or not isinstance(module, nn.Linear | Conv1D) or module.weight.dim() != 2 or module.weight.is_meta:
            continue
        key = (type(module), *_shape(module), module.bias is not None)
        if key not in seen:
            seen.add(key)
            yield module, _shape(module)[1]


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs); of a quantized linear the weight's own shape says neither."""
    if isinstance(linear, Conv1D):
        return linear.weight.shape[1], linear.weight.shape[0]
    assert isinstance(linear, nn.Linear)
    return linear.out_features, linear.in_features


def _activations(base: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """(module, width), one of each type at each width that a linear puts out."""
    kinds = {type(m): m for m in base.modules() if type(m).__module__ in ("transformers.activations", "torch.nn.modules.activation")}
    widths = {_shape(module)[0] for module, _ in _linears(base)}
    for kind in kinds.values():
        if not any(True for _ in kind.parameters()):
            yield from ((kind, int(width)) for width in sorted(widths))


@dataclass(frozen=True)
class _Look:
    """Runs modules on random rows, dense and packed, and compares a row's bits between row counts."""

    dtype: torch.dtype
    model: str

    def least(self, linear: nn.Module, width: int) -> int:
        """The fewest rows from which `linear` gives the bits that it gives in many."""
        flop = 2.0 * max(1, sum(p.numel() for p in linear.parameters()))
        most = int(max(2 * LEAST_ROWS[-1], min(MOST_ROWS, LOOK_FLOP // flop)))
        return self._first(linear, width, {least: [*range(least, 2 * least + 1), most // 2 + 1, most] for least in LEAST_ROWS})

    def multiple(self, activation: nn.Module, width: int, start: int) -> int:
        """The smallest multiple of rows, `start` or more, in which `activation` gives the bits that it gives in many."""
        candidates = [1 << i for i in range(LARGEST_MULTIPLE.bit_length()) if 1 << i >= start]
        return self._first(activation, width, {each: [each * n for n in (1, 2, 3, 7, MOST_ROWS // each)] for each in candidates})

    def _first(self, module: nn.Module, width: int, counts: dict[int, list[int]]) -> int:
        """The first key whose row counts all give a row the same bits; the last one, and a warning, where none does."""
        most = max(max(rows) for rows in counts.values())
        x = torch.randn(most, width, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        whole = module.forward(x)  # past its hooks
        with PackedWeights().active():
            for candidate, each in counts.items():
                if all(torch.equal(module.forward(x[:rows]), whole[:rows]) for rows in each):
                    return candidate
            self._warn(module, width, max(_difference(module.forward(x[:rows]), whole[:rows]) for rows in each))
        return candidate

    def _warn(self, module: nn.Module, width: int, difference: float) -> None:
        warnings.warn(
            f"{self.model}: {type(module).__name__} of {width} {str(self.dtype).removeprefix('torch.')} inputs gives a row bits that depend"
            f" on the number of rows, whatever it is padded to: up to {difference:.1g} of the largest value. Log-probs of sampling and"
            " training will differ by about that; the metric sampling/sampling_logp_difference shows it",
            RuntimeWarning,
            stacklevel=2,
        )


def _difference(ours: Tensor, whole: Tensor) -> float:
    return float((ours.double() - whole.double()).abs().max() / whole.double().abs().max().clamp(min=1e-30))
