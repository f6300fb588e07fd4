"""Every Triton kernel compiled for sm_80 and sm_90 without a GPU: the interpreter takes code that the compiler refuses."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.resources import LISTED, cuobjdump, readable, triton_stems  # noqa: E402

SHARED_LIMIT = 163 * 1024  # bytes a CTA may have on sm_80, the smaller of the two
REGISTERS = 65536  # of an SM


def in_a_compiling_process(code: str, *arguments: str) -> str:
    """What a fresh process prints: in this one Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    "arch, at_most", [pytest.param(80, None, marks=pytest.mark.slow), pytest.param(90, None, marks=pytest.mark.slow), (90, 12)]
)
@pytest.mark.parametrize("stem", triton_stems())
def test_triton_kernels_compile_for_sm_80_and_sm_90(stem, arch, at_most):
    """All variants take minutes."""
    code = (
        "import json, sys; from bench.resources import triton_usages; arch, at_most = json.loads(sys.argv[2]);"
        "print(json.dumps([vars(usage) for usage in triton_usages(sys.argv[1], (arch,), at_most)]))"
    )
    usages = json.loads(in_a_compiling_process(code, stem, json.dumps([arch, at_most])))
    assert at_most is None or len(usages) <= at_most
    assert {usage["arch"] for usage in usages} == {arch}
    for usage in usages:
        assert usage["shared_bytes"] <= SHARED_LIMIT, usage
        if cuobjdump() is not None:
            assert usage["registers"] * usage["threads"] <= REGISTERS, usage
            assert usage["spill_bytes"] <= 256, usage


def test_triton_variants_name_every_kernel_that_is_launched():
    """A kernel that is launched with [grid] and missing from variants() would never be compiled here."""
    code = (
        "import json, sys; from importlib import import_module;"
        "print(json.dumps({s: [v[0].__name__ for v in import_module('fastalign.kernels.' + s).variants()] for s in sys.argv[1:]}))"
    )
    assert triton_stems()
    for stem, listed in json.loads(in_a_compiling_process(code, *triton_stems())).items():
        calls = [node.func for node in ast.walk(ast.parse((ROOT / f"kernels/{stem}.py").read_text())) if isinstance(node, ast.Call)]
        launched = {call.value.id for call in calls if isinstance(call, ast.Subscript) and isinstance(call.value, ast.Name)}
        assert not launched - set(listed), stem


@pytest.mark.parametrize("what, wide", [("logp_kernel", True), ("grad_kernel", True), ("logp_kernel", False)])
def test_triton_logits_are_read_16_bytes_at_a_time_where_rows_are_aligned(what, wide):
    code = (
        "import importlib, re, sys; from bench.resources import compile_variant;"
        "found = [v for v in importlib.import_module('fastalign.kernels.linear_logp').variants()"
        " if v[0].__name__ == sys.argv[1] and v[2]['ALIGNED'] == (sys.argv[2] == 'True')];"
        "print([len(re.findall(r'ld\\.global\\S*\\.v4', compile_variant(*v, 90).asm['ptx'])) for v in found])"
    )
    counts = json.loads(in_a_compiling_process(code, what, str(wide)))
    assert counts
    assert all((count > 0) == wide for count in counts)


def test_resources_reads_a_listing():
    listing = (
        " Function _ZN2fa1kILb1EfEEvf:\n  REG:40 STACK:8 SHARED:1408 LOCAL:0 CONSTANT[0]:416 TEXTURE:0\n"
        " Function plain:\n  REG:9 STACK:0 SHARED:0 LOCAL:0"
    )
    found = [(m["name"], m["reg"], m["stack"], m["shared"]) for m in LISTED.finditer(listing)]
    assert found == [("_ZN2fa1kILb1EfEEvf", "40", "8", "1408"), ("plain", "9", "0", "0")]
    assert readable("plain") == ("plain", "")
