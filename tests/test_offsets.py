"""Offsets are read as they were given: an int64 that int32 cannot hold is an error, never another number."""

import pytest
import torch

import fastalign as fa
from fastalign.ops.offsets import as_int32
from fastalign.ops.policy import policy_loss
from fastalign.ops.scan import discounted_returns, gae

WRAPS = torch.tensor([0, 2**32 + 2, 4])  # in int32 it would be [0, 2, 4]


@pytest.mark.parametrize("forced", ["reference", None])
def test_offsets_that_wrap_are_refused_by_every_op(forced):
    x, two = torch.rand(4), torch.tensor([True, False])
    calls = (
        lambda: fa.preference_loss(-x, WRAPS),
        lambda: fa.preference_loss(-x, WRAPS, loss="aot"),
        lambda: fa.unpaired_loss(-x, WRAPS, two),
        lambda: policy_loss(-x, None, x, x, loss="gspo", cu_targets=WRAPS),
        lambda: gae(x, x, WRAPS),
        lambda: discounted_returns(x, WRAPS),
    )
    for call in calls:
        with fa.use_backend(forced), pytest.raises(ValueError, match=r"must rise from 0 to the 4 [a-z-]+, got \[0, 4294967298, 4\]"):
            call()


def test_offsets_of_any_integer_dtype_are_the_same_offsets():
    for dtype in (torch.int16, torch.int32, torch.int64):
        found = as_int32("op: cu", torch.tensor([0, 0, 3], dtype=dtype), 3)
        assert found.dtype == torch.int32
        assert found.tolist() == [0, 0, 3]


@pytest.mark.parametrize("offsets", [[], [1, 3], [0, 2], [0, 3, 2, 3]])
def test_offsets_that_do_not_rise_to_the_end_are_refused(offsets):
    with pytest.raises(ValueError, match="op: cu must rise from 0 to the 3 rows, got"):
        as_int32("op: cu", torch.tensor(offsets, dtype=torch.int64), 3, of="rows")


def test_offsets_beyond_int32_say_so():
    with pytest.raises(ValueError, match=r"int32 offsets, which 2147483648 tokens exceed; split the batch"):
        as_int32("op: cu", torch.tensor([0, 2**31]), 2**31)
