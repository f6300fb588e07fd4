"""The optimizer step against torch.optim.AdamW, and the fp32 master as a bf16 weight and a 16-bit tail."""

from __future__ import annotations

import pytest
import torch

from fastalign.ops.adamw import adamw_step_, join_master, split_master

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
    with pytest.raises(TypeError, match="float32"):
        split_master(weight.double())
    with pytest.raises(ValueError, match="tails of shape"):
        join_master(weight.bfloat16(), torch.zeros(3, dtype=torch.int16))
