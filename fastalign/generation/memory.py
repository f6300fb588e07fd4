"""How much KV cache there is: what the requests need, as far as the memory goes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastalign.generation.blocks import BlockPool
from fastalign.generation.free_memory import free_bytes
from fastalign.generation.groups import Group
from fastalign.generation.runner import KVCache, cache_bytes_per_token


class Memory:
    """The KV cache with its pool of blocks, made and enlarged as requests come.

    Args:
        model: tells the shapes, the dtype and the device.
        block_size: tokens a block.
        kv_cache_tokens: a fixed size; None: what the requests need, within half of the free memory.
        max_num_seqs: sequences that can run at once.
    """

    def __init__(self, model: nn.Module, block_size: int, kv_cache_tokens: int | None, max_num_seqs: int) -> None:
        self.model, self.block_size, self.kv_cache_tokens, self.max_num_seqs = model, block_size, kv_cache_tokens, max_num_seqs
        self.cache: KVCache | None = None
        self.pool: BlockPool | None = None

    def ready(
        self, groups: Sequence[Group], others: Sequence[Group], *, live: bool, busy: bool, keeping: bool = False
    ) -> tuple[BlockPool, KVCache]:
        """The pool and the cache, with room for the largest of `groups` at least.

        Args:
            groups: that come. others: that are there already.
            live: more will come, so that it grows in large strides.
            busy: blocks are in use.
            keeping: what is known already is to stay beside what comes.

        Raises:
            ValueError: one sequence cannot fit; names the request and the remedy.
        """
        if self.cache is not None and not busy and not self.cache.fits(self.model):
            self.release()  # the model was cast, or moved
        num_blocks = self._size([*groups, *others], live or keeping, self.pool.num_cached if keeping and self.pool is not None else 0)
        self._check(max(groups, key=lambda group: group.limit), num_blocks)
        keeps = self.pool is not None and (busy or self.pool.num_cached > 0)
        if self.pool is None or self.cache is None or (self.pool.num_blocks < num_blocks and not keeps):
            self.release()
            self.cache, self.pool = KVCache(self.model, num_blocks, self.block_size), BlockPool(num_blocks, self.block_size)
        elif self.pool.num_blocks < num_blocks:
            self.cache.grow(num_blocks)
            self.pool.grow(num_blocks)
        return self.pool, self.cache

    def release(self) -> None:
        """Gives everything back."""
        self.cache = self.pool = None

    def _size(self, groups: list[Group], growing: bool, num_kept: int) -> int:
        """Blocks, with `num_kept` for what is known already."""
        if self.kv_cache_tokens is not None:
            return self.kv_cache_tokens // self.block_size
        held = self.pool.num_blocks if self.pool is not None else 0
        affordable = free_bytes(self.model) // 2 // (cache_bytes_per_token(self.model) * self.block_size)
        wanted = _blocks_wanted(groups, self.block_size, self.max_num_seqs) + num_kept
        if growing and wanted > held:
            wanted = max(wanted, held * 3 // 2)
        return max(held, min(wanted, held + affordable))

    def _check(self, largest: Group, num_blocks: int) -> None:
        needed = -(-largest.limit // self.block_size)
        if needed <= num_blocks:
            return
        source = "half of the free memory" if self.kv_cache_tokens is None else f"kv_cache_tokens={self.kv_cache_tokens}"
        raise ValueError(
            f"generate: request {largest.place} can grow to {largest.limit} tokens ({len(largest.prompt)} of prompt, max_tokens="
            f"{largest.params.max_tokens}), {needed} blocks of {self.block_size}; the KV cache has {num_blocks} ({source});"
            " raise kv_cache_tokens or lower max_tokens"
        )


def _blocks_wanted(groups: list[Group], block_size: int, max_num_seqs: int) -> int:
    """Blocks with which no sequence of the call has to wait or be preempted (an upper bound)."""
    shared = [len(group.prompt) // block_size for group in groups]
    own = [-(-group.limit // block_size) - s + 1 for group, s in zip(groups, shared, strict=True)]
    everything = sum(s + o * group.params.n for s, o, group in zip(shared, own, groups, strict=True))
    largest = max(s + o for s, o in zip(shared, own, strict=True))
    return min(everything, largest * (max_num_seqs + 1))
