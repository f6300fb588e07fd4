"""The forward pass of a rollout, kept for the update on the same tokens: what both would multiply is multiplied once.

On the CPU an engine's step gives a token the very numbers that training's forward gives it. So the outputs of the linear layers, and the
logits, of every token that was forwarded while sampling are those of the first update on that rollout: a third of its products. An
engine writes a `Recording`; an update reads it inside `Replay.active`. Rows that were not kept are computed.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastalign.ops.gemm import Product, keeps_rows, known_product
from fastalign.ops.linear_fused import KnownLogits
from fastalign.ops.linear_head import head_logits

log = logging.getLogger("fastalign")

FEW_ROWS = 64  # rows computed beside known ones: at least as many, so that their bits are those of many

Ints = NDArray[np.int64]


class Layer(Protocol):
    """A linear layer with a weight [N, K], a bias and its own product."""

    weight: Tensor
    bias: Tensor | None

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""


class Listener(ABC):
    """Who is asked for the outputs of linear layers during a forward pass."""

    @abstractmethod
    def begin(self, rows: int, padded: int) -> None:
        """A pass over `rows` tokens begins, computed as `padded`."""

    @abstractmethod
    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """The layer's output for x [..., K]."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, this thread's linear layers ask it."""
        token = _listening.set(self)
        try:
            yield
        finally:
            _listening.reset(token)


_listening: ContextVar[Listener | None] = ContextVar("fastalign_recorded", default=None)


def listener() -> Listener | None:
    """The one whose `active` block this is."""
    return _listening.get()


class Recording(Listener):
    """Outputs of linear layers [row, N] and logits [row, V], by the number that a token's row got when it was forwarded.

    Args:
        num_rows: that may come. Memory is taken as rows are written.
        max_bytes: beyond it rows are not kept.
        row_bytes: of a row's outputs in all layers.

    Attributes:
        first: the number of the first row of the pass that was begun last, -1 where it is not kept.
    """

    def __init__(self, num_rows: int, max_bytes: int, row_bytes: int) -> None:
        self.capacity, self.max_bytes, self.row_bytes = num_rows, max_bytes, row_bytes
        self.first, self._rows, self._padded, self._bytes = -1, 0, 0, 0
        self._outputs: dict[Any, Tensor] = {}
        self._written: dict[Any, int] = {}  # rows of each layer, without a gap
        self._logits: list[Tensor] = []
        self._logits_of: dict[int, tuple[int, int]] = {}  # row → which of the logits, and which row of these

    def begin(self, rows: int, padded: int) -> None:
        """Numbers the rows of the pass that comes; what of it is not written is forgotten."""
        fits = self._rows + padded <= self.capacity and self._bytes + rows * self.row_bytes <= self.max_bytes
        self.first, self._padded = (self._rows, padded) if fits else (-1, 0)
        if fits:
            self._rows += rows
            self._bytes += rows * self.row_bytes

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        """The layer's product, of which a copy is kept."""
        out = layer.product(x)
        self.keep(layer, out)
        return out

    def keep(self, layer: Any, out: Tensor) -> None:
        """Keeps what a layer put out."""
        place = self.room(layer, out.shape, out.dtype)
        if place is not None:
            place.copy_(out)

    def room(self, layer: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Where the layer's output [1, T, N] of this pass is to be written; None where it is not kept: another pass, other rows.

        The last time counts, where a pass asks more than once: a step that looks whether two ways agree runs both.
        """
        if self.first < 0 or len(shape) != 3 or tuple(shape[:2]) != (1, self._padded):
            return None
        own = self._outputs.get(layer)
        if own is None:
            if self.first:  # its first rows are not there
                return None
            try:
                own = self._outputs[layer] = _reserved(self.capacity, shape[2], dtype)
            except RuntimeError as error:  # where memory must be there when it is asked for
                log.warning("a rollout's forward pass is not kept, and is computed again by the update: %s", str(error).splitlines()[0])
                self.discard()
                return None
        if self._written.get(layer, 0) not in (self.first, self._rows) or own.dtype != dtype:
            return None
        self._written[layer] = self._rows
        return own[None, self.first : self.first + self._padded]

    def keep_logits(self, rows: Ints, logits: Tensor) -> None:
        """Keeps the logits [n, V] of rows [n], as the head gave them; the tensor itself."""
        size = logits.numel() * logits.element_size()
        if self._bytes + size > self.max_bytes or not len(rows) or rows.min() < 0:
            return
        self._bytes += size
        self._logits_of |= {row: (len(self._logits), i) for i, row in enumerate(rows.tolist())}
        self._logits.append(logits)

    def outputs(self, layer: Any) -> Tensor | None:
        """[rows, N] of a layer; None where some are missing."""
        own = self._outputs.get(layer)
        return None if own is None or self._written[layer] != self._rows else own[: self._rows]

    def logits(self, rows: Sequence[int], dtype: torch.dtype, out: Tensor) -> Tensor | None:
        """Writes the logits of rows [n] to out [n, V]; returns which of 0:n are not there. None: none are, or they have another dtype."""
        if not self._logits or self._logits[0].dtype != dtype or self._logits[0].shape[1] != out.shape[1]:
            return None
        missing = []
        for i, row in enumerate(rows):
            place = self._logits_of.get(row)
            if place is None:
                missing.append(i)
            else:
                out[i].copy_(self._logits[place[0]][place[1]])
        return torch.tensor(missing, dtype=torch.int64)

    def discard(self) -> None:
        """Forgets everything, and keeps nothing from now on, if there is something: the weights have changed."""
        if not self._rows:
            return
        self.capacity, self.first = 0, -1
        self._outputs.clear()
        self._written.clear()
        self._logits.clear()
        self._logits_of.clear()

    def forget(self, layer: Any) -> None:
        """Gives the memory of a layer's outputs back."""
        self._outputs.pop(layer, None)


def _reserved(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory that is taken where it is written."""
    return torch.empty(rows, columns, dtype=dtype)


class Replay(Listener):
    """The forward pass over a token tree whose rows a recording has.

    Args:
        recording: of the weights as they are.
        rows: [T] int64, the number of each token's row in the recording, -1 where it has none.
        last: nobody reads the recording afterwards, so that it is given back as it is read.

    Attributes:
        saved: multiplications, and additions, that were not done.
    """

    def __init__(self, recording: Recording, rows: Tensor, *, last: bool = False) -> None:
        self.recording, self.rows, self.last = recording, rows, last
        self._padded = self.saved = 0
        self._numbers = self._missing = torch.empty(0, dtype=torch.int64)

    def begin(self, rows: int, padded: int) -> None:
        """The pass is over these rows; nobody reads those that pad it."""
        self._padded = padded if rows == len(self.rows) else 0
        if self._padded:
            self._numbers = nn.functional.pad(self.rows.clamp(min=0), (0, padded - rows))
            self._missing = (self.rows < 0).nonzero().squeeze(1)

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        """The layer's output, known or computed."""
        known = self.recording.outputs(layer) if x.shape[:-1] == (1, self._padded) and torch.is_grad_enabled() else None
        if known is None or known.dtype != x.dtype or not keeps_rows(x, layer.weight, layer.bias):
            return layer.product(x)
        out = known_product(x, layer.weight, layer.bias, self._product(layer, known))
        self.saved += 2 * layer.weight.numel() * (len(self.rows) - len(self._missing))
        if self.last:
            self.recording.forget(layer)
        return out

    def _product(self, layer: Layer, known: Tensor) -> Product:
        def product(x: Tensor, bias: Tensor | None) -> Tensor:
            out = known.index_select(0, self._numbers)
            if len(self._missing):
                rows = x[0, self._missing]
                rows = nn.functional.pad(rows, (0, 0, 0, max(0, FEW_ROWS - len(rows))))
                out[self._missing] = layer.product(rows)[: len(self._missing)]
            return out[None]

        return product

    def logits(self, rows: Tensor, width: int) -> KnownLogits:
        """What `linear_loss` asks for the logits of the tree's rows [N], of hidden states of this width."""
        numbers = self.rows[rows].tolist()

        def known(span: slice, dtype: torch.dtype, out: Tensor) -> Tensor | None:
            missing = self.recording.logits(numbers[span], dtype, out)
            self.saved += 0 if missing is None else 2 * width * out.shape[1] * (len(out) - len(missing))
            return missing

        return known


class Audit(Listener):
    """Computes a sequence's forward pass anew, without a gradient, and compares what a recording has of it.

    Args:
        recording: of the weights as they are.
        rows: [T] int64, the number of each token's row, -1 where it has none.

    Attributes:
        gap: the largest difference of an output, as a part of the layer's largest one. NaN and infinity count.
    """

    def __init__(self, recording: Recording, rows: Tensor) -> None:
        self.recording, self.gap, self._padded = recording, 0.0, 0
        self._at = (rows >= 0).nonzero().squeeze(1)
        self._numbers = rows[self._at]

    def begin(self, rows: int, padded: int) -> None:
        """The pass is over the sequence."""
        self._padded = padded

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        """The layer's output, computed."""
        out = layer.product(x)
        known = self.recording.outputs(layer)
        if known is not None and x.shape[:-1] == (1, self._padded):
            self.compare(known[self._numbers], out[0, self._at])
        return out

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, at: Tensor) -> None:
        """Compares the logits of rows `at` [n] of the sequence, of which hidden [n, H] are the states."""
        numbers = torch.full((self._padded,), -1).index_put((self._at,), self._numbers)[at]
        computed = head_logits(hidden, weight, bias)
        known = torch.empty_like(computed)
        missing = self.recording.logits(numbers.tolist(), computed.dtype, known)
        if missing is not None:
            known[missing] = computed[missing]
            self.compare(known, computed)

    def compare(self, known: Tensor, computed: Tensor) -> None:
        """Takes a difference into account."""
        if not torch.equal(known, computed) and known.numel():
            gap = (known.double() - computed.double()).abs().max() / computed.double().abs().max().clamp(min=1e-30)
            self.gap = max(self.gap, float(gap.nan_to_num(nan=torch.inf)))
