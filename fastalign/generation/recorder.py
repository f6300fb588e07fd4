"""Which row of a recording each token of the KV cache is: a sequence's blocks say where its forward pass was kept."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastalign.generation.blocks import Blocks
from fastalign.generation.plan import Ints
from fastalign.models.recorded import Recording


class Recorder:
    """Notes by slot of the cache under which number its token was kept. For the time of one recording.

    Args:
        recording: what the forward passes write to.
        block_size: of the cache.
    """

    def __init__(self, recording: Recording, block_size: int) -> None:
        self.recording, self.block_size = recording, block_size
        self._numbers = np.empty(0, np.int64)
        self._pass = np.empty(0, np.int64)

    def forwarded(self, slots: Ints) -> None:
        """The pass over the tokens that went to slots [T] is over."""
        first, count = self.recording.first, len(slots)
        self._pass = np.arange(first, first + count) if first >= 0 else np.full(count, -1)
        self._reserve(int(slots.max(initial=-1)) + 1)
        self._numbers[slots] = self._pass

    def copied(self, sources: Blocks, targets: Blocks) -> None:
        """Whole blocks were copied."""
        if len(sources):
            self._reserve((int(max(sources.max(), targets.max())) + 1) * self.block_size)
            by_block = self._numbers[: len(self._numbers) // self.block_size * self.block_size].reshape(-1, self.block_size)
            by_block[targets] = by_block[sources]

    def drawn_from(self, at: Ints, logits: Tensor) -> None:
        """The logits [n, V] of rows `at` [n] of that pass."""
        self.recording.keep_logits(self._pass[at], logits)

    def of(self, blocks: Blocks, count: int) -> Ints:
        """[count] numbers of the tokens that lie in blocks; -1 where one was not kept."""
        slots = (blocks[:, None].astype(np.int64) * self.block_size + np.arange(self.block_size)).reshape(-1)[:count]
        self._reserve(int(slots.max(initial=-1)) + 1)
        return self._numbers[slots]

    def _reserve(self, num_slots: int) -> None:
        if num_slots > len(self._numbers):
            size = -(-max(num_slots, 2 * len(self._numbers)) // self.block_size) * self.block_size
            self._numbers = np.concatenate([self._numbers, np.full(size - len(self._numbers), -1)])
