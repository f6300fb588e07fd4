"""What is in the KV cache already, found by its token ids."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from fastalign.generation.blocks import BlockPool, Blocks


class PrefixCache:
    """Labels full blocks with the prefix that ends in them, and finds them again until the room is needed.

    Args:
        pool: the blocks.
        root: what a prefix depends on besides its token ids, the weights in force; None: nothing is kept.
    """

    def __init__(self, pool: BlockPool, root: bytes | None) -> None:
        self.pool, self.root = pool, root

    def find(self, ids: NDArray[np.int64]) -> tuple[Blocks, int]:
        """(blocks, tokens) of the longest known prefix of `ids`, the last id left out: something must be forwarded."""
        if self.root is None or len(ids) <= self.pool.block_size:
            return np.empty(0, np.int32), 0
        blocks = self.pool.find(chain(ids[:-1], self.pool.block_size, self.root))
        return blocks, len(blocks) * self.pool.block_size

    def publish(self, ids: NDArray[np.int64], blocks: Blocks) -> None:
        """Makes the full blocks of a sequence findable, whose keys and values are computed for `ids`."""
        if self.root is not None:
            digests = chain(ids, self.pool.block_size, self.root)
            self.pool.label(blocks[: len(digests)], digests)

    def clear(self, root: bytes | None) -> None:
        """Forgets everything: the weights have changed."""
        self.pool.forget()
        self.root = root


def chain(ids: NDArray[np.int64], block_size: int, root: bytes) -> list[bytes]:
    """The digest of each prefix of `ids` that ends with a full block: blake2b over the digest before it and the block's ids.

    Args:
        ids: [L] token ids.
        block_size: tokens a block.
        root: what the prefixes depend on besides their ids: the weight version.
    """
    digests, digest = [], root
    data = np.ascontiguousarray(ids, np.int64).tobytes()
    for at in range(0, len(ids) // block_size * block_size * 8, block_size * 8):
        digest = hashlib.blake2b(digest + data[at : at + block_size * 8], digest_size=16).digest()
        digests.append(digest)
    return digests
