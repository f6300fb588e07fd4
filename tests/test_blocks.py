"""The block pool: references, sharing, and what it refuses."""

import numpy as np
import pytest

from fastalign.generation.blocks import BlockPool, OutOfBlocksError


def test_blocks_are_counted_by_reference():
    pool = BlockPool(6, 16)
    mine = pool.allocate(4)
    assert sorted(mine) == [0, 1, 2, 3]
    pool.retain(mine[:2], 2)
    pool.release(mine)
    assert pool.num_used == 2
    pool.release(mine[:2])
    pool.release(mine[:2])
    assert pool.num_used == 0
    assert sorted(pool.allocate(6)) == list(range(6))


def test_blocks_released_several_times_in_one_call():
    pool = BlockPool(4, 16)
    block = pool.allocate(1)
    pool.retain(block, 2)
    pool.release(np.repeat(block, 3))
    assert pool.num_free == 4


def test_blocks_that_are_free_can_be_neither_shared_nor_released():
    pool = BlockPool(4, 16)
    block = pool.allocate(1)
    pool.release(block)
    with pytest.raises(AssertionError):
        pool.release(block)
    with pytest.raises(AssertionError):
        BlockPool(4, 16).retain(np.array([1]))


def test_blocks_more_than_free_is_an_error():
    pool = BlockPool(3, 16)
    with pytest.raises(OutOfBlocksError, match="at most 3"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_blocks_for_tokens_rounds_up():
    pool = BlockPool(3, 16)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_blocks_reset_frees_everything():
    pool = BlockPool(5, 4)
    pool.retain(pool.allocate(3))
    pool.reset()
    assert pool.num_used == 0
    assert sorted(pool.allocate(5)) == list(range(5))


@pytest.mark.parametrize("shape", [(0, 16), (4, 0)])
def test_blocks_need_a_pool(shape):
    with pytest.raises(ValueError, match="BlockPool"):
        BlockPool(*shape)
