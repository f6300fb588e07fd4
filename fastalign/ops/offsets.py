"""Offsets of packed sequences: int32 for the kernels, checked wherever reading them waits for no device."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 2**31 - 1


def as_int32(what: str, offsets: Tensor, num: int, *, of: str = "tokens") -> Tensor:
    """Offsets [S+1] of any integer dtype as int32 where they are; on a GPU, and while tracing, they are taken as they are.

    They are checked before they are narrowed: 2³² + 3 would come out as 3.

    Raises:
        ValueError: they do not rise from 0 to `num`, or `num` does not fit.
    """
    if not torch.compiler.is_compiling() and offsets.device.type == "cpu":
        rises = len(offsets) > 0 and int(offsets[0]) == 0 and int(offsets[-1]) == num and not bool((offsets[1:] < offsets[:-1]).any())
        if not rises:
            raise ValueError(f"{what} must rise from 0 to the {num} {of}, got {offsets[:16].tolist()}")
        if num > MOST:
            raise ValueError(f"{what}: the kernels take int32 offsets, which {num} {of} exceed; split the batch")
    return offsets.to(torch.int32)
