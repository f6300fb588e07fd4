"""Copies between host and device that wait for nothing, or once.

A copy from ordinary host memory stops the host until it is done; one from page-locked memory is queued behind the work before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

ALIGNED = 16  # bytes: Triton compiles a kernel anew for pointers that are not multiples of it


class Staged:
    """A tensor on the device that the host rewrites: write `host`, then `push`. On the CPU both are one tensor.

    The device tensor keeps its address, as a CUDA graph needs it.

    Args:
        shape, dtype: of the tensor; it starts as zeros.
        device: where it is read.
    """

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=cuda)
        self.device = torch.zeros(shape, dtype=dtype, device=device) if cuda else self._host
        self._copied: torch.cuda.Event | None = None

    @property
    def host(self) -> Tensor:
        """To write to; waits until the last push has been read."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._host

    def push(self, rows: int | None = None) -> None:
        """Queues the copy of the first `rows` (default: all) on the current stream."""
        if self.device is self._host:
            return
        self.device[:rows].copy_(self._host[:rows], non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(self.device.device))


def to_host(*columns: Tensor) -> list[np.ndarray]:
    """The columns as arrays; from a GPU by one copy, so that the host waits once however many there are."""
    return fetch(*columns)()


def fetch(*columns: Tensor) -> Callable[[], list[np.ndarray]]:
    """Starts `to_host` and returns what waits for it, so that the host can do something else meanwhile."""
    if not columns[0].is_cuda:
        return lambda: [column.numpy() for column in columns]
    packed = pack_bytes(columns)
    host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(packed.device))

    def wait() -> list[np.ndarray]:
        copied.synchronize()
        return [column.numpy() for column in unpack_bytes(host, columns)]

    return wait


def to_device(device: torch.device | str, *columns: np.ndarray | Tensor) -> list[Tensor]:
    """Arrays or tensors as tensors on a device; from the host to a GPU by one copy from page-locked memory, for which nothing waits."""
    tensors = [torch.from_numpy(column) if isinstance(column, np.ndarray) else column for column in columns]
    ours = [tensor for tensor in tensors if tensor.is_cpu] if torch.device(device).type == "cuda" else []
    if not ours:
        return [tensor.to(device) for tensor in tensors]
    packed = _bytes_of(ours)
    host = torch.empty(sum(map(len, packed)), dtype=torch.uint8, pin_memory=True)
    torch.cat(packed, out=host)
    moved = iter(unpack_bytes(host.to(device, non_blocking=True), ours))
    return [next(moved) if tensor.is_cpu else tensor.to(device) for tensor in tensors]


class Traveller:
    """Columns of the host that go where they are asked for: to a GPU together, at the first time.

    Args:
        columns: tensors of the host; None stays None.
    """

    def __init__(self, *columns: Tensor | None) -> None:
        self._columns = list(columns)

    def at(self, device: torch.device) -> list[Tensor | None]:
        """The columns on this device, in the order given."""
        there = [column for column in self._columns if column is not None]
        if any(column.device != device for column in there):
            moved = iter(to_device(device, *there))
            self._columns = [None if column is None else next(moved) for column in self._columns]
        return self._columns


def pack_bytes(columns: Sequence[Tensor]) -> Tensor:
    """Tensors of any dtypes behind each other, as bytes, each at a multiple of `ALIGNED`."""
    return torch.cat(_bytes_of(columns))


def unpack_bytes(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of what `pack_bytes` packed, in the order given there."""
    found, at = [], 0
    for column in like:
        size = column.numel() * column.element_size()
        found.append(packed[at : at + size].view(column.dtype).view(column.shape))
        at += size + -size % ALIGNED
    return found


def _bytes_of(columns: Sequence[Tensor]) -> list[Tensor]:
    flat = [column.contiguous().view(-1).view(torch.uint8) for column in columns]
    return [nn.functional.pad(part, (0, -len(part) % ALIGNED)) if len(part) % ALIGNED else part for part in flat]
