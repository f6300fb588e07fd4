"""What one forward pass does: the scheduler decides it, the runner carries it out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastalign.generation.blocks import Blocks

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Plan:
    """One step.

    Attributes:
        rows: [S] the sequences, in an order that keeps a group together.
        starts, counts: [S] sequence s forwards its tokens starts[s] : starts[s] + counts[s].
        copies: (sources, targets): blocks to copy before the pass.
    """

    rows: Ints
    starts: Ints
    counts: Ints
    copies: tuple[Blocks, Blocks]


def share(rows: Ints, pending: Ints, budget: int) -> tuple[Ints, Ints]:
    """Who gets a step's tokens: (rows, counts) of every decoding sequence, then chunks of the others in order, under the budget.

    Args:
        rows: [R]. pending: [R] tokens that each has to forward. budget: tokens, at least R.
    """
    decode = pending == 1
    if decode.all():
        return rows, pending
    rest = pending[~decode]
    left = budget - int(decode.sum())
    chunks = np.clip(left - (np.cumsum(rest) - rest), 0, rest)
    rows = np.concatenate([rows[decode], rows[~decode]])
    counts = np.concatenate([pending[decode], chunks])
    return rows[counts > 0], counts[counts > 0]
