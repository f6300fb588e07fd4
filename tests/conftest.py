"""Shared fixtures: fresh seeds, backends that a test may force, and a skip for what needs a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from fastalign.ops.backend import load_native, use_backend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip where there is no CUDA device."""
    if torch.cuda.is_available():
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


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on each CPU backend that this installation has."""
    if request.param == "native" and load_native()[0] is None:
        pytest.skip("the native module is not built")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["baseline", "avx2", "avx512"])
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
