"""The pool of KV-cache blocks: who holds which, counted by reference, and which free ones still hold a known prefix."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.int32]
EVICTED_AT_ONCE = 64


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free; the scheduler preempts before this can happen."""


class BlockPool:
    """Reference counts of the KV cache's blocks and a stack of the free ones.

    A block with more than one reference is read-only: whoever wants to write copies it first. A block may carry the digest of
    the prefix that ends in it (`label`). Such a block keeps its content after its last reference is gone, and can be found and
    held again until the room is needed: the least recently used one goes first.

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
        self._num_empty = num_blocks  # entries of the stack
        self._digest: dict[int, bytes] = {}
        self._block: dict[bytes, int] = {}
        self._idle: dict[int, None] = {}  # labelled blocks without a reference, least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, those included whose content is kept for a later hit."""
        return self._num_empty + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Free blocks that hold a known prefix."""
        return len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> Blocks:
        """Takes `count` free blocks, each with one reference."""
        if count > self.num_free:
            raise OutOfBlocksError(f"allocate: expected at most {self.num_free} blocks (free), got {count}")
        if self._num_empty < count:
            for _ in range(min(len(self._idle), max(count - self._num_empty, EVICTED_AT_ONCE))):
                self._evict()
            self._free[: self._num_empty] = np.sort(self._free[: self._num_empty])[::-1]  # neighbours go to one sequence
        self._num_empty -= count
        taken = self._free[self._num_empty : self._num_empty + count][::-1].copy()
        self.references[taken] = 1
        return taken

    def retain(self, blocks: Blocks, times: int = 1) -> None:
        """Adds `times` references to each of `blocks` (no duplicates in one call); each is held by someone or cached."""
        if self._idle:
            for block in blocks.tolist():
                self._idle.pop(block, None)
        else:
            assert np.all(self.references[blocks] > 0), "retain: a free block has no content to share"
        self.references[blocks] += times

    def release(self, blocks: Blocks) -> None:
        """Drops one reference for each entry of `blocks`; blocks without any reference become free."""
        np.subtract.at(self.references, blocks, 1)
        distinct = np.unique(blocks)
        left = self.references[distinct]
        assert np.all(left >= 0), "release: a block was released more often than it was held"
        freed = distinct[left == 0]
        if self._digest and len(freed):
            freed = self._keep_labelled(blocks, freed)
        self._free[self._num_empty : self._num_empty + len(freed)] = freed[::-1]
        self._num_empty += len(freed)

    def _keep_labelled(self, blocks: Blocks, freed: Blocks) -> Blocks:
        """Sets labelled blocks of `freed` aside, the ends of prefixes to be evicted before their beginnings; returns the others."""
        labelled = {block for block in freed.tolist() if block in self._digest}
        for block in blocks[::-1].tolist():
            if block in labelled:
                self._idle[block] = None
        return freed if not labelled else np.array([b for b in freed.tolist() if b not in labelled], np.int32)

    def _evict(self) -> None:
        block = next(iter(self._idle))
        del self._idle[block], self._block[self._digest.pop(block)]
        self._free[self._num_empty] = block
        self._num_empty += 1

    # --- known prefixes ----------------------------------------------------------------------------------------------

    def label(self, blocks: Blocks, digests: Iterable[bytes]) -> None:
        """Says which prefix ends in each of `blocks`, which are full and held; a prefix that is known already stays where it is."""
        for block, digest in zip(blocks.tolist(), digests, strict=True):
            if digest not in self._block and block not in self._digest:
                assert self.references[block] > 0, "label: a free block has no content to find"
                self._digest[block], self._block[digest] = digest, block

    def find(self, digests: Iterable[bytes]) -> Blocks:
        """The blocks of the longest known prefix."""
        found = []
        for digest in digests:
            block = self._block.get(digest)
            if block is None:
                break
            found.append(block)
        return np.array(found, np.int32)

    def forget(self) -> None:
        """Drops every label: the content was computed with weights that are gone."""
        while self._idle:
            self._evict()
        self._digest.clear()
        self._block.clear()

    # --- all at once -------------------------------------------------------------------------------------------------

    def grow(self, num_blocks: int) -> None:
        """Adds free blocks at the end."""
        added = num_blocks - self.num_blocks
        if added <= 0:
            return
        self.references = np.concatenate([self.references, np.zeros(added, np.int32)])
        fresh = np.arange(self.num_blocks, num_blocks, dtype=np.int32)[::-1]
        self._free = np.concatenate([fresh, self._free])  # below what was free before
        self._num_empty += added
        self.num_blocks = num_blocks

    def reset(self) -> None:
        """Makes every block free, whoever held it, and forgets all content."""
        self.__init__(self.num_blocks, self.block_size)  # type: ignore[misc]
