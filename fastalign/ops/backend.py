"""Which code runs an op: the native module, a Triton kernel, or the plain torch reference.

The choice is made per op and device, is printed by `fastalign env`, and can be forced for tests with `use_backend`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

import torch  # first: the native module takes OpenMP from the runtime that torch loads
from torch import Tensor

BACKENDS = ("reference", "native", "triton")

_forced: str | None = None


@functools.cache
def load_native() -> tuple[ModuleType | None, str]:
    """The native module, or None and the reason why it cannot be used. Announces a missing module once."""
    try:
        module = importlib.import_module("fastalign._C")
        module.read_by_table((torch.Tensor, torch.nn.Parameter), getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
        return module, ""
    except ModuleNotFoundError as error:
        if error.name != "fastalign._C":
            raise
        reason = "it is not built (install with a C++20 compiler present, or run `make build` in a clone)"
    except ImportError as error:
        reason = f"it does not load ({error}); an undefined GOMP_ or omp_ symbol means that torch brought no OpenMP runtime"
    warnings.warn(f"fastalign: no native module: {reason}. Every op runs on its slower torch reference.", stacklevel=2)
    return None, reason


def native() -> ModuleType | None:
    """The native module; None when it is not built, or when another backend is forced."""
    if _forced in ("reference", "triton"):
        return None
    module, reason = load_native()
    if module is None and _forced == "native":
        raise RuntimeError(f"use_backend('native'): the native module cannot be used: {reason}")
    return module


class use_backend:  # a verb, used like a function
    """Force one backend for every op: at once as a call, until the end of the block as a context manager.

    Args:
        name: "reference", "native" or "triton"; None goes back to the choice per op and device.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None and name not in BACKENDS:
            raise ValueError(f"use_backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")
        self._before = _forced
        _forced = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._before


def forced_backend() -> str | None:
    """The backend that `use_backend` set, or None."""
    return _forced


def load_triton(op: str) -> ModuleType:
    """The Triton kernels of an op that has them; importing them loads Triton."""
    return importlib.import_module(f"fastalign.kernels.{op}")


@functools.cache
def has_triton(op: str) -> bool:
    """Whether Triton is installed and has a kernel for this op."""
    return importlib.util.find_spec("triton") is not None and importlib.util.find_spec(f"fastalign.kernels.{op}") is not None


def _interprets() -> bool:
    """Whether kernels imported now run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def backend_reading(op: str, device: torch.device, reads: Mapping[str, Collection[torch.dtype]], *dtypes: torch.dtype) -> str:
    """`backend_for`, or "reference" where that backend does not read these dtypes, which is said once. fp64 is the reference's own.

    Args:
        reads: the dtypes that the kernels of each backend read.
    """
    backend = "reference" if torch.float64 in dtypes else backend_for(op, device)
    if backend == "reference" or set(dtypes) <= set(reads[backend]):
        return backend
    announce(f"{op}: the {backend} kernel on {device.type} reads {_names(reads[backend])}, not {_names(dtypes)}")
    return "reference"


def _names(dtypes: Collection[torch.dtype]) -> str:
    return " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


@functools.cache
def announce(what: str) -> None:
    """Says once that a slower path is taken."""
    warnings.warn(f"fastalign: {what}; its slower torch reference runs.", stacklevel=3)


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The mark of `torch.compiler.assume_constant_result`, which imports torch._dynamo: half of what `import fastalign.losses` takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def backend_for(op: str, device: torch.device | str = "cpu") -> str:
    """The backend that runs `op` on `device`.

    Args:
        op: the stem of its native source or Triton kernels: "linear_logp", "linear_kl", "scan", "preference", "policy", "attention",
            "sample", "adamw", "int8", "gemm", "rms_norm", "rope" or "swiglu".
        device: a torch device or its name.

    Returns:
        "native", "triton" or "reference": on the CPU native before reference, on CUDA native before Triton before reference.
        A forced backend that has no kernel for the op gives "reference".

    Raises:
        RuntimeError: "triton" is forced on a CPU device, and Triton's interpreter is not on.
    """
    cuda = torch.device(device).type == "cuda"
    if _forced in (None, "native"):
        module = native()
        if module is not None and op in (module.cuda_ops if cuda else module.ops):
            return "native"
    if (_forced == "triton" or (_forced is None and cuda)) and has_triton(op):
        if not cuda and not _interprets():
            raise RuntimeError(
                f"use_backend('triton'): {op} has a Triton kernel, which runs on a GPU; for a CPU tensor set TRITON_INTERPRET=1 in the "
                "environment before Python starts, move the tensors to CUDA, or force 'native' or 'reference'"
            )
        return "triton"
    return "reference"


PLAIN = (Tensor, torch.nn.Parameter)  # not a fake, a wrapper or a quantized tensor


def is_traced() -> bool:
    """Whether something follows the operations themselves: torch.compile, jit.trace, torch.func."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def native_for(op: str, *tensors: Tensor) -> ModuleType | None:
    """The native module where it runs `op` on these: plain fp32 or bf16 tensors of one dtype on the CPU, not traced, no autocast.

    None sends the call to the reference, which says what is wrong with unusual operands.
    """
    dtype = tensors[0].dtype
    if is_traced() or torch.is_autocast_enabled("cpu"):
        return None
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        if dtype is not torch.float64 and tensors[0].is_cpu:  # fp64 is the reference's own
            announce(f"{op}: the native kernel on cpu does not read {dtype}; cast to float32 or bfloat16 for it")
        return None
    for x in tensors:
        if type(x) not in PLAIN or x.dtype is not dtype or not x.is_cpu or x.layout is not torch.strided:
            return None
    if _forced is not None and _forced != "native":
        return None
    module = native()
    return module if module is not None and op in module.ops else None


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd follows one of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
