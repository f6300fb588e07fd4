"""DataOrder: which records come next, the same in every run and after every resume."""

from __future__ import annotations

import random
from collections.abc import Iterator
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
