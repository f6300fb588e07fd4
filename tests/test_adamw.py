"""The optimizer step against torch.optim.AdamW, and the fp32 master as a bf16 weight and a 16-bit tail."""

from __future__ import annotations

import pytest
import torch

from fastalign.ops.adamw import adamw_step_, join_master, split_master
from fastalign.ops.backend import load_native, use_backend

OPTIONS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def torch_adamw(weight, grads, dtype=torch.float64, **options):
    param = torch.nn.Parameter(weight.to(dtype, copy=True))
    betas = options.pop("beta1"), options.pop("beta2")
    optimizer = torch.optim.AdamW([param], betas=betas, foreach=False, **options)
    for grad in grads:
        param.grad = grad.to(dtype)
        optimizer.step()
    return param.detach()


def moments_of(weight):
    return torch.zeros(weight.shape), torch.zeros(weight.shape)


@pytest.mark.parametrize("shape", [(1,), (33, 7), (16384 * 2 + 5,), ()])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_adamw_fp32_matches_torch(backend, shape, grad_dtype):
    weight = torch.randn(shape)
    grads = [torch.randn(shape).to(grad_dtype) for _ in range(5)]
    oracle = torch_adamw(weight, grads, **OPTIONS)
    torch_error = (torch_adamw(weight, grads, torch.float32, **OPTIONS).double() - oracle).abs().max()
    ours, (exp_avg, exp_avg_sq) = weight.clone(), moments_of(weight)
    for step, grad in enumerate(grads, 1):
        assert adamw_step_(ours, grad, exp_avg, exp_avg_sq, step=step, **OPTIONS) is ours
    assert (ours.double() - oracle).abs().max() <= torch_error + 5e-7


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_adamw_bf16_with_tail_is_the_fp32_step(backend, grad_dtype):
    master = torch.randn(1003)
    grads = [torch.randn(1003).to(grad_dtype) for _ in range(10)]
    weight, tail = split_master(master)
    (exp_avg, exp_avg_sq), (exp_avg32, exp_avg_sq32) = moments_of(master), moments_of(master)
    for step, grad in enumerate(grads, 1):
        adamw_step_(weight, grad, exp_avg, exp_avg_sq, step=step, tail=tail, **OPTIONS)
        adamw_step_(master, grad, exp_avg32, exp_avg_sq32, step=step, **OPTIONS)
    assert torch.equal(join_master(weight, tail), master)
    assert torch.equal(exp_avg, exp_avg32)
    assert torch.equal(exp_avg_sq, exp_avg_sq32)
    assert (weight.double() - master.double()).abs().max() <= (master.bfloat16().double() - master.double()).abs().max()


def test_adamw_bf16_keeps_steps_that_bf16_alone_would_lose(backend):
    weight, tail = torch.ones(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int16)
    exp_avg, exp_avg_sq = moments_of(weight)
    options = {"lr": 1e-6, "weight_decay": 0.0}
    for step in range(1, 101):
        adamw_step_(weight, torch.ones(64), exp_avg, exp_avg_sq, step=step, tail=tail, **options)
    moved = 1.0 - join_master(weight, tail)
    torch.testing.assert_close(moved, torch.full((64,), 1e-4), rtol=0.1, atol=0.0)


def test_adamw_grad_scale_scales_the_gradient(backend):
    weight, grad = torch.randn(100), torch.randn(100)
    scaled, plain = weight.clone(), weight.clone()
    adamw_step_(scaled, grad, *moments_of(weight), step=1, grad_scale=0.25, **OPTIONS)
    adamw_step_(plain, grad * 0.25, *moments_of(weight), step=1, **OPTIONS)
    assert torch.equal(scaled, plain)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_adamw_grad_scale_may_be_a_tensor(backend, shape):
    weight, grad = torch.randn(100), torch.randn(100)
    scaled, plain, factor = weight.clone(), weight.clone(), torch.rand(shape)
    adamw_step_(scaled, grad, *moments_of(weight), step=1, grad_scale=factor, **OPTIONS)
    adamw_step_(plain, grad, *moments_of(weight), step=1, grad_scale=float(factor), **OPTIONS)
    assert torch.equal(scaled, plain)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_adamw_gives_the_same_bits_on_every_instruction_set(isa, grad_dtype):
    master, grads = torch.randn(1003), [torch.randn(1003).to(grad_dtype) for _ in range(3)]
    results = []
    for chosen in (isa, "baseline"):
        load_native()[0].set_isa(chosen)
        (weight, tail), (exp_avg, exp_avg_sq) = split_master(master), moments_of(master)
        for step, grad in enumerate(grads, 1):
            adamw_step_(weight, grad, exp_avg, exp_avg_sq, step=step, grad_scale=0.7, tail=tail, **OPTIONS)
        results.append((join_master(weight, tail), exp_avg, exp_avg_sq))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_adamw_matches_between_instruction_sets(isa):
    weight, grads = torch.randn(999), [torch.randn(999) for _ in range(3)]
    oracle = torch_adamw(weight, grads, **OPTIONS)
    (exp_avg, exp_avg_sq) = moments_of(weight)
    for step, grad in enumerate(grads, 1):
        adamw_step_(weight, grad, exp_avg, exp_avg_sq, step=step, **OPTIONS)
    torch.testing.assert_close(weight.double(), oracle, rtol=1e-6, atol=1e-6)


def test_split_master_is_exact_for_every_exponent():
    bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
    edges = torch.tensor([0, -(2**31), 0x7F800000, 0x7F7FFFFF, 1, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], dtype=torch.int32)
    master = torch.cat((bits, edges, edges ^ -(2**31))).view(torch.float32)
    master = master[~master.isnan()]
    weight, tail = split_master(master)
    assert torch.equal(join_master(weight, tail).view(torch.int32), master.view(torch.int32))
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tie], master[~tie].bfloat16())


def test_split_master_keeps_nan():
    weight, tail = split_master(torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32))
    assert weight.isnan().all()
    assert join_master(weight, tail).isnan().all()


def test_adamw_native_splits_like_the_reference():
    weight, tail = split_master(torch.randn(1000))
    before = weight.clone(), tail.clone()
    adamw_step_(weight, torch.zeros(1000), *moments_of(weight), step=1, lr=0.0, tail=tail)
    assert torch.equal(weight, before[0])
    assert torch.equal(tail, before[1])


def test_adamw_says_what_is_wrong(backend):
    weight, moments = torch.zeros(4), moments_of(torch.zeros(4))
    with pytest.raises(ValueError, match="needs its int16 tail"):
        adamw_step_(weight.bfloat16(), weight, *moments, step=1, lr=0.1)
    with pytest.raises(ValueError, match="belongs to a bfloat16"):
        adamw_step_(weight, weight, *moments, step=1, lr=0.1, tail=weight.short())
    with pytest.raises(ValueError, match="grad: expected"):
        adamw_step_(weight, torch.zeros(5), *moments, step=1, lr=0.1)
    with pytest.raises(ValueError, match="step counts from 1"):
        adamw_step_(weight, weight, *moments, step=0, lr=0.1)
    with pytest.raises(ValueError, match="contiguous"):
        adamw_step_(weight, torch.zeros(8)[::2], *moments, step=1, lr=0.1)
    with pytest.raises(ValueError, match="grad_scale: expected a number or one float32"):
        adamw_step_(weight, weight, *moments, step=1, lr=0.1, grad_scale=torch.ones(2))
    with pytest.raises(ValueError, match="grad_scale: expected a number or one float32"):
        adamw_step_(weight, weight, *moments, step=1, lr=0.1, grad_scale=torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match="grad: expected a tensor on cpu, where param is, got one on meta"):
        adamw_step_(weight, torch.zeros(4, device="meta"), *moments, step=1, lr=0.1)
    with pytest.raises(TypeError, match="float32"):
        split_master(weight.double())
    with pytest.raises(ValueError, match="tails of shape"):
        join_master(weight.bfloat16(), torch.zeros(3, dtype=torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 7, 2048, 100_003])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [False, True])
def test_adamw_on_cuda_gives_the_bits_of_the_cpu(size, grad_dtype, split):
    module, _ = load_native()
    if module is None or "adamw" not in module.cuda_ops:
        pytest.skip("built without CUDA kernels")
    master, factor = torch.randn(size), torch.tensor(0.3)
    grads = [torch.randn(size).to(grad_dtype) for _ in range(3)]
    results = []
    for device in ("cpu", "cuda"):
        weight, tail = split_master(master) if split else (master.clone(), None)
        weight, tail = weight.to(device), None if tail is None else tail.to(device)
        exp_avg, exp_avg_sq = (moment.to(device) for moment in moments_of(master))
        with use_backend("native"):
            for step, grad in enumerate(grads, 1):
                arguments = (weight, grad.to(device), exp_avg, exp_avg_sq)
                adamw_step_(*arguments, step=step, grad_scale=factor.to(device), tail=tail, **OPTIONS)
        results.append([tensor.cpu() for tensor in (weight, exp_avg, exp_avg_sq, *([] if tail is None else [tail]))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_adamw_on_cuda_takes_views_off_their_alignment_and_names_a_wrong_device():
    weight, grad = torch.randn(5001, device="cuda")[1:], torch.randn(5001, device="cuda")[1:]
    ours, (exp_avg, exp_avg_sq) = weight.clone(), (torch.zeros_like(weight), torch.zeros_like(weight))
    adamw_step_(ours, grad, exp_avg, exp_avg_sq, step=1, **OPTIONS)
    expected = weight.cpu()
    adamw_step_(expected, grad.cpu(), *moments_of(expected), step=1, **OPTIONS)
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="grad: expected a tensor on cuda:0, where param is, got one on cpu"):
        adamw_step_(ours, grad.cpu(), exp_avg, exp_avg_sq, step=2, **OPTIONS)


def test_adamw_step_outdates_what_a_backward_saved(backend):
    weight = torch.ones(3, requires_grad=True)
    loss = weight.square().sum()
    adamw_step_(weight, torch.ones(3), *moments_of(weight.detach()), step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        frozen = torch.ones(3)
        adamw_step_(frozen, torch.ones(3), *moments_of(frozen), step=1, lr=0.1)
