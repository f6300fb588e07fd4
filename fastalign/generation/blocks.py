"""The pool of KV-cache blocks: who holds which, counted by reference."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.int32]


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free; the scheduler preempts before this can happen."""


class BlockPool:
    """Reference counts of the KV cache's blocks and a stack of the free ones.

    A block with more than one reference is read-only: whoever wants to write copies it first.

    Args:
        num_blocks: blocks of the cache.
        block_size: tokens a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"BlockPool: expected at least one block of at least one token, got {num_blocks} of {block_size}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.references = np.zeros(num_blocks, np.int32)
        self._free = np.arange(num_blocks, dtype=np.int32)[::-1].copy()  # block 0 on top: low blocks are reused while warm
        self.num_free = num_blocks

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> Blocks:
        """Takes `count` free blocks, each with one reference."""
        if count > self.num_free:
            raise OutOfBlocksError(f"allocate: expected at most {self.num_free} blocks (free), got {count}")
        self.num_free -= count
        taken = self._free[self.num_free : self.num_free + count][::-1].copy()
        self.references[taken] = 1
        return taken

    def retain(self, blocks: Blocks, times: int = 1) -> None:
        """Adds `times` references to each of `blocks` (no duplicates in one call)."""
        assert np.all(self.references[blocks] > 0), "retain: a free block has no content to share"
        self.references[blocks] += times

    def release(self, blocks: Blocks) -> None:
        """Drops one reference for each entry of `blocks`; blocks without any reference become free."""
        np.subtract.at(self.references, blocks, 1)
        distinct = np.unique(blocks)
        left = self.references[distinct]
        assert np.all(left >= 0), "release: a block was released more often than it was held"
        freed = distinct[left == 0]
        self._free[self.num_free : self.num_free + len(freed)] = freed[::-1]
        self.num_free += len(freed)

    def reset(self) -> None:
        """Makes every block free, whoever held it."""
        self.references[:] = 0
        self._free[:] = np.arange(self.num_blocks, dtype=np.int32)[::-1]
        self.num_free = self.num_blocks
