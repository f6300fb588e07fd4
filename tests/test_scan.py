"""GAE and discounted returns against a loop in fp64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastalign.ops.backend import load_native, use_backend
from fastalign.ops.scan import discounted_returns, gae


def loop_gae(rewards, values, cu, gamma, lams, mask, bootstrap):
    rewards, values = rewards.double().tolist(), values.double().tolist()
    advantages, offsets = [0.0] * len(rewards), cu.tolist()
    for s, (start, end) in enumerate(pairwise(offsets)):
        advantage, next_value = 0.0, float(bootstrap[s])
        for t in range(end - 1, start - 1, -1):
            if mask[t]:
                delta = rewards[t] + gamma * next_value - values[t]
                advantage = delta + gamma * float(lams[s]) * advantage
                next_value = values[t]
            advantages[t] = advantage
    advantages = torch.tensor(advantages, dtype=torch.float64)
    return advantages, advantages + torch.tensor(values, dtype=torch.float64)


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


LENGTHS = [[1], [7], [0, 5, 0, 1, 1, 12, 0], [1, 1, 1], [257, 3, 64]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("holes", [False, True])
def test_gae_matches_the_fp64_loop(backend, lengths, dtype, holes):
    cu, total, num = offsets_of(lengths), sum(lengths), len(lengths)
    rewards, values = torch.randn(total, dtype=dtype), torch.randn(total, dtype=dtype)
    lams, bootstrap = torch.rand(num), torch.randn(num, dtype=dtype)
    mask = torch.rand(total) > 0.4 if holes else torch.ones(total, dtype=torch.bool)
    expected = loop_gae(rewards, values, cu, 0.97, lams, mask, bootstrap)
    got = gae(rewards, values, cu, gamma=0.97, lam=lams, mask=mask if holes else None, bootstrap=bootstrap)
    tolerance = 1e-12 if dtype == torch.float64 else 4e-7
    for ours, oracle in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), oracle, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (0.0, 0.5)])
def test_gae_is_exact_over_a_long_sequence(backend, gamma, lam):
    total = 131_072
    rewards, values = torch.randn(total), torch.randn(total)
    mask = torch.rand(total) > 0.3
    cu = torch.tensor([0, total], dtype=torch.int32)
    expected, _ = loop_gae(rewards, values, cu, gamma, [lam], mask, [0.0])
    got, _ = gae(rewards, values, cu, gamma=gamma, lam=lam, mask=mask)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_gae_carries_the_bootstrap_through_trailing_holes(backend):
    rewards, values = torch.tensor([1.0, 50.0, 50.0]), torch.tensor([0.5, float("nan"), float("nan")])
    mask, cu = torch.tensor([True, False, False]), offsets_of([3])
    advantages, returns = gae(rewards, values, cu, gamma=0.5, lam=0.9, mask=mask, bootstrap=torch.tensor([4.0]))
    assert advantages.tolist() == [2.5, 0.0, 0.0]
    assert returns[0] == 3.0


def test_gae_stops_gradients_and_accepts_strided_inputs(backend):
    rewards = torch.randn(10, 2)[:, 0]
    values = torch.randn(10, 2, requires_grad=True)[:, 1]
    advantages, _ = gae(rewards, values, offsets_of([4, 6]))
    assert not advantages.requires_grad
    expected, _ = loop_gae(rewards, values.detach(), offsets_of([4, 6]), 1.0, [0.95] * 2, [True] * 10, [0.0] * 2)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_discounted_returns_match_the_fp64_loop(backend, lengths):
    cu, rewards = offsets_of(lengths), torch.randn(sum(lengths))
    zeros = torch.zeros_like(rewards)
    expected, _ = loop_gae(rewards, zeros, cu, 0.9, [1.0] * len(lengths), [True] * len(rewards), [0.0] * len(lengths))
    torch.testing.assert_close(discounted_returns(rewards, cu, gamma=0.9).double(), expected, rtol=4e-7, atol=4e-7)


def test_scan_accepts_no_tokens(backend):
    empty, cu = torch.empty(0), torch.tensor([0, 0], dtype=torch.int32)
    advantages, returns = gae(empty, empty, cu)
    assert advantages.shape == returns.shape == discounted_returns(empty, cu).shape == (0,)


def test_scan_does_not_depend_on_threads(backend):
    lengths = [100, 1, 999, 30]
    rewards, values, cu = torch.randn(sum(lengths)), torch.randn(sum(lengths)), offsets_of(lengths)
    torch.set_num_threads(1)
    alone, _ = gae(rewards, values, cu)
    torch.set_num_threads(2)
    assert torch.equal(alone, gae(rewards, values, cu)[0])


def test_scan_matches_between_instruction_sets(isa):
    rewards, values, cu = torch.randn(500), torch.randn(500), offsets_of([200, 300])
    expected, _ = loop_gae(rewards, values, cu, 0.99, [0.95] * 2, [True] * 500, [0.0] * 2)
    torch.testing.assert_close(gae(rewards, values, cu, gamma=0.99)[0].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cu", [[0, 4], [1, 5], [0, 6, 5], [0, 3, 2, 5]])
def test_scan_rejects_wrong_offsets(backend, cu):
    cu = torch.tensor(cu, dtype=torch.int32)
    with pytest.raises(ValueError, match="rise from 0 to the 5"):
        gae(torch.randn(5), torch.randn(5), cu)
    with pytest.raises(ValueError, match="rise from 0 to the 5"):
        discounted_returns(torch.randn(5), cu)


def test_scan_rejects_wrong_shapes_and_dtypes(backend):
    cu = offsets_of([5])
    for name in ("gamma", "lam"):
        with pytest.raises(ValueError, match=f"gae: {name} must be a finite number, got nan"):
            gae(torch.zeros(5), torch.zeros(5), torch.tensor([0, 5]), **{name: float("nan")})
    with pytest.raises(ValueError, match="gae: values: expected"):
        gae(torch.randn(5), torch.randn(4), cu)
    with pytest.raises(ValueError, match="cu_seqlens: expected integer offsets"):
        gae(torch.randn(5), torch.randn(5), torch.tensor([0.0, 2.7, 5.2]))
    with pytest.raises(ValueError, match="rewards: expected"):
        gae(torch.randn(5).bfloat16(), torch.randn(5).bfloat16(), cu)
    with pytest.raises(ValueError, match="mask"):
        gae(torch.randn(5), torch.randn(5), cu, mask=torch.ones(5))
    with pytest.raises(ValueError, match="bootstrap"):
        gae(torch.randn(5), torch.randn(5), cu, bootstrap=torch.zeros(2))
    with pytest.raises(ValueError, match="lam"):
        gae(torch.randn(5), torch.randn(5), cu, lam=torch.zeros(3))
    with pytest.raises(ValueError, match="values: expected a tensor on cpu, where the rewards are, got one on meta"):
        gae(torch.randn(5), torch.empty(5, device="meta"), cu)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected offsets \[S\+1\], got \[0\]"):
        discounted_returns(torch.randn(5), cu[:0])


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [*LENGTHS, [131_072], [1] * 5000, [3000, 0, 5000, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("holes", [False, True])
def test_cuda_gae_and_returns_match_the_fp64_loop(lengths, dtype, holes):
    module, _ = load_native()
    if module is None or "scan" not in module.cuda_ops:
        pytest.skip("built without CUDA kernels")
    cu, total, num = offsets_of(lengths), sum(lengths), len(lengths)
    rewards, values = torch.randn(total, dtype=dtype), torch.randn(total, dtype=dtype)
    lams, bootstrap = torch.rand(num), torch.randn(num, dtype=dtype)
    mask = torch.rand(total) > 0.4 if holes else torch.ones(total, dtype=torch.bool)
    expected = loop_gae(rewards, values, cu, 0.97, lams, mask, bootstrap)
    summed, _ = loop_gae(rewards, torch.zeros_like(rewards), cu, 0.97, [1.0] * num, [True] * total, [0.0] * num)
    on = [tensor.cuda() for tensor in (rewards, values, lams, mask, bootstrap)]
    tolerance = 1e-12 if dtype == torch.float64 else 4e-7
    with use_backend("native"):
        for offsets in (cu, cu.cuda()):
            got = gae(on[0], on[1], offsets, gamma=0.97, lam=on[2], mask=on[3] if holes else None, bootstrap=on[4])
            for ours, oracle in zip((*got, discounted_returns(on[0], offsets, gamma=0.97)), (*expected, summed), strict=True):
                assert ours.dtype == dtype
                torch.testing.assert_close(ours.double().cpu(), oracle, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_cuda_scan_does_not_wait_for_the_device():
    rewards, values = torch.randn(2, 5000, device="cuda")
    cu = offsets_of([1000, 4000])
    for offsets in (cu, cu.cuda()):
        gae(rewards, values, offsets)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gae(rewards, values, offsets)
            discounted_returns(rewards, offsets)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match="values: expected a tensor on cuda:0, where the rewards are, got one on cpu"):
        gae(rewards, values.cpu(), cu)
    with pytest.raises(ValueError, match="rise from 0 to the 5000"):
        gae(rewards, values, offsets_of([1000]))
