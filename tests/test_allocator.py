"""Memory that a step frees serves the next one without page faults, where malloc can be told so and the user has not."""

import os
import subprocess
import sys

import pytest

FREED_AND_TAKEN = """
import resource
from fastalign.training.allocator import keep_freed_memory
told = keep_freed_memory()
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
for round in range(30):
    if round == 20:  # blocks are aligned: a few are taken before they fit each other's places
        before = faults()
    torch.zeros(20_000_000)
print(told, faults() - before)
"""


def run(**environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", FREED_AND_TAKEN], env=clean | environment, capture_output=True, text=True, check=True)
    told, faults = done.stdout.split()
    return told == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone has mallopt")
def test_freed_memory_is_used_again_without_faults():
    told, faults = run()
    if not told:
        pytest.skip("this C library's malloc cannot be told")
    assert faults < 20_000  # ten tensors of 80 MB, 19,500 pages each


def test_what_the_user_says_stands():
    told, faults = run(GLIBC_TUNABLES="glibc.malloc.mmap_max=65536")
    assert not told
    assert faults > 100_000  # the test above would see what is not kept
