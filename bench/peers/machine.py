"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def pick_device(name: str) -> str:
    """cpu or cuda; auto takes the GPU where torch sees one."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def synchronize() -> None:
    """Waits for the GPU, where there is one, so that a clock read next counts what was launched."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe(*packages: str) -> str:
    """One line: processor (or GPU), cores, and the versions of `packages`."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    load = os.getloadavg()[0]
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load:.1f} at the start; " + ", ".join(
        f"{p} {version(p)}" for p in packages
    )


def processor() -> str:
    """The processor's name, with family and model where the system tells them: a hypervisor names many generations alike."""
    info = Path("/proc/cpuinfo")
    pairs = (line.partition(":") for line in info.read_text().splitlines()) if info.exists() else ()
    facts: dict[str, str] = {}
    for name, _, value in pairs:
        facts.setdefault(name.strip(), value.strip())
    named = facts.get("model name") or platform.processor() or platform.machine()
    return f"{named} (family {facts['cpu family']} model {facts['model']})" if {"cpu family", "model"} <= facts.keys() else named


def version(package: str) -> str:
    """The installed version, or "source" for a package run from its tree."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"
