"""How tensors cross the binding: by torch's table of C functions, or by their attributes; the same either way."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalign.ops import backend
from fastalign.ops.backend import native
from fastalign.ops.preference_native import fits

CAPSULE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
TYPES = (torch.Tensor, torch.nn.Parameter)

pytestmark = pytest.mark.skipif(native() is None, reason="the native module is not built")


@pytest.fixture(params=["table", "attributes"])
def module(request):
    """The native module, reading tensors in one of the two ways."""
    found, _ = backend.load_native()
    if not found.read_by_table(TYPES, CAPSULE if request.param == "table" else None) and request.param == "table":
        pytest.skip("this torch has no table of a known layout")
    yield found
    found.read_by_table(TYPES, CAPSULE)


def discounted(module, rewards, cu_seqlens):
    returns = torch.full((rewards.numel(),), torch.nan, dtype=rewards.dtype)
    module.discounted_returns(rewards, cu_seqlens, 0.5, returns)
    return returns


OFFSETS = torch.tensor([0, 1, 3], dtype=torch.int32)


def test_this_torch_has_a_table():
    found, _ = backend.load_native()
    assert found.read_by_table(TYPES, CAPSULE) == (CAPSULE is not None)
    assert not found.read_by_table(TYPES, object())
    assert found.read_by_table(TYPES, CAPSULE) == (CAPSULE is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_dtypes_offsets_of_storage(module, dtype):
    whole = torch.tensor([9.0, 1.0, 2.0, 4.0], dtype=dtype)
    wanted = torch.tensor([1.0, 4.0, 4.0], dtype=dtype)
    assert torch.equal(discounted(module, whole[1:], OFFSETS), wanted)
    assert torch.equal(discounted(module, torch.nn.Parameter(whole)[1:], OFFSETS), wanted)  # requires a gradient
    assert torch.equal(discounted(module, torch.nn.Parameter(whole[1:]), OFFSETS), wanted)


def test_gaps_and_kinds_are_refused_by_name(module):
    with pytest.raises(ValueError, match="gaps"):
        discounted(module, torch.ones(6)[::2], OFFSETS)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected int32 \[\*\], got int64 \[3\]"):
        discounted(module, torch.ones(3), OFFSETS.long())
    with pytest.raises(ValueError, match=r"cu_seqlens: expected int32 \[\*\], got bool"):
        discounted(module, torch.ones(3), OFFSETS.bool())
    with pytest.raises(TypeError, match=r"no native kernel reads dtype torch\.complex64"):
        discounted(module, torch.ones(3), torch.ones(3, dtype=torch.complex64))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_what_is_no_tensor_with_memory_is_refused(module):
    for wrong in (None, [1.0], "text"):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            module.discounted_returns(torch.ones(3), OFFSETS, 0.5, wrong)
    with FakeTensorMode():
        fake = torch.ones(3)
    for without in (fake, torch.ones(3, device="meta")):
        with pytest.raises((TypeError, RuntimeError), match=r"without memory|data pointer"):
            module.discounted_returns(without, OFFSETS, 0.5, torch.ones(3))


def test_subclasses_answer_for_themselves(module):
    class Tagged(torch.Tensor):
        pass

    assert torch.equal(discounted(module, torch.tensor([1.0, 2.0, 4.0]).as_subclass(Tagged), OFFSETS), torch.tensor([1.0, 4.0, 4.0]))


def test_no_rows(module):
    assert discounted(module, torch.ones(0), torch.zeros(1, dtype=torch.int32)).shape == (0,)


@pytest.mark.parametrize("unit", [1, 2])
def test_fits_is_said_only_of_what_the_kernels_take(module, unit):
    cu = torch.tensor([0, 3, 5, 5, 9], dtype=torch.int32)
    logp, sums, each = torch.randn(9), torch.randn(4), torch.ones(4 // unit)
    assert fits(logp, cu, None, None, None, unit) == fits(logp, cu, sums, each, each, unit) == 1
    assert fits(logp, cu, torch.randn(9), None, each, unit) == 2
    assert fits(logp.double(), cu, torch.randn(9).double(), None, None, unit) == 2
    refused = [
        (logp.bfloat16(), cu, None, None, None),
        (logp[None], cu, None, None, None),
        (torch.randn(18)[::2], cu, None, None, None),
        (logp, cu.long(), None, None, None),
        (logp, cu[:0], None, None, None),
        (logp, cu, logp.double(), None, None),
        (logp, cu, torch.randn(8), None, None),
        (logp, cu, None, each[:-1], None),
        (logp, cu, None, None, each.double()),
        (torch.randn(4), torch.arange(5, dtype=torch.int32), torch.randn(4), None, None),  # tokens or sums
    ]
    assert [fits(*arguments, unit) for arguments in refused] == [0] * len(refused)
    assert unit == 1 or fits(logp, cu[:-1], None, None, None, unit) == 0  # an odd number of sequences
    with backend.use_backend("reference"):
        assert fits(logp, cu, None, None, None, unit) == 0
