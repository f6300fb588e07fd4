"""The Triton sampler, interpreted on CPU tensors: the sampler's own tests, and the tokens of the reference on random rows."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

import test_sampler
from test_sampler import (  # noqa: F401  (collected here a second time, over the fixture below)
    test_sample_greedy_takes_the_first_of_equals,
    test_sample_kept_mass_is_one_when_nothing_is_cut,
    test_sample_marks_rows_that_are_not_finite,
    test_sample_names_a_column_of_the_wrong_size,
    test_sample_never_draws_minus_infinity,
)

from fastalign.ops.backend import backend_for, use_backend
from fastalign.ops.sampling import sample, uniform

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, params=["triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything in this file runs on the Triton kernels."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles here: the tests marked gpu run its kernels")
    with use_backend(request.param):
        assert backend_for("sample", "cuda" if on_gpu else "cpu") == "triton"
        yield request.param


def columns(n, generator):
    """Temperature, top-k, top-p and min-p, each off in some of the rows."""
    return [
        torch.rand(n, generator=generator) * 1.5 * (torch.rand(n, generator=generator) > 0.2),
        torch.randint(0, 60, (n,), generator=generator) * (torch.rand(n, generator=generator) > 0.3),
        1 - torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) > 0.3),
        torch.rand(n, generator=generator) * 0.2 * (torch.rand(n, generator=generator) > 0.5),
    ]


@pytest.mark.parametrize(
    "vocab, softcap, dtype",
    [(1, None, torch.float32), (7, 6.0, torch.bfloat16), (4097, 20.0, torch.float32), (8205, None, torch.bfloat16)],
)
def test_triton_sample_draws_the_tokens_of_the_reference(vocab, softcap, dtype):
    generator = torch.Generator().manual_seed(vocab)
    n = 6
    buffer = torch.full((n, vocab + 3), float("nan"), dtype=dtype)
    logits = buffer[:, 2 : 2 + vocab]
    logits.copy_(torch.randn(n, vocab, generator=generator) * torch.rand(n, 1, generator=generator) * 8)
    logits[::3, : vocab // 2] = -torch.inf
    options = columns(n, generator)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    tokens, kept = sample(logits, u, *options, logit_softcap=softcap)
    with use_backend("reference"):
        wanted, mass = sample(logits, u, *options, logit_softcap=softcap)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(kept, mass, rtol=1e-5, atol=0)


@pytest.mark.parametrize("vocab, dtype", [(4500, torch.float32), (50, torch.bfloat16)])
def test_triton_sample_keeps_ties_like_the_reference(vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-3, 4, (6, vocab), generator=generator).to(dtype) * 0.5
    logits = torch.where(torch.rand(6, vocab, generator=generator) < 0.5, -logits, logits)  # zeros of both signs
    options = [torch.full((6,), 0.9), torch.arange(1, 40, 7), torch.linspace(0.05, 1, 6), torch.zeros(6)]
    u = torch.rand(6, generator=generator, dtype=torch.float64)
    tokens, kept = sample(logits, u, *options)
    with use_backend("reference"):
        wanted, mass = sample(logits, u, *options)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(kept, mass, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", [pytest.param({}, marks=pytest.mark.slow), {"temperature": 0.8, "min_p": 0.1}], ids=str)
def test_triton_sample_chi_square(case):
    """Draws with counter-based uniforms from one distribution."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(2))
    n = 150
    zeros = torch.zeros(n, dtype=torch.int64)
    u = uniform(zeros + 7, zeros + 3, torch.arange(n) % 8, torch.arange(n) // 8)
    tokens, _ = test_sampler.draw(logits.expand(n, -1), u, **case)
    expected = test_sampler.kept_probabilities(logits, **case)[0] * n
    seen = torch.bincount(tokens, minlength=12).double()
    assert bool((seen[expected == 0] == 0).all())
    live = expected > 0
    chi2 = float(((seen - expected)[live] ** 2 / expected[live]).sum())
    freedom = int(live.sum()) - 1
    assert chi2 < freedom + 4.5 * (2 * freedom) ** 0.5 + 8


@pytest.mark.parametrize(
    "case", [pytest.param({"top_k": 5}, marks=pytest.mark.slow), {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02}], ids=str
)
def test_triton_sample_follows_the_truncated_distribution(case):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(700, generator=generator) * 2
    wanted, mass = test_sampler.kept_probabilities(logits, **case)
    n = 20
    stratified = (torch.arange(n) + torch.rand(n, generator=generator)) / n  # an exact inverse CDF gives counts within 1 of n p
    tokens, kept = test_sampler.draw(logits.expand(n, -1), stratified.double(), **case)
    torch.testing.assert_close(kept.double(), torch.full((n,), mass, dtype=torch.float64), rtol=1e-5, atol=0)
    counts = torch.bincount(tokens, minlength=700)
    assert bool((counts[wanted == 0] == 0).all())
    assert float((counts - wanted * n).abs().max()) < 3


def test_triton_sample_rows_do_not_depend_on_each_other():
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(4, 5000, generator=generator)
    u, options = torch.rand(4, dtype=torch.float64, generator=generator), columns(4, generator)
    tokens, kept = sample(logits, u, *options)
    for i in range(4):
        one = slice(i, i + 1)
        alone = sample(logits[one], u[one], *(c[one] for c in options))
        assert torch.equal(alone[0], tokens[one])
        assert torch.equal(alone[1], kept[one])


def test_triton_sample_extreme_uniforms_stay_in_the_vocabulary():
    test_sampler.test_sample_extreme_uniforms_stay_in_the_vocabulary("triton")
    tokens, _ = test_sampler.draw(torch.zeros(1, 4097), torch.tensor([1 - 2.0**-53], dtype=torch.float64))
    assert tokens.tolist() == [4096]


def test_triton_uniform_is_the_reference():
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randint(-(2**63), 2**63 - 1, (300,), generator=generator) for _ in range(2)]
    keys += [torch.randint(0, 2**31, (300,), generator=generator) for _ in range(2)]
    ours = uniform(*keys)
    with use_backend("reference"):
        assert torch.equal(ours, uniform(*keys))


def test_triton_sample_of_no_rows_is_empty():
    tokens, kept = test_sampler.draw(torch.zeros(0, 9), torch.zeros(0, dtype=torch.float64))
    assert len(tokens) == len(kept) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 4097, 50257, 151936])
def test_triton_sample_on_a_gpu_draws_the_tokens_of_the_reference(vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    n = 64
    logits = (torch.randn(n, vocab, generator=generator) * torch.rand(n, 1, generator=generator) * 8).to("cuda", dtype)
    options = [column.cuda() for column in columns(n, generator)]
    u = torch.rand(n, generator=generator, dtype=torch.float64).cuda()
    tokens, kept = sample(logits, u, *options)
    with use_backend("reference"):
        wanted, mass = sample(logits, u, *options)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(kept, mass, rtol=1e-5, atol=0)
