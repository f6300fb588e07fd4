"""Peak memory of the process, in MiB, that can be started afresh between two steps."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

MIB = 2**20


class PeakMemory:
    """The most memory held since `reset`: allocated by torch on a GPU, resident (VmHWM) on the CPU.

    Args:
        device: "cpu" or "cuda".

    Attributes:
        imports_mib: what the process held when this was built; build it after the imports and before the model.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.imports_mib = 0.0 if self.cuda else _status_mib("VmRSS")

    def reset(self) -> None:
        """Forgets the peak so far.

        Raises:
            OSError: the kernel does not let a process reset its own peak (Linux 4.0 or newer does).
        """
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak_mib(self) -> float:
        """MiB held at the most since `reset`."""
        return torch.cuda.max_memory_allocated() / MIB if self.cuda else _status_mib("VmHWM")


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}; peak memory is measured on Linux")


def states_mib(model: nn.Module, *, reference: bool) -> float:
    """MiB of weights, gradients, two AdamW moments and, where there is a reference, its weights, all in the weights' dtype."""
    copies = 5 if reference else 4
    return copies * sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
