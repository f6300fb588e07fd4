"""What is in use here: versions, backends per op, devices, threads. `fastalign env` prints it; bug reports start with it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from types import ModuleType
from typing import Any

import torch

from .ops.attention_routes import available_routes
from .ops.backend import backend_for, forced_backend, has_triton, load_native

OPS = ("linear_logp", "linear_kl", "scan", "preference", "policy", "attention", "sample", "adamw", "int8", "gemm")
LAYER_OPS = ("rms_norm", "rope", "swiglu")
PACKAGES = ("fastalign", "torch", "numpy", "transformers", "peft", "datasets", "triton", "flash-attn", "math-verify", "fastapi", "uvicorn")


def env() -> dict[str, Any]:
    """What is in use, without importing anything heavy.

    Returns:
        python, platform, threads, native, triton and "forced backend" (text or number each); `packages` (name -> version or "not
        installed"), `devices` (name -> description) and `backends` (op -> "native" | "triton" | "reference" on each kind of device
        there is); with a GPU also "attention on cuda", which routes it takes.
    """
    devices = _devices()
    return {
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "native": _native(),
        "triton": _triton(),
        "forced backend": forced_backend() or "none",
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": devices,
        "backends": {op: _backends(op, has_cuda=len(devices) > 1) for op in (*OPS, *LAYER_OPS)},
        **({"attention on cuda": _cuda_attention()} if len(devices) > 1 else {}),
    }


def _cuda_attention() -> str:
    decode = "its own kernel" if backend_for("attention", "cuda") == "native" else "gathered keys"
    return f"trees and prefill: {available_routes()} (the first that can run a call); decode: {decode}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _native() -> str:
    module, reason = load_native()
    if module is None:
        return f"missing: {reason}"
    targets = [f"sm_{name.removesuffix('-real')}{'' if name.endswith('-real') else ' and PTX'}" for name in _architectures(module)]
    cuda = f"CUDA for {', '.join(targets)}" if module.cuda_ops else "no CUDA kernels (built without nvcc)"
    return f"CPU {module.isa()}, {cuda}"


def _architectures(module: ModuleType) -> list[str]:
    """As CMake names them: "80-real" is machine code alone, "90" machine code and PTX."""
    return [name for name in module.cuda_architectures.split(", ") if name]


def _devices() -> dict[str, str]:
    found = {"cpu": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gib = properties.total_memory / 2**30
            found[f"cuda:{index}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {gib:.0f} GiB"
    return found


def _triton() -> str:
    kernels = [op for op in OPS if has_triton(op)]
    return f"kernels for {', '.join(kernels)}" if kernels else "not installed"


def _backends(op: str, *, has_cuda: bool) -> str:
    try:
        cpu = backend_for(op, "cpu")
    except RuntimeError:  # Triton is forced, and it is not interpreting
        cpu = "none"
    return f"{cpu} (cpu), {backend_for(op, 'cuda')} (cuda)" if has_cuda else cpu
