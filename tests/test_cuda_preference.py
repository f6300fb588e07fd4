"""The preference losses' CUDA kernels without a GPU, over the host twin of their block primitives (fixture `cuda_twin`)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fastalign as fa
from fastalign.losses.preference import DIVERGENCES, PREFERENCE
from fastalign.losses.unpaired import UNPAIRED
from fastalign.ops.backend import use_backend

LENGTHS = [1, 129, 300, 0, 128, 127, 0, 0, 31, 33]  # around a warp, a block and a stride of the block; empty completions
CU = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
TOLERANCE = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.float64: {"rtol": 1e-11, "atol": 1e-12}}


def poisoned(*shape, dtype):
    return torch.full(shape, math.nan, dtype=dtype)


def random(dtype):
    num = sum(LENGTHS)
    logp = -torch.rand(num, dtype=dtype)
    return logp.requires_grad_(), logp.detach() + torch.randn(num, dtype=dtype) * 0.05


def spread(cuda_twin, dtype, upstream, slopes, unit, tail):
    gradient = poisoned(sum(LENGTHS), dtype=dtype)
    cuda_twin.preference_spread_cuda(upstream, slopes, CU, unit, tail, gradient, 0)
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in PREFERENCE if not name.startswith("aot")])
@pytest.mark.parametrize("ref_form, tail", [("tokens", 0.25), ("tokens", 1.0), ("sums", 1.0), ("none", 0.25)])
def test_cuda_preference_pairs_match_torch_on_the_host_twin(cuda_twin, name, dtype, ref_form, tail):
    row, num = PREFERENCE[name], len(LENGTHS) // 2
    logp, ref = random(dtype)
    ref = None if ref_form == "none" or not row.reference else ref
    if ref_form == "sums" and ref is not None:
        ref = torch.stack([part.sum() for part in ref.split(LENGTHS)])
    margin = torch.rand(num, dtype=dtype) if row.margin else None
    weight, upstream = torch.rand(num, dtype=dtype), torch.randn(num, 2, dtype=dtype)[:, 0]
    with use_backend("reference"):
        want, want_metrics = fa.preference_loss(logp, CU, loss=name, ref_logp=ref, margin=margin, weight=weight, ld_alpha=tail)
        (want_gradient,) = torch.autograd.grad(want, logp, upstream)
    formula = row.formula(**row.options)
    losses, metrics, slopes = poisoned(num, dtype=dtype), poisoned(6, num, dtype=dtype), poisoned(2 * num, dtype=dtype)
    given = (logp.detach(), ref, ref_form == "tokens", CU, margin, weight, formula.name, formula.pair_numbers, tail)
    cuda_twin.preference_pairs_cuda(*given, losses, metrics, slopes, 0)
    torch.testing.assert_close(losses, want, **TOLERANCE[dtype])
    for got, key in zip(metrics, want_metrics, strict=False):
        torch.testing.assert_close(got, want_metrics[key], **TOLERANCE[dtype])
    torch.testing.assert_close(spread(cuda_twin, dtype, upstream, slopes, 2, tail), want_gradient, **TOLERANCE[dtype])


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "reverse_kl"])
def test_cuda_preference_divergences_match_torch_on_the_host_twin(cuda_twin, divergence):
    dtype, num = torch.float64, len(LENGTHS) // 2
    logp, ref = random(dtype)
    with use_backend("reference"):
        want, _ = fa.preference_loss(logp, CU, ref_logp=ref, divergence=divergence)
    kind = DIVERGENCES[divergence]
    numbers = [0.1, 1.0, 0.0, 0.0, 0.0, float(("identity", "power", "js").index(kind.transform)), kind.power(0.5), 0.0]
    losses, metrics, slopes = poisoned(num, dtype=dtype), poisoned(6, num, dtype=dtype), poisoned(2 * num, dtype=dtype)
    given = (logp.detach(), ref, True, CU, None, None, "logistic", numbers, 1.0)
    cuda_twin.preference_pairs_cuda(*given, losses, metrics, slopes, 0)
    torch.testing.assert_close(losses, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", UNPAIRED)
def test_cuda_preference_singles_match_torch_on_the_host_twin(cuda_twin, name, dtype):
    row, num = UNPAIRED[name], len(LENGTHS)
    logp, ref = random(dtype)
    labels, weight = torch.rand(num) < 0.5, torch.rand(num, dtype=dtype)
    upstream = torch.randn(1, dtype=dtype).expand(num)
    options = {**row.options, "desirable_weight": 1.5, **{key: 0.3 for key in ("z_ref", "shift") if key in row.options}}
    with use_backend("reference"):
        want, want_metrics = fa.unpaired_loss(logp, CU, labels, loss=name, options=options, ref_logp=ref, weight=weight)
        (want_gradient,) = torch.autograd.grad(want, logp, upstream)
    formula = row.formula(**options)
    losses, metrics, slopes = poisoned(num, dtype=dtype), poisoned(2, num, dtype=dtype), poisoned(num, dtype=dtype)
    given = (logp.detach(), ref, True, CU, labels, weight, formula.name, formula.single_numbers)
    cuda_twin.preference_singles_cuda(*given, losses, metrics, slopes, 0)
    torch.testing.assert_close(losses, want, **TOLERANCE[dtype])
    torch.testing.assert_close(metrics, torch.stack([want_metrics["rewards"], want_metrics["logps"]]), **TOLERANCE[dtype])
    torch.testing.assert_close(spread(cuda_twin, dtype, upstream, slopes, 1, 1.0), want_gradient, **TOLERANCE[dtype])


def test_cuda_preference_of_no_pairs_launches_nothing(cuda_twin):
    nothing, cu = torch.empty(0), torch.zeros(1, dtype=torch.int32)
    cuda_twin.preference_pairs_cuda(
        nothing, None, False, cu, None, None, "logistic", [0.1] * 8, 1.0, nothing, torch.empty(6, 0), nothing, 0
    )
    cuda_twin.preference_spread_cuda(nothing, nothing, cu, 2, 1.0, nothing, 0)
