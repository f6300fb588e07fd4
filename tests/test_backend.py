"""The choice of backend, and what env() tells about it."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import fastalign as fa
from fastalign.ops import backend
from fastalign.ops.backend import backend_for, forced_backend, native, use_backend


def test_use_backend_restores_what_was_forced_before():
    with use_backend("reference"):
        assert forced_backend() == "reference"
        assert native() is None
        with use_backend(None):
            assert forced_backend() is None
        assert backend_for("scan") == "reference"
    assert forced_backend() is None


def test_use_backend_sets_at_once_without_a_block():
    use_backend("reference")
    assert backend_for("linear_logp") == "reference"
    use_backend(None)


def test_use_backend_names_the_choices():
    with pytest.raises(ValueError, match="reference, native, triton"):
        use_backend("nativ")
    assert forced_backend() is None


def test_backend_for_falls_back_where_there_is_no_kernel():
    assert backend_for("no_such_op") == "reference"
    assert backend_for("no_such_op", "cuda") == "reference"


def test_missing_native_module_is_announced_once(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(backend.importlib, "import_module", absent)
    backend.load_native.cache_clear()
    try:
        with pytest.warns(UserWarning, match="slower torch reference"):
            assert native() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native() is None
            assert backend_for("scan") == "reference"
        with use_backend("native"), pytest.raises(RuntimeError, match="not built"):
            native()
    finally:
        backend.load_native.cache_clear()


def test_native_module_brings_no_openmp_runtime_of_its_own():
    module = native()
    if module is None:
        pytest.skip("the native module is not built")
    code = (
        "import torch, fastalign._C;"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'libomp' in line or 'libiomp' in line};"
        "print(len(maps))"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1


def test_set_isa_names_the_choices():
    module = native()
    if module is None:
        pytest.skip("the native module is not built")
    with pytest.raises(ValueError, match="baseline"):
        module.set_isa("sse9")


def test_env_tells_versions_threads_and_backends():
    found = fa.env()
    assert found["threads"] == torch.get_num_threads()
    assert found["packages"]["torch"] == torch.__version__
    assert set(found["backends"]["scan"].split()) & {"native", "reference"}
    with use_backend("reference"):
        assert fa.env()["backends"]["linear_logp"].startswith("reference")
