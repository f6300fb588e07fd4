"""preference_loss as an op: strides, graphs, threads, inside linear_loss, under torch.compile."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from preference_inputs import LABELS, LENGTHS, inputs, needs_native, offsets, what_it_reads, with_gradient

import fastalign as fa
from fastalign.losses.packed import preference_objective
from fastalign.losses.preference import mixture
from fastalign.losses.unpaired import UNPAIRED
from fastalign.ops.backend import use_backend


@needs_native
def test_preference_writes_every_element(monkeypatch):
    """Outputs start as NaN: what the kernels do not write would show."""
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: plain(self, *a, **k).fill_(math.nan))
    for dtype in (torch.float32, torch.float64):
        logp, ref, cu = inputs([3, 0, 7, 8, 0, 0, 1, 19], dtype)
        for run in (
            functools.partial(fa.preference_loss, cu_targets=cu, ref_logp=ref, ld_alpha=0.5),
            functools.partial(fa.unpaired_loss, cu_targets=cu, labels=LABELS[:8], ref_logp=ref),
        ):
            losses, gradient, metrics = with_gradient(run, logp)
            assert losses.isfinite().all()
            assert gradient.isfinite().all()
            assert all(value.isfinite().all() for value in metrics.values())


@needs_native
def test_preference_is_the_same_to_the_bit_with_any_threads_and_neighbours(isa):
    lengths = [700, 650] * 60
    logp, ref, cu = inputs(lengths, torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=ref), logp)[:2])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    alone, _ = fa.preference_loss(logp.detach()[:1350], cu[:3], ref_logp=ref[:1350])
    assert torch.equal(alone, results[0][0][:1])


def test_preference_non_contiguous_and_strided_upstream(backend):
    logp, ref, cu = inputs()
    wide = torch.stack([logp.detach(), ref], 1)
    strided = wide[:, 0].requires_grad_()
    want, want_gradient, _ = with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=ref), logp)
    got, gradient, _ = with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=wide[:, 1]), strided)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient, want_gradient)
    upstream = torch.randn(5, 3, dtype=torch.float64)[:, 1]
    for given in (upstream, upstream.contiguous()[:1].expand(5)):
        got = with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=ref), logp, given)[1]
        torch.testing.assert_close(got, with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=ref), logp, given.contiguous())[1])


@needs_native
def test_preference_retains_its_graph_and_refuses_a_second_derivative():
    logp, ref, cu = inputs()
    losses, _ = fa.preference_loss(logp, cu, ref_logp=ref)
    first, second = (torch.autograd.grad(losses.mean(), logp, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(losses.sum(), logp, create_graph=True)
    with pytest.raises(RuntimeError, match="preference_loss: a second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo", "ipo_avg", "kto"])
def test_preference_inside_linear_loss_is_the_loss_outside(name, backend):
    hidden = torch.randn(sum(LENGTHS), 8, dtype=torch.float64, requires_grad=True)
    head = (torch.randn(19, 8, dtype=torch.float64) * 0.5).requires_grad_()
    targets, cu = torch.randint(19, (sum(LENGTHS),)), offsets(LENGTHS)
    ref = -torch.rand(sum(LENGTHS), dtype=torch.float64) * 3
    if name in UNPAIRED:

        def objective(logp, span):
            first = int((cu == span.start).nonzero()[-1])
            last = int((cu == span.stop).nonzero()[0])
            losses, _ = fa.unpaired_loss(logp, cu[first : last + 1] - span.start, LABELS[first:last], loss=name, ref_logp=ref[span])
            return losses.sum() / 10

        units = cu
        want = lambda logp: fa.unpaired_loss(logp, cu, LABELS, loss=name, ref_logp=ref)[0].sum() / 10  # noqa: E731
    else:
        given = what_it_reads(name, ref, 5)
        objective, units = preference_objective(cu, num_pairs=5, **given)
        want = lambda logp: fa.preference_loss(logp, cu, **given)[0].mean()  # noqa: E731
    reference_loss = want(fa.linear_logp(hidden, head, targets))
    exact = torch.autograd.grad(reference_loss, (hidden, head))
    for chunk_rows in (12, 100):
        loss, metrics = fa.linear_loss(hidden, head, targets, objective, units=units, max_chunk_bytes=chunk_rows * 19 * 8)
        torch.testing.assert_close(loss, reference_loss, rtol=1e-12, atol=1e-14)
        for a, b in zip(torch.autograd.grad(loss, (hidden, head)), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        if name not in UNPAIRED:
            sums = fa.preference_loss(metrics["logp"], cu, **given)[1]
            assert float(metrics["rewards/margins"]) == pytest.approx(float(sums["rewards/margins"].sum()))


@pytest.mark.parametrize("name", ["dpo", "aot", "orpo"])
@pytest.mark.parametrize("forced", [None, "reference"])
def test_preference_compiles_without_a_break(name, forced):
    logp, ref, cu = inputs(dtype=torch.float32)
    given = what_it_reads(name, ref, 5, torch.float32)

    def run(x):
        losses, metrics = fa.preference_loss(x, cu, **given)
        return losses.mean(), metrics["rewards/margins"]

    with use_backend(forced):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        (loss, margins), (want, want_margins) = compiled(logp), run(logp)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(margins, want_margins)
        torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.autograd.grad(want, logp)[0])
    torch._dynamo.reset()


def test_unpaired_compiles_without_a_break():
    logp, ref, cu = inputs(dtype=torch.float32)

    def run(x):
        return fa.unpaired_loss(x, cu, LABELS, ref_logp=ref)[0].mean()

    loss, want = torch.compile(run, fullgraph=True, backend="aot_eager")(logp), run(logp)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.autograd.grad(want, logp)[0])


def test_preference_inside_linear_loss_compiles_without_a_break():
    hidden, head = torch.randn(14, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    targets, ref = torch.randint(33, (14,)), -torch.rand(14)
    objective, units = preference_objective(offsets([3, 4, 2, 5]), num_pairs=2, ref_logp=ref)

    def run(hidden, head):
        loss, metrics = fa.linear_loss(hidden, head, targets, objective, units=units)
        return loss, metrics["rewards/margins"]

    (loss, margins), (want, want_margins) = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden, head), run(hidden, head)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(margins, want_margins)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (loss, want)), strict=True):
        torch.testing.assert_close(a, b)


@needs_native
def test_preference_custom_ops_are_well_formed():
    logp, ref, cu = inputs(dtype=torch.float32)
    logp = logp.detach()
    options = (True, "logistic", [0.1, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastalign.preference_pairs, (logp, cu, ref, None, None, *options, 1.0), test_utils=checks)
    single = (True, "kto", [0.1, 1.0, 1.0, 0.0])
    torch.library.opcheck(torch.ops.fastalign.preference_singles, (logp, cu, LABELS, ref, None, *single), test_utils=checks)


@pytest.mark.parametrize("row", ["aot", "aot_unpaired", "mixture"])
def test_preference_objective_keeps_ranked_pairs_together(row):
    """A loss that ranks its pairs has one unit, the micro-batch; given the batch's ranks, each pair is one."""
    cu = offsets([3, 4, 2, 5, 1, 2])
    loss = mixture({"dpo": 0.5, "aot": 0.5}) if row == "mixture" else row
    _, units = preference_objective(cu, num_pairs=3, loss=loss, ref_logp=torch.randn(17))
    assert units.tolist() == [0, 17]
    if row == "aot":
        _, units = preference_objective(cu, num_pairs=3, loss=row, options={"matched": torch.zeros(3)}, ref_logp=torch.randn(17))
        assert units.tolist() == [0, 7, 14, 17]
