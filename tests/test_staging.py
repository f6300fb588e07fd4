"""Copies between host and device: what is packed comes back as it was."""

import numpy as np
import pytest
import torch

from fastalign.staging import ALIGNED, Staged, Traveller, pack_bytes, to_device, to_host, unpack_bytes

COLUMNS = (
    torch.tensor([1.5, float("nan"), -0.0]),
    torch.tensor([-1, 2**40, 7]),
    torch.tensor([True, False, True]),
    torch.arange(6, dtype=torch.int32).view(2, 3).t(),  # not contiguous
    torch.empty(0),
    torch.tensor([1.0, 2.0], dtype=torch.float64),
)


def same_bytes(found, columns):
    for ours, column in zip(found, columns, strict=True):
        want = column.cpu().contiguous().numpy()
        assert ours.dtype == want.dtype
        assert ours.shape == want.shape
        assert ours.tobytes() == want.tobytes()


def test_packed_bytes_come_back_in_their_order():
    packed = pack_bytes(COLUMNS)
    assert packed.dtype == torch.uint8
    assert packed.numel() == sum(-(-column.numel() * column.element_size() // ALIGNED) * ALIGNED for column in COLUMNS)
    same_bytes([x.numpy() for x in unpack_bytes(packed, COLUMNS)], COLUMNS)


def test_to_host_of_host_tensors_copies_nothing():
    found = to_host(COLUMNS[0], COLUMNS[1])
    same_bytes(found, COLUMNS[:2])
    assert np.shares_memory(found[0], COLUMNS[0].numpy())


def test_staged_on_the_cpu_is_one_tensor():
    staged = Staged(2, 3, dtype=torch.int64, device=torch.device("cpu"))
    assert not staged.device.any()
    staged.host[1] = 5
    staged.push()
    assert staged.device.tolist() == [[0, 0, 0], [5, 5, 5]]
    assert staged.device.data_ptr() == staged.host.data_ptr()


@pytest.mark.gpu
def test_to_host_from_the_gpu():
    columns = tuple(column.cuda() for column in COLUMNS)
    same_bytes(to_host(*columns), COLUMNS)


@pytest.mark.gpu
def test_staged_on_the_gpu_keeps_its_address_and_the_order_of_its_contents():
    staged = Staged(1 << 20, dtype=torch.int64, device=torch.device("cuda"))
    address, seen = staged.device.data_ptr(), []
    for number in range(8):
        staged.host.fill_(number)  # waits until the copy before has been read
        staged.push()
        seen.append(staged.device.clone())
    staged.host[:3] = 99
    staged.push(2)
    assert staged.device.data_ptr() == address
    assert [int(x.min()) for x in seen] == [int(x.max()) for x in seen] == list(range(8))
    assert staged.device[:4].tolist() == [99, 99, 7, 7]


@pytest.mark.gpu
def test_columns_of_host_and_gpu_come_together_on_the_gpu():
    mixed = tuple(column.cuda() if i % 2 else column for i, column in enumerate(COLUMNS))
    moved = to_device("cuda", *mixed)
    assert all(column.is_cuda for column in moved)
    same_bytes(to_host(*moved), COLUMNS)
    traveller = Traveller(None, *mixed, None)
    first, *there, last = traveller.at(torch.device("cuda", 0))
    assert first is last is None
    same_bytes(to_host(*there), COLUMNS)
    assert all(ours is theirs for ours, theirs in zip(traveller.at(torch.device("cuda", 0)), [None, *there, None], strict=True))


def test_traveller_stays_at_home_on_the_cpu():
    there = Traveller(COLUMNS[0], None).at(torch.device("cpu"))
    assert there[0] is COLUMNS[0]
    assert there[1] is None
