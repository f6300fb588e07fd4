"""linear_cross_entropy: torch's call and torch's numbers; reference.py is the oracle for what torch has not."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastalign.ops import reference
from fastalign.ops.linear_cross_entropy import linear_cross_entropy

OPTIONS = list(itertools.product(("none", "mean", "sum"), (0.0, 0.1), (0.0, 0.01), (False, True)))


def inputs(rows=12, dtype=torch.float64, vocab=11, width=5):
    g = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=g, dtype=torch.float64) * 1.5 * width**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=g)
    targets[::3] = -100
    return hidden, weight, targets


@pytest.mark.parametrize(("reduction", "label_smoothing", "z_loss", "weighted"), OPTIONS)
def test_linear_cross_entropy_equals_the_reference(reduction, label_smoothing, z_loss, weighted):
    hidden, weight, targets = inputs()
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "z_loss": z_loss, "linear_bias": bias}
    options["weight"] = torch.rand(11, dtype=torch.float64) if weighted else None
    upstream = torch.randn(12 if reduction == "none" else (), dtype=torch.float64)
    for frozen in (False, True):
        head = weight.detach() if frozen else weight
        wanted = [t for t in (hidden, head) if t.requires_grad] + [bias]
        found = linear_cross_entropy(hidden, head, targets, **options)
        exact = reference.linear_cross_entropy(hidden, head, targets, **options)
        assert torch.allclose(found, exact)
        for a, b in zip(*(torch.autograd.grad((loss * upstream).sum(), wanted) for loss in (found, exact)), strict=True):
            assert torch.allclose(a, b)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_cross_entropy_gradcheck(reduction):
    hidden, weight, targets = inputs(4, width=2, vocab=5)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def run(h, w, b):
        options = {"linear_bias": b, "reduction": reduction, "label_smoothing": 0.2, "z_loss": 0.1}
        return linear_cross_entropy(h, w, targets, **options)

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
def test_linear_cross_entropy_is_at_least_as_exact_as_torch(dtype, options):
    hidden, weight, targets = inputs(40, dtype, 512, 64)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(reference.linear_cross_entropy(*wide, targets, **options), wide)
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, **options), (hidden, weight))
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits, targets, label_smoothing=options.get("label_smoothing", 0.0))
    if "z_loss" in options:
        loss = loss + options["z_loss"] * logits.logsumexp(-1)[targets != -100].square().mean()
    theirs = torch.autograd.grad(loss, (hidden, weight))
    for mine, other, e in zip(ours, theirs, exact, strict=True):
        mine, other = ((g.double() - e).norm() / e.norm() for g in (mine, other))
        assert mine <= 1.2 * other + 4 * torch.finfo(dtype).eps


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_cross_entropy_is_torchs_call(reduction):
    hidden, weight, targets = inputs(12, torch.float32)
    options = {"linear_bias": torch.randn(11), "weight": torch.rand(11), "reduction": reduction, "label_smoothing": 0.1}
    found = linear_cross_entropy(hidden, weight, targets, **options)
    assert torch.allclose(found, F.linear_cross_entropy(hidden, weight, targets, **options), rtol=1e-5, atol=1e-6)
    one = linear_cross_entropy(hidden[1], weight, targets[1], **options)
    assert torch.allclose(one, F.linear_cross_entropy(hidden[1], weight, targets[1], **options), rtol=1e-5, atol=1e-6)
    assert one.shape == ()
    with pytest.warns(UserWarning, match="options are ignored"):
        linear_cross_entropy(hidden, weight, targets, options=object())


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_cross_entropy_all_ignored_or_empty_is_zero(rows, reduction):
    hidden, weight, _ = inputs(rows, torch.float32)
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1}
    loss = linear_cross_entropy(hidden, weight, torch.full((rows,), -100), **options)
    loss.sum().backward()
    assert not loss.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_linear_cross_entropy_reads_no_ignored_row():
    hidden, weight, targets = inputs(12, torch.float32)
    with torch.no_grad():
        hidden[0] = float("nan")
    loss = linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1, z_loss=0.1)
    loss.backward()
    assert loss.isfinite()
    assert weight.grad.isfinite().all()
    assert not hidden.grad[0].any()


def test_linear_cross_entropy_second_derivative_raises():
    hidden, weight, targets = inputs()
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: a second derivative"):
        grad.square().sum().backward()


def test_linear_cross_entropy_errors_say_what_was_expected():
    hidden, weight, targets = inputs(6, torch.float32)
    targets[4] = 12
    with pytest.raises(ValueError, match="linear_cross_entropy: targets must be < vocab size 11, got 12 at row 4"):
        linear_cross_entropy(hidden, weight, targets)
    with pytest.raises(ValueError, match="class indices as target"):
        linear_cross_entropy(hidden, weight, torch.rand(6, 11))
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, weight, targets, reduction="batchmean")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        linear_cross_entropy(hidden, weight, targets, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"expected weight \[11\]"):
        linear_cross_entropy(hidden, weight, targets.clamp(max=10), weight=torch.rand(3))


def test_linear_cross_entropy_compiles_without_a_break():
    hidden, weight, targets = inputs(12, torch.float32)

    def run(h, w):
        return linear_cross_entropy(h, w, targets, label_smoothing=0.1, z_loss=0.01)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(hidden, weight), (hidden, weight)) for f in (run, compiled)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
