"""The scans' CUDA kernels without a GPU, over the host twin of their block primitives (fixture `cuda_twin`)."""

from __future__ import annotations

import math

import pytest
import torch
from stand_in_cuda import stand_in_cuda
from test_scan import LENGTHS, loop_gae, offsets_of

NONE = torch.empty(0)
TILE = 1024  # tokens of a CTA


def poisoned(like):
    return torch.full_like(like, math.nan)


def twin_gae(twin, rewards, values, cu, gamma, lam, mask=None, bootstrap=None):
    per_sequence = isinstance(lam, torch.Tensor)
    lams = lam.double() if per_sequence else NONE
    advantages, returns = poisoned(rewards), poisoned(rewards)
    ends = (NONE if mask is None else mask, NONE if bootstrap is None else bootstrap, lams, math.nan if per_sequence else lam, gamma)
    twin.gae_cuda(rewards, values, cu, *ends, advantages, returns, workspace_of(twin, rewards), 0)
    return advantages, returns


def twin_discounted(twin, rewards, cu, gamma):
    returns = poisoned(rewards)
    twin.discounted_returns_cuda(rewards, cu, gamma, returns, workspace_of(twin, rewards), 0)
    return returns


def workspace_of(twin, rewards):
    return torch.full((twin.scan_workspace(len(rewards)),), math.nan, dtype=torch.float64)


def assert_near(got, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 4e-7
    for ours, oracle in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), oracle, rtol=tolerance, atol=tolerance)


def check(twin, lengths, dtype, holes, offset=0):
    """A random case, with every array `offset` elements off its alignment."""
    cu, total, num = offsets_of(lengths), sum(lengths), len(lengths)
    rewards, values = (torch.randn(total + offset, dtype=dtype)[offset:] for _ in range(2))
    lams, bootstrap = torch.rand(num), torch.randn(num, dtype=dtype)
    mask = (torch.rand(total + offset) > torch.rand(()))[offset:] if holes else torch.ones(total, dtype=torch.bool)
    values = torch.where(mask | (torch.rand(total) > 0.2), values, math.nan)  # nobody reads a hole's value but its own return
    rewards = torch.where(mask, rewards, math.nan)
    expected = loop_gae(rewards, values, cu, 0.97, lams, mask, bootstrap)
    got = twin_gae(twin, rewards, values, cu, 0.97, lams, mask if holes else None, bootstrap)
    tolerance = 1e-12 if dtype == torch.float64 else 4e-7
    for ours, oracle in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), oracle, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("lengths", [*LENGTHS, [TILE], [TILE + 1], [1] * 1500, [3 * TILE + 77], [700, 0, 2 * TILE, 1, 0, 500, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("holes", [False, True])
def test_cuda_gae_matches_the_fp64_loop(cuda_twin, lengths, dtype, holes):
    check(cuda_twin, lengths, dtype, holes)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_cuda_gae_accepts_arrays_off_their_alignment(cuda_twin, offset):
    check(cuda_twin, [TILE + 5, 1, 300], torch.float32, True, offset)
    check(cuda_twin, [TILE + 5, 1, 300], torch.float64, False, offset)


@pytest.mark.parametrize("case", range(30))
def test_cuda_gae_matches_the_fp64_loop_on_random_packs(cuda_twin, case):
    torch.manual_seed(case)
    longest = int(torch.randint(1, [4, 60, 1500][case % 3], ()))
    lengths = torch.randint(0, longest + 1, (int(torch.randint(1, 8 * TILE // (longest + 8) + 2, ())),)).tolist()
    check(cuda_twin, lengths, [torch.float32, torch.float64][case % 2], case % 5 != 0)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (0.0, 0.5), (0.9, 0.0)])
def test_cuda_gae_does_not_lose_holes_at_the_edges_of_gamma_and_lambda(cuda_twin, gamma, lam):
    total = 2 * TILE + 100
    rewards, values, mask = torch.randn(total), torch.randn(total), torch.rand(total) > 0.5
    mask[TILE - 40 : 2 * TILE + 40] = False  # a whole tile of holes: it hands on what it gets
    cu = torch.tensor([0, total], dtype=torch.int32)
    got = twin_gae(cuda_twin, rewards, values, cu, gamma, lam, mask)
    assert_near(got, loop_gae(rewards, values, cu, gamma, [lam], mask, [0.0]), torch.float32)


def test_cuda_gae_is_exact_over_one_sequence_of_131072_tokens(cuda_twin):
    total = 131_072
    rewards, values, mask = torch.randn(total), torch.randn(total), torch.rand(total) > 0.3
    cu = torch.tensor([0, total], dtype=torch.int32)
    expected, _ = loop_gae(rewards, values, cu, 1.0, [1.0], mask, [0.5])
    got, _ = twin_gae(cuda_twin, rewards, values, cu, 1.0, 1.0, mask, torch.tensor([0.5]))
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_cuda_gae_looks_past_256_tiles_of_one_sequence(cuda_twin):
    """An impulse at the end of 264 tiles of holes reaches the first token: the windows over tiles are joined in order."""
    total = 264 * TILE
    rewards, values, mask = torch.zeros(total), torch.zeros(total), torch.zeros(total, dtype=torch.bool)
    values[0], rewards[-1], mask[0], mask[-1] = 0.25, 8.0, True, True
    mask[258 * TILE], rewards[258 * TILE] = True, 1.0
    cu = torch.tensor([0, total], dtype=torch.int32)
    advantages, returns = twin_gae(cuda_twin, rewards, values, cu, 0.5, 0.5, mask)
    assert advantages[0] == -0.25 + 0.25 * (1.0 + 0.25 * 8.0)
    assert advantages[1] == 3.0
    assert returns[0] == advantages[0] + 0.25


def test_cuda_gae_keeps_nan_inside_its_sequence(cuda_twin):
    cu = offsets_of([40, 1000, 900, 60])
    rewards, values = torch.randn(2000), torch.randn(2000)
    clean, _ = twin_gae(cuda_twin, rewards, values, cu, 0.9, 0.9)
    rewards[500], values[1900] = math.nan, math.inf
    advantages, _ = twin_gae(cuda_twin, rewards, values, cu, 0.9, 0.9)
    assert advantages[40:501].isnan().all()
    for alone in (slice(0, 40), slice(501, 1040), slice(1940, 2000)):
        assert torch.equal(advantages[alone], clean[alone])
    assert advantages[1901:1940].isfinite().all()


@pytest.mark.parametrize("cu", [[0, 300], [50, 400], [0, 300, 200, 400], [0], [0, 500, 600]])
def test_cuda_gae_gives_nan_to_tokens_that_no_sequence_holds(cuda_twin, cu):
    """Offsets on a device are not checked, so wrong ones must at least be seen."""
    rewards, values, mask = torch.randn(400), torch.randn(400), torch.rand(400) > 0.5
    with stand_in_cuda():
        offsets = torch.tensor(cu, dtype=torch.int32, device="cuda")
        advantages, returns = twin_gae(cuda_twin, rewards, values, offsets, 0.9, 0.9, mask)
    held = [any(cu[s] <= t < cu[s + 1] for s in range(len(cu) - 1)) for t in range(400)]
    outside = ~torch.tensor(held)
    assert advantages[outside].isnan().all()
    assert returns[outside].isnan().all()
    assert advantages[~outside].isfinite().all()


@pytest.mark.parametrize("lengths", [*LENGTHS, [5000, 0, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_discounted_returns_match_the_fp64_loop(cuda_twin, lengths, dtype):
    cu, rewards = offsets_of(lengths), torch.randn(sum(lengths), dtype=dtype)
    zeros, num = torch.zeros_like(rewards), len(lengths)
    expected, _ = loop_gae(rewards, zeros, cu, 0.9, [1.0] * num, [True] * len(rewards), [0.0] * num)
    assert_near([twin_discounted(cuda_twin, rewards, cu, 0.9)], [expected], dtype)


def test_cuda_scan_accepts_no_tokens(cuda_twin):
    empty, cu = torch.empty(0), torch.tensor([0, 0], dtype=torch.int32)
    assert twin_gae(cuda_twin, empty, empty, cu, 1.0, 1.0)[0].shape == twin_discounted(cuda_twin, empty, cu, 1.0).shape == (0,)


def test_cuda_gae_gives_the_same_bits_twice(cuda_twin):
    """The twin runs threads in another random order each time."""
    rewards, values, mask, cu = torch.randn(5000), torch.randn(5000), torch.rand(5000) > 0.3, offsets_of([4990, 10])
    first = twin_gae(cuda_twin, rewards, values, cu, 0.99, 0.95, mask)
    for ours, again in zip(first, twin_gae(cuda_twin, rewards, values, cu, 0.99, 0.95, mask), strict=True):
        assert torch.equal(ours, again)
