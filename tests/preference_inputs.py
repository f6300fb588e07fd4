"""What the tests of preference losses share: packed log-probs and what each loss reads."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastalign.losses.preference import DIVERGENCES, PREFERENCE
from fastalign.ops.backend import load_native

LENGTHS = [3, 5, 1, 2, 9, 4, 17, 1, 4, 4]


LABELS = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0, 1, 0], dtype=torch.bool)


needs_native = pytest.mark.skipif(load_native()[0] is None, reason="the native module is not built")


CASES = [(name, div) for name, row in PREFERENCE.items() for div in DIVERGENCES if div == "reverse_kl" or row.divergence]


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(lengths=LENGTHS, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(sum(lengths), generator=g, dtype=dtype) * 3
    ref = logp + torch.randn(sum(lengths), generator=g, dtype=dtype) * 0.4
    return logp.requires_grad_(), ref, offsets(lengths)


def what_it_reads(name, ref, num_pairs, dtype=torch.float64):
    row, g = PREFERENCE[name], torch.Generator().manual_seed(1)
    given = {"loss": name, "weight": torch.rand(num_pairs, generator=g, dtype=dtype) + 0.5}
    given |= {"ref_logp": ref} if row.reference else {}
    return given | ({"margin": torch.rand(num_pairs, generator=g, dtype=dtype)} if row.margin else {})


def with_gradient(run, logp, upstream=None):
    losses, metrics = run(logp)
    upstream = torch.linspace(-1, 2, len(losses), dtype=logp.dtype) if upstream is None else upstream
    return losses.detach(), torch.autograd.grad(losses, logp, upstream)[0], metrics
