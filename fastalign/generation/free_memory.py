"""Memory that could still be taken, on a GPU or in this process's share of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from fastalign.models.backbone import causal_lm

V2, V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
FILES = ((V2, "memory.max", "memory.current"), (V1, "memory.limit_in_bytes", "memory.usage_in_bytes"))


def free_bytes(model: nn.Module) -> int:
    """Memory that could be taken on the model's device."""
    device = next(causal_lm(model).parameters()).device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = (limit_left(folder, limit, used) for folder, limit, used in FILES)
    return min([machine_left(), *(value for value in left if value is not None)])


def machine_left() -> int:
    """Bytes of the machine that programs could have."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def limit_left(folder: Path, limit: str, used: str) -> int | None:
    """Bytes below a control group's limit, files that it could drop counted as free; None without one. A container has such a limit."""
    try:
        most, now = ((folder / name).read_text().strip() for name in (limit, used))
        if most == "max":
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        droppable = int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
        return max(0, int(most) - int(now) + droppable)
    except (OSError, ValueError):
        return None
