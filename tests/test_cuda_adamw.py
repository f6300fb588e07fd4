"""AdamW's CUDA kernel without a GPU, over the host twin of its block primitives (fixture `cuda_twin`): the bits of the CPU kernel."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.ops.adamw import split_master
from fastalign.ops.backend import load_native

OPTIONS = [1 - 3e-4, 1 - 0.9, 0.95, 1 - 0.95, 3e-3 / 0.1 * math.sqrt(0.05), 1e-8 * math.sqrt(0.05), 1.0]


def padded(tensor, offset):
    """The tensor inside a poisoned buffer, `offset` elements after its start."""
    poison = math.nan if tensor.is_floating_point() else -1
    buffer = torch.full((offset + tensor.numel() + 8,), poison, dtype=tensor.dtype)
    view = buffer[offset : offset + tensor.numel()]
    view.copy_(tensor)
    return view, buffer


@pytest.mark.parametrize("size, offset", [(1, 0), (7, 0), (2048, 0), (3 * 2048 + 17, 0), (4100, 1), (4100, 3), (0, 0)])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_cuda_adamw_gives_the_bits_of_the_cpu_on_the_host_twin(cuda_twin, size, offset, grad_dtype, split, scaled):
    module, _ = load_native()
    if module is None:
        pytest.skip("the native module is not built")
    master, scale = torch.randn(size), torch.rand(1) if scaled else torch.empty(0)
    weight, tail = split_master(master) if split else (master, None)
    ours, buffers = {}, {}
    tensors = {"weight": weight, "exp_avg": torch.randn(size) * 0.1, "exp_avg_sq": torch.rand(size) * 0.01}
    if tail is not None:
        tensors["tail"] = tail
    for name, tensor in tensors.items():
        ours[name], buffers[name] = padded(tensor, offset)
    want = {name: tensor.clone() for name, tensor in tensors.items()}
    for _ in range(2):
        grad, _ = padded(torch.randn(size).to(grad_dtype), offset)
        low = want.get("tail", want["weight"])
        module.adamw_step(want["weight"], low, grad.clone(), want["exp_avg"], want["exp_avg_sq"], scale, OPTIONS)
        cuda_twin.adamw_step_cuda(
            ours["weight"], ours.get("tail", ours["weight"]), grad, ours["exp_avg"], ours["exp_avg_sq"], scale, OPTIONS, 0
        )
    for name, tensor in ours.items():
        assert torch.equal(tensor, want[name]), name
        poison = torch.cat((buffers[name][:offset], buffers[name][offset + size :]))
        assert poison.isnan().all() if poison.is_floating_point() else (poison == -1).all()


def test_cuda_adamw_keeps_nan_and_infinity_apart_on_the_host_twin(cuda_twin):
    """A NaN gradient spoils its own element alone, and stays a NaN in the bf16 weight."""
    size = 2048
    weight, tail = split_master(torch.randn(size))
    grad, exp_avg, exp_avg_sq = torch.randn(size), torch.zeros(size), torch.zeros(size)
    grad[5], grad[77] = math.nan, math.inf
    cuda_twin.adamw_step_cuda(weight, tail, grad, exp_avg, exp_avg_sq, torch.empty(0), OPTIONS, 0)
    assert weight.isnan().nonzero().flatten().tolist() == [5, 77]
    assert exp_avg_sq.isfinite().sum() == size - 2
