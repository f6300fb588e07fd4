"""Copies between host and device that wait for nothing, or once.

A copy from ordinary host memory stops the host until it is done; one from page-locked memory is queued behind the work before it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
        self._copied.record()


def to_host(*columns: Tensor) -> list[np.ndarray]:
    """The columns as arrays; from a GPU by one copy, so that the host waits once however many there are."""
    if not columns[0].is_cuda:
        return [column.numpy() for column in columns]
    packed = pack_bytes(columns)
    host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(packed.device).synchronize()
    return unpack_bytes(host, columns)


def pack_bytes(columns: tuple[Tensor, ...]) -> Tensor:
    """Tensors of any dtypes behind each other, as bytes, wide dtypes first so that each starts where its dtype may."""
    ordered = sorted(columns, key=lambda column: -column.element_size())
    return torch.cat([column.contiguous().view(-1).view(torch.uint8) for column in ordered])


def unpack_bytes(packed: Tensor, like: tuple[Tensor, ...]) -> list[np.ndarray]:
    """What `pack_bytes` packed, in the order given there."""
    found: dict[int, np.ndarray] = {}
    at = 0
    for i in sorted(range(len(like)), key=lambda i: -like[i].element_size()):
        size = like[i].numel() * like[i].element_size()
        found[i] = packed[at : at + size].view(like[i].dtype).view(like[i].shape).numpy()
        at += size
    return [found[i] for i in range(len(like))]
