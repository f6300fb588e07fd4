"""Shared fixtures: fresh seeds, backends that a test may force, and a skip for what needs a GPU."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():  # before any Triton kernel is imported: they then run interpreted, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastalign.ops.backend import load_native, use_backend

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "run the tests marked gpu on a stand-in of a CUDA device (tests/stand_in_cuda.py); it is slow"
    parser.addoption("--stand_in_cuda", action="store_true", help=help_text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip where there is no CUDA device, those with a "native" parameter where the native module is not built."""
    for item in items if load_native()[0] is None else ():
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value == "native" for value in parameters):
            item.add_marker(pytest.mark.skip(reason="the native module is not built"))
    if torch.cuda.is_available() or config.getoption("stand_in_cuda"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same seed and leaves the thread count and the backend as they were."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    use_backend(None)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under --stand_in_cuda a test marked `gpu` has its device."""
    if not request.config.getoption("stand_in_cuda") or request.node.get_closest_marker("gpu") is None:
        yield
        return
    from stand_in_cuda import stand_in_cuda

    with stand_in_cuda(request.getfixturevalue("cuda_twin")):
        yield


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on each CPU backend that this installation has."""
    if request.param == "native" and load_native()[0] is None:
        pytest.skip("the native module is not built")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["native", "triton"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kernel that runs on this machine's CPU; Triton interpreted."""
    if request.param == "native" and load_native()[0] is None:
        pytest.skip("the native module is not built")
    if request.param == "triton" and (importlib.util.find_spec("triton") is None or torch.cuda.is_available()):
        pytest.skip("no interpreted Triton")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["baseline", "avx2", "avx512", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each CPU instruction set that this machine has."""
    module, _ = load_native()
    if module is None:
        pytest.skip("the native module is not built")
    before = module.isa()
    try:
        module.set_isa(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    module.set_isa(before)


@pytest.fixture(scope="session")
def rounding_interpreter() -> Iterator[None]:
    """Triton's interpreter cuts fp32 off to bf16; a GPU rounds to nearest even, and so does the interpreter within this fixture."""
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    before = builder.cast_impl

    def cast(self: Any, src: Any, to: Any) -> Any:
        if src.dtype.scalar.is_fp32() and to.scalar.is_bf16():
            rounded = torch.from_numpy(src.data).bfloat16().view(torch.uint16)
            return interpreter.TensorHandle(rounded.numpy(), to.scalar)
        return before(self, src, to)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("cast_impl", "create_fp_trunc"):
            patch.setattr(builder, name, cast)
        yield


@pytest.fixture(scope="session")
def cuda_twin() -> ModuleType:
    """Every CUDA kernel compiled by the C++ compiler over the host twin of its block primitives (csrc/cuda/host_block.h), behind the
    bindings that a GPU's build has. It is kept in build/ for as long as no source changes."""
    compiler = (os.environ.get("CXX") or shutil.which("g++") or "").split()
    pybind11 = pytest.importorskip("pybind11")
    if not compiler or shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    ops = [path.stem for path in kernels]
    includes = [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    macros = [f"-DHAS_{prefix}{op}" for op in ops for prefix in ("", "CUDA_")]
    macros += ["-DHAS_CUDA", "-DFA_CUDA_ALONE", '-DFA_CUDA_ARCHITECTURES="host twin"']
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-x", "c++", "-c", *macros, *includes]
    bindings = "".join(f'#include "{name}.cpp"\n' for name in ("bindings", *(f"bind_{op}" for op in ops)))  # at once: CMakeLists.txt
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc").rglob("*.*")))
    folder = ROOT / "build" / f"cuda-twin-{hashlib.sha256(text + repr((compiler, flags, sys.version)).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [(folder / "all_bindings.cpp", "-O0"), *((path, "-O1") for path in kernels)]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other test processes wait for this one's
        if not (folder / "_C.so").exists():
            sources[0][0].write_text(bindings)
            objects = [str(folder / f"{number}.o") for number in range(len(sources))]
            commands = [[*compiler, *flags, level, str(path), "-o", to] for (path, level), to in zip(sources, objects, strict=True)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_compile, commands))
            _compile([*compiler, "-shared", *objects, "-o", str(folder / "linked.so")])
            (folder / "linked.so").replace(folder / "_C.so")
    spec = importlib.util.spec_from_file_location("cuda_twin._C", folder / "_C.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and not done.stderr:
        pytest.skip(f"the compiler {command[0]} does not work")
    assert done.returncode == 0, done.stderr
