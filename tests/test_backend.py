"""The choice of backend, and what env() tells about it."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import fastalign as fa
from fastalign.ops import backend
from fastalign.ops.attention import TreeLayout, tree_attention
from fastalign.ops.backend import backend_for, forced_backend, native, use_backend
from fastalign.ops.divergence import Divergence, kl_rows
from fastalign.ops.logits import logp_rows
from fastalign.ops.sampling import sample


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


def test_dtype_that_no_kernel_reads_is_announced_once():
    if native() is None:
        pytest.skip("the native module is not built")
    x = torch.randn(3, 8)
    heads, column = torch.randn(3, 2, 8), torch.ones(3)
    layout = TreeLayout(torch.tensor([0, 3], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32))
    calls = {
        "linear_logp: the native kernel on cpu reads bfloat16 and float32, not float16": lambda d: logp_rows(
            x.to(d), torch.zeros(3).long()
        ),
        "linear_kl: .* not float16": lambda d: kl_rows(x.to(d), x.to(d), Divergence(0, 0.5, 1.0)),
        "sample: .* not float16": lambda d: sample(x.to(d), column.double() / 2, column, column.long(), column, 0 * column),
        "attention: .* does not read torch.float16": lambda d: tree_attention(*[heads.to(d)] * 3, layout, scale=1.0),
    }
    for words, call in calls.items():
        backend.announce.cache_clear()
        with pytest.warns(UserWarning, match=words):
            call(torch.float16)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for dtype in (torch.float16, torch.float32, torch.float64):  # fp64 is the reference's own
                call(dtype)


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


@pytest.mark.skipif(not backend.has_triton("linear_logp"), reason="triton is not installed")
def test_triton_on_a_cpu_tensor_needs_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"linear_logp has a Triton kernel.*TRITON_INTERPRET=1.*force 'native'"):
            backend_for("linear_logp")
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            logp_rows(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
        assert backend_for("linear_logp", "cuda") == "triton"
        assert backend_for("scan") == "reference"  # it has no Triton kernel
        assert fa.env()["backends"]["sample"].startswith("none")
        assert logp_rows(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))[0].dtype == torch.float64
    assert backend_for("linear_logp") != "triton"


@pytest.mark.skipif(not backend.has_triton("linear_logp"), reason="triton is not installed")
def test_triton_is_chosen_on_cuda_where_no_native_kernel_is(monkeypatch):
    class NoCuda:
        ops, cuda_ops = ("linear_logp", "sample"), ()

    monkeypatch.setattr(backend, "load_native", lambda: (NoCuda, ""))
    assert backend_for("sample", "cuda") == "triton"
    assert backend_for("sample", "cpu") == "native"
    NoCuda.cuda_ops = ("sample",)
    assert backend_for("sample", "cuda") == "native"
    with use_backend("reference"):
        assert backend_for("sample", "cuda") == "reference"


@pytest.mark.skipif(not backend.has_triton("linear_logp"), reason="triton is not installed")
def test_env_tells_which_ops_have_triton_kernels():
    assert {"linear_logp", "sample"} <= set(fa.env()["triton"].removeprefix("kernels for ").split(", "))
