"""A CUDA device without a GPU: tensors that say `cuda:0` and lie in host memory, under torch's rules for devices.

Inside `stand_in_cuda()` the code of a GPU runs on a CPU. As on a GPU an op over tensors of two devices raises, a device tensor has no
`.numpy()`, and what `torch.empty` gives may hold anything: here NaN. Our CUDA kernels run on their host twin where a module that has them
is given. It says nothing about speed, about streams, or about what torch's own C++ code would do on a device; decode steps are run again
instead of being replayed. It holds for the calling thread and those that start inside of it.

What is on the device is known by storage, so views go along. torch's C++ code itself only sees the CPU: a tensor that it makes out of
nothing (the zeros that a backward pass starts from) belongs to no device until it meets one.
"""

from __future__ import annotations

import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.generation import graphs
from fastalign.ops import backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MAKERS = {"zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "randperm", "linspace", "eye", "from_numpy", "frombuffer"}
FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)
ANY_DEVICES = {"copy_", "_to_copy", "set_", "resize_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}  # takes indices of the CPU
UNFILLED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
WAITS = {"_local_scalar_dense", "nonzero"}

waits: Counter[str] = Counter()  # what a host would have waited for, by op: also each copy to the device that is not `non_blocking`
_debug = {"mode": "default"}  # of torch.cuda.set_sync_debug_mode


def _wait(name: str, *, unless: bool = False) -> None:
    waits[name] += not unless
    if not unless and _debug["mode"] == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {name}")


_host = {name: getattr(torch._C.TensorBase, name) for name in ("device", "is_cuda", "is_cpu")}


class _Storages:
    """A set of storages that forgets those which are gone."""

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}  # by address, which is not used again while there is a weak reference to it

    def __contains__(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._held

    def add(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        assert storage is not None, "a tensor without a storage has no place"
        self._held[storage._cdata] = StorageWeakRef(storage)
        if len(self._held) % 4096 == 0:
            self._held = {address: held for address, held in self._held.items() if not held.expired()}

    def discard(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage is not None:
            self._held.pop(storage._cdata, None)


_on_device, _anywhere = _Storages(), _Storages()


class _Progress(threading.local):
    """A thread's calls from Python that are in progress: name, device that was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def append(self, call: tuple[str, Any]) -> None:
        self.calls.append(call)

    def pop(self) -> None:
        self.calls.pop()

    def last(self) -> tuple[str, Any]:
        return self.calls[-1] if self.calls else ("", None)


_asked = _Progress()


def _storage(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        try:
            return torch._C.TensorBase.untyped_storage(tensor)
        except (NotImplementedError, RuntimeError):  # sparse tensors
            return None


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _place(tensor: Tensor, *, cuda: bool, anywhere: bool = False) -> Tensor:
    for storages, member in ((_on_device, cuda), (_anywhere, anywhere)):
        storages.add(tensor) if member else storages.discard(tensor)
    return tensor


class _Ops(TorchDispatchMode):
    """Checks where an op's operands are, and says where its results are."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._overloadpacket.__name__
        given = kwargs.get("device")
        if _is_cuda(given):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        operands = list(_tensors(args)) + list(_tensors(kwargs.values()))
        on = [x in _on_device for x in operands]
        if any(on):
            _check(name, args, operands, on)
            if name in WAITS:
                _wait(name)
        known = {storage._cdata for x in operands if (storage := _storage(x)) is not None}
        if name == "mm" and func._overloadname == "dtype":  # a wide sum of narrow products: torch has it on CUDA alone
            out = torch.mm(*(x.to(args[2]) for x in args[:2]))
        elif name == "mm" and func._overloadname == "dtype_out":
            out = torch.mm(*(x.to(args[2]) for x in args[:2]), out=kwargs["out"])
        elif name == "set_":  # another storage, which is where it was
            return func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if name in UNFILLED and out.is_floating_point() and not out.is_meta:
            out.fill_(torch.nan)
        if any(on) and operands[0] in _anywhere and name.endswith("_"):
            _place(operands[0], cuda=True)
        anywhere = False
        if _is_cuda(given):
            cuda = True
        elif _asked.last()[1] is not None:
            cuda = _is_cuda(_asked.last()[1])
        elif operands:
            cuda = any(on) and not (given is not None and operands[0].is_meta)
            anywhere = not cuda and any(x in _anywhere for x in operands)
        else:
            cuda, anywhere = False, _asked.last()[0] not in MAKERS
        for x in _tensors((out,)):
            if (storage := _storage(x)) is not None and storage._cdata not in known:
                _place(x, cuda=cuda, anywhere=anywhere)
        return out


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of an op's arguments or results, also those in its lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _check(name: str, args: Any, operands: list[Tensor], on: list[bool]) -> None:
    """Raises what torch raises for operands of two devices. A number in a CPU tensor may be anywhere."""
    if all(on) or name in ANY_DEVICES:
        return
    strays = [x for x, there in zip(operands, on, strict=True) if not there and x.dim() > 0 and x not in _anywhere]
    if name in INDEXING and on[0]:
        _wait("an index on the host", unless=not strays)
        strays = [x for x in strays if len(args) > 2 and x is args[2]]
    if strays:
        shapes = ", ".join(str(list(x.shape)) for x in strays)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name}: {shapes})"
        )


class _Calls(TorchFunctionMode):
    """What the dispatcher is not told of: the device that a caller asked for, and calls that do nothing where nothing moves."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _asked.append((getattr(func, "__name__", ""), kwargs.get("device")))
        try:
            return _call(func, args, kwargs)
        finally:
            _asked.pop()


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
        return _moved(func, *args, **kwargs)
    if func is Tensor.numpy and args[0] in _on_device:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
    if func is Tensor.pin_memory:
        return args[0]
    if func is Tensor.copy_ and (args[0] in _on_device) != (args[1] in _on_device):
        _wait("copy_", unless=kwargs.get("non_blocking", len(args) > 2 and args[2]))
    device = kwargs.get("device")
    if func is Tensor.new_tensor or (func in FROM_DATA and not _is_meta(device)):
        rest = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        if func is Tensor.new_tensor:
            cuda = args[0] in _on_device if device is None else _is_cuda(device)
            _wait("new_tensor", unless=not cuda)
            return _place(torch.tensor(*args[1:], **rest), cuda=cuda)
        if isinstance(args[0], Tensor) and func is not torch.tensor:
            return args[0] if device is None else _moved(Tensor.to, args[0], device, **rest)
        out = func(*args, **rest)
        _wait(func.__name__, unless=not _is_cuda(device))
        return _place(out, cuda=True) if _is_cuda(device) else out
    return func(*args, **kwargs)


def _moved(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to, .cpu and .cuda."""
    if func is Tensor.to:
        device, rest = kwargs.get("device"), list(args)
        if rest and isinstance(rest[0], Tensor):
            device, kwargs["dtype"] = rest[0].device, rest[0].dtype
        elif rest and (rest[0] is None or isinstance(rest[0], str | int | torch.device)):
            device = rest[0]
        dtypes = [value for value in (*rest, kwargs.get("dtype")) if isinstance(value, torch.dtype)]
        dtype = dtypes[0] if dtypes else x.dtype
    else:
        device, dtype = CPU if func is Tensor.cpu else CUDA, x.dtype
    if x.is_meta or _is_meta(device):
        return func(x, *args, **kwargs)
    cuda = x in _on_device if device is None else _is_cuda(device)
    if cuda == (x in _on_device):
        return x.to(dtype, copy=kwargs.get("copy", False))
    _wait("to the device" if cuda else "to the host", unless=kwargs.get("non_blocking", False))
    _asked.append(("to", CUDA if cuda else CPU))
    try:
        return torch.ops.aten._to_copy(x, dtype=dtype, device=CUDA if cuda else CPU)
    finally:
        _asked.pop()


class _Stream:
    cuda_stream, device = 0, CUDA

    def __init__(self, *_args: Any, **_options: Any) -> None: ...
    def synchronize(self) -> None:
        _wait("synchronize")

    def wait_stream(self, _other: Any) -> None: ...


class _Event:
    """Of a copy that the device has made when it is asked, a step later: that waits for nothing, and is not counted."""

    def __init__(self, *_args: Any, **_options: Any) -> None: ...
    def record(self, *_args: Any) -> None: ...
    def synchronize(self) -> None: ...


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **options: value


PROPERTIES = {"name": "stand-in", "major": 7, "minor": 5, "total_memory": 16 << 30, "multi_processor_count": 4}
DEVICE = {
    "is_available": _always(True),
    "is_initialized": _always(True),
    "_lazy_init": _always(None),
    "device_count": _always(1),
    "current_device": _always(0),
    "set_device": _always(None),
    "device": _always(nullcontext()),
    "device_of": _always(nullcontext()),
    "stream": _always(nullcontext()),
    "Stream": _Stream,
    "current_stream": _always(_Stream()),
    "Event": _Event,
    "synchronize": _always(None),
    "mem_get_info": _always((8 << 30, 16 << 30)),
    "max_memory_allocated": _always(0),
    "memory_allocated": _always(0),
    "reset_peak_memory_stats": _always(None),
    "empty_cache": _always(None),
    "get_device_name": _always("stand-in"),
    "get_device_capability": _always((7, 5)),  # attention over segments is torch's own then: fused kernels do not run on a CPU
    "get_device_properties": _always(types.SimpleNamespace(**PROPERTIES)),
    "set_sync_debug_mode": lambda mode: _debug.update(mode=mode),
    "get_rng_state_all": _always([]),
    "set_rng_state_all": _always(None),
    "manual_seed_all": _always(None),
    "manual_seed": _always(None),
}


class _Native:
    """The native module with the CUDA functions of the twin, and none of its own."""

    def __init__(self, native: types.ModuleType, twin: types.ModuleType | None) -> None:
        self._native, self._twin = native, twin
        self.cuda_ops = () if twin is None else twin.cuda_ops

    def __getattr__(self, name: str) -> Any:
        own = not name.endswith("_cuda") and hasattr(self._native, name)
        return getattr(self._native if own or self._twin is None else self._twin, name)

    def read_by_table(self, *_types: Any) -> None:
        """Tensors are read by their attributes, which know the device."""
        self._native.read_by_table((), None)


class _Recorder:
    """Of decode steps: they are run again. One that waits for the device cannot be recorded."""

    def __init__(self, device: torch.device) -> None:
        assert device == CUDA

    def __call__(self, step: graphs.Replay) -> graphs.Replay:
        step()
        before = waits.total()
        step()
        if waits.total() > before:
            raise RuntimeError("operation not permitted when stream is capturing")
        return step

    def renew(self) -> None:
        """There is no pool."""


@contextmanager
def stand_in_cuda(twin: types.ModuleType | None = None) -> Iterator[None]:
    """Makes this process a machine with one CUDA device.

    Args:
        twin: a native module with the CUDA kernels' host twin (fixture `cuda_twin`), for tensors on the device; None: no such kernels.
    """
    run = torch.autograd.graph._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        _asked.append(("backward", None))
        try:
            with _Calls():  # it is off inside of the call that started the backward pass
                return run(*args, **kwargs)
        finally:
            _asked.pop()

    with pytest.MonkeyPatch.context() as patch, _native(patch, twin):
        for name, value in DEVICE.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(Tensor, "device", property(lambda x: CUDA if x in _on_device else _of_host("device", x)), raising=False)
        patch.setattr(Tensor, "is_cuda", property(lambda x: x in _on_device), raising=False)
        patch.setattr(Tensor, "is_cpu", property(lambda x: x not in _on_device and _of_host("is_cpu", x)), raising=False)
        patch.setattr(torch.autograd, "_engine_run_backward", backward)
        patch.setattr(torch.autograd.graph, "_engine_run_backward", backward)
        patch.setattr(graphs, "CudaRecorder", _Recorder)
        patch.setattr(threading.Thread, "run", _run_thread)
        with _Calls(), _Ops():
            yield


_thread = threading.Thread.run


def _run_thread(thread: threading.Thread) -> None:
    with _Calls(), _Ops():
        _thread(thread)


@contextmanager
def _native(patch: pytest.MonkeyPatch, twin: types.ModuleType | None) -> Iterator[None]:
    """The native module, if there is one, has the CUDA kernels of the twin."""
    native = backend.load_native()[0]
    if native is None:
        yield
        return
    patch.setitem(sys.modules, "fastalign._C", _Native(native, twin))  # type: ignore[arg-type]
    backend.load_native.cache_clear()
    try:
        yield
    finally:
        sys.modules["fastalign._C"] = native
        backend.load_native.cache_clear()
        backend.load_native()


def _of_host(name: str, x: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        return _host[name].__get__(x)
