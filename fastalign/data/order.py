"""Orders: which records come next, the same in every run and after every resume."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from .records import DataError


class DataOrder:
    """A seeded order of record indices, epoch after epoch; every record comes once an epoch.

    A batch may reach over the end of an epoch: nothing is dropped and batches stay full.

    Args:
        num_records: how many records there are.
        seed: chooses the order.
        shuffle: draw a new order every epoch; otherwise the file's order is kept.
    """

    def __init__(self, num_records: int, *, seed: int = 0, shuffle: bool = True) -> None:
        if num_records < 1:
            raise DataError(f"DataOrder: expected at least one record, got {num_records}")
        self.num_records, self.seed, self.shuffle = num_records, seed, shuffle
        self.epoch, self.position = 0, 0
        self._order = self._draw()

    def _draw(self) -> list[int]:
        order = list(range(self.num_records))
        if self.shuffle:
            random.Random(f"fastalign data order {self.seed} {self.epoch}").shuffle(order)
        return order

    @property
    def progress(self) -> float:
        """Epochs done, as metrics report them."""
        return self.epoch + self.position / self.num_records

    def next_batch(self, batch_size: int) -> list[int]:
        """The next `batch_size` indices, going over into the next epoch where this one ends."""
        if batch_size < 1:
            raise DataError(f"DataOrder: expected a batch size >= 1, got {batch_size}")
        batch: list[int] = []
        while len(batch) < batch_size:
            taken = self._order[self.position : self.position + batch_size - len(batch)]
            batch += taken
            self.position += len(taken)
            if self.position == self.num_records:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._draw()
        return batch

    def epoch_batches(self, batch_size: int) -> Iterator[list[int]]:
        """The batches that are left of this epoch; the last one may be smaller."""
        epoch = self.epoch
        while self.epoch == epoch:
            yield self.next_batch(min(batch_size, self.num_records - self.position))

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, and what it belongs to."""
        names = ("epoch", "position", "seed", "num_records", "shuffle")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Raises DataError when the data or the seed are not the same."""
        for name in ("num_records", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise DataError(
                    f"the checkpoint's data order has {name}={state[name]}, this run has {getattr(self, name)}; "
                    "resume with the data, seed and --shuffle that it was made with"
                )
        if not 0 <= state["position"] < self.num_records or state["epoch"] < 0:
            raise DataError(f"the checkpoint's data order stands at epoch {state['epoch']}, position {state['position']}, which cannot be")
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._draw()


class MixtureOrder:
    """Draws from several data sets by weight; indices are those of the data sets one behind the other.

    Each next record comes from the data set that is furthest behind its share, so after n draws every data set has given
    its share of n to within one record (of K data sets, to within K - 1). Within a data set the order is a `DataOrder` with
    epochs of its own: a small one with a large weight is gone through more often.

    Args:
        sizes: how many records each data set has.
        weights: how often each is drawn from, relative to the others; > 0.
        seed, shuffle: as for `DataOrder`.

    Raises:
        DataError: a weight that is no number > 0, or not one a data set.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int = 0, shuffle: bool = True) -> None:
        if len(weights) != len(sizes):
            raise DataError(f"--dataset_weights: expected one weight a data set, {len(sizes)}, got {len(weights)}: {list(weights)}")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise DataError(f"--dataset_weights: expected numbers > 0, got {list(weights)}; leave a data set out instead of giving it 0")
        self.sizes, self.weights = list(sizes), [float(weight) for weight in weights]
        self.num_records = sum(sizes)
        self.orders = [DataOrder(size, seed=_own_seed(seed, k), shuffle=shuffle) for k, size in enumerate(sizes)]
        self.drawn = [0] * len(self.sizes)

    @property
    def progress(self) -> float:
        """Draws over all records: 1 when as many were drawn as there are."""
        return sum(self.drawn) / self.num_records

    def next_batch(self, batch_size: int) -> list[int]:
        """The next `batch_size` indices."""
        if batch_size < 1:
            raise DataError(f"MixtureOrder: expected a batch size >= 1, got {batch_size}")
        return [self._next() for _ in range(batch_size)]

    def _next(self) -> int:
        total, count = sum(self.weights), sum(self.drawn) + 1
        behind = [count * weight / total - drawn for weight, drawn in zip(self.weights, self.drawn, strict=True)]
        chosen = behind.index(max(behind))
        self.drawn[chosen] += 1
        return sum(self.sizes[:chosen]) + self.orders[chosen].next_batch(1)[0]

    def state_dict(self) -> dict[str, Any]:
        """Where each order stands, and what it belongs to."""
        orders = [order.state_dict() for order in self.orders]
        return {"weights": self.weights, "sizes": self.sizes, "drawn": list(self.drawn), "orders": orders}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Raises DataError when the data sets, the weights or the seed are not the same."""
        for name in ("sizes", "weights"):
            if state.get(name) != getattr(self, name):
                raise DataError(
                    f"the checkpoint's mixture has {name} {state.get(name)}, this run has {getattr(self, name)}; "
                    "resume with the data sets and --dataset_weights that it was made with"
                )
        for order, saved in zip(self.orders, state["orders"], strict=True):
            order.load_state_dict(saved)
        self.drawn = list(state["drawn"])


def _own_seed(seed: int, number: int) -> int:
    """The first data set's order is the one that it has alone."""
    return seed + 1_000_003 * number
