"""linear_loss: any objective of log-probs, its gradient taken in the forward; the fp64 reference is the oracle."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch

from fastalign.ops import linear_chunks, reference
from fastalign.ops.linear_logp import linear_logp
from fastalign.ops.linear_loss import linear_loss, plan, units_of

VOCAB, WIDTH = 11, 5
ROW = VOCAB * 8  # bytes of a row of fp64 logits


def inputs(rows=12, dtype=torch.float64, vocab=VOCAB, width=WIDTH, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=g, dtype=torch.float64) * 1.5 * width**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,), generator=g)


def square_of_units(units):
    """Couples all rows of a unit: Σ over units of (Σ logp)²."""

    def objective(logp, span):
        inside = units_of(span, units)
        ends = units[inside.start : inside.stop + 1] - span.start
        return sum(logp[a:b].sum().square() for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))

    return objective


def with_entropy(logp, entropy, span):
    return -(logp.exp()).sum() + 0.3 * entropy.square().sum()


@pytest.mark.parametrize("chunk_bytes", [None, 3 * ROW])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "logit_softcap": 2.0}])
def test_linear_loss_gradcheck(options, chunk_bytes):
    hidden, weight, targets = inputs(6, width=2)
    bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)

    def run(h, w, b):
        return linear_loss(h, w, targets, with_entropy, bias=b, return_entropy=True, max_chunk_bytes=chunk_bytes, **options)[0]

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h: run(h, weight.detach(), bias.detach()), (hidden,))  # frozen head
    assert torch.autograd.gradcheck(lambda w, b: run(hidden.detach(), w, b), (weight, bias))  # frozen hidden


@pytest.mark.parametrize(
    ("chunk_bytes", "flops", "chunks"),
    [(None, 6.0, 1), (7 * ROW, 6.0, 3), (6 * ROW, 6.0, 3), (4 * ROW, 7.0, 4), (1 * ROW, 2 + 6.0 - 2 / 12, 12)],
)
def test_linear_loss_units_are_whole_in_any_chunk(chunk_bytes, flops, chunks):
    hidden, weight, targets = inputs()
    units = torch.tensor([0, 0, 3, 9, 9, 9, 10, 12, 12])
    objective = square_of_units(units)
    found, metrics = linear_loss(hidden, weight, targets, objective, units=units, max_chunk_bytes=chunk_bytes)
    logp = reference.linear_logp(hidden, weight, targets)
    exact = sum(logp[a:b].sum().square() for a, b in zip(units[:-1].tolist(), units[1:].tolist(), strict=True))
    assert torch.allclose(found, exact)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (found, exact)), strict=True):
        assert torch.allclose(a, b)
    assert torch.allclose(metrics["logp"], logp)
    assert (metrics["flops_tvh"], metrics["num_chunks"]) == (pytest.approx(flops), chunks)


def test_plan_groups_units_and_leaves_large_ones_alone():
    assert plan([0, 2, 4, 6], 6, 4, 9) == [slice(0, 4), slice(4, 6)]
    assert plan([0, 1, 8, 9], 9, 4, 9) == [slice(0, 1), slice(1, 8), slice(8, 9)]
    assert plan([0, 0, 0], 0, 4, 9) == []
    assert plan(None, 5, 2, 9) == [slice(0, 2), slice(2, 4), slice(4, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_loss_is_at_least_as_exact_as_torch(dtype, frozen):
    hidden, weight, targets = inputs(40, dtype, 512, 64)
    weight = weight.detach() if frozen else weight
    advantages = torch.randn(40)

    def objective(logp, span):
        return -(logp.exp() * advantages[span].to(logp.dtype)).sum()

    wanted = [t for t in (hidden, weight) if t.requires_grad]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight)]
    exact = torch.autograd.grad(reference.linear_loss(*wide, targets, objective), [t for t in wide if t.requires_grad])
    loss, metrics = linear_loss(hidden, weight, targets, objective)
    ours = torch.autograd.grad(loss, wanted)
    log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight), -1).gather(1, targets[:, None]).squeeze(1)
    theirs = torch.autograd.grad(objective(log_p, slice(None)), wanted)
    for mine, other, e in zip(ours, theirs, exact, strict=True):
        mine, other = ((g.double() - e).norm() / e.norm() for g in (mine, other))
        assert mine <= 1.2 * other + 4 * torch.finfo(dtype).eps
    assert metrics["flops_tvh"] == (4.0 if frozen else 6.0)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("num_rows", [128, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_loss_head_gradient_error_is_flat_over_chunks(dtype, num_rows):
    hidden, weight, targets = inputs(num_rows, dtype, 33, 16)
    weight.main_grad = torch.zeros(33, 16)  # fp32: the rounding of autograd's bf16 gradient would hide the sum's error
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(reference.linear_logp(*wide, targets).sum(), wide[1])[0]
    errors = []
    for rows in (num_rows, 16, 1):
        weight.main_grad.zero_()
        loss, metrics = linear_loss(hidden, weight, targets, lambda logp, _: logp.sum(), max_chunk_bytes=rows * 33 * hidden.element_size())
        loss.backward()
        assert metrics["num_chunks"] == num_rows // rows
        errors.append(float((weight.main_grad - exact).norm() / exact.norm()))
    assert max(errors[1:]) <= 1.25 * errors[0] + 2e-6, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_loss_logp_is_bitwise_equal_in_any_chunk_and_to_linear_logp(dtype):
    hidden, weight, targets = inputs(50, dtype, 97, 16)
    alone, entropy = linear_logp(hidden, weight, targets, return_entropy=True)
    for rows in (1, 7, 16, 23, 50):
        _, metrics = linear_loss(hidden, weight, targets, lambda logp, _: logp.sum(), max_chunk_bytes=rows * 97 * hidden.element_size())
        assert torch.equal(metrics["logp"], alone)
        assert torch.equal(metrics["entropy"], entropy)


def test_linear_loss_zero_gradient_rows_are_skipped_and_nothing_changes(monkeypatch):
    hidden, weight, targets = inputs(60, torch.float64)
    mask = torch.randint(3, (60,)) == 0
    mask[:9], mask[9:12] = False, True

    def objective(logp, span):
        return (logp * mask[span]).sum()

    exact = torch.autograd.grad(reference.linear_loss(hidden, weight, targets, objective), (hidden, weight))
    for chunk_bytes in (None, 17 * ROW):
        loss, metrics = linear_loss(hidden, weight, targets, objective, max_chunk_bytes=chunk_bytes)
        assert metrics["flops_tvh"] == pytest.approx(2 + 4 * float(mask.double().mean()))
        for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
            assert torch.allclose(a, b)
    loss, metrics = linear_loss(hidden, weight, targets, lambda logp, _: logp.sum() * 0)
    loss.backward()
    assert metrics["flops_tvh"] == 2.0
    assert not weight.grad.any()
    assert not hidden.grad.any()


def test_compact_moves_rows_to_the_front():
    for seed in range(20):
        rows = torch.arange(15.0)[:, None].repeat(1, 3)
        keep = (torch.rand(15, generator=torch.Generator().manual_seed(seed)) < 0.7).nonzero().squeeze(1)
        if len(keep):
            assert torch.equal(linear_chunks.compact_(rows, keep)[:, 0], keep.float())


@pytest.mark.gpu
def test_compact_on_a_gpu_moves_rows_to_the_front():
    rows = torch.arange(1500.0, device="cuda")[:, None].repeat(1, 3)
    keep = (torch.rand(1500) < 0.7).nonzero().squeeze(1).cuda()
    front = linear_chunks.compact_(rows, keep)
    assert front.data_ptr() == rows.data_ptr()
    assert torch.equal(front[:, 0], keep.float())


def test_linear_loss_without_gradients_computes_the_forward_alone():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        loss, metrics = linear_loss(hidden, weight, targets, lambda logp, _: (-logp.sum(), {"tokens": len(logp)}), max_chunk_bytes=5 * ROW)
    assert not loss.requires_grad
    assert metrics["flops_tvh"] == 2.0
    assert metrics["tokens"] == 12
    assert metrics["correct"].dtype == torch.bool
    assert torch.allclose(loss, -metrics["logp"].sum())


def test_linear_loss_objective_may_return_numbers_and_sums():
    hidden, weight, targets = inputs()
    loss, metrics = linear_loss(
        hidden,
        weight,
        targets,
        lambda logp, span: (1.0, {"rows": logp.detach().numel(), "first": logp[0].square()}),
        max_chunk_bytes=4 * ROW,
    )
    assert float(loss.detach()) == 3.0
    assert metrics["rows"] == 12
    assert not metrics["first"].requires_grad
    loss.backward()
    assert not hidden.grad.any()
    with pytest.raises(ValueError, match="the objective returned None"):
        linear_loss(hidden, weight, targets, lambda logp, span: None)
    with pytest.raises(ValueError, match=r"must return a scalar"):
        linear_loss(hidden, weight, targets, lambda logp, _: logp)


def test_linear_loss_objective_may_call_another_op():
    hidden, weight, targets = inputs(12, torch.float32)
    other = torch.randn(12, WIDTH)

    def objective(logp, span):
        return (logp - linear_logp(other[span], weight.detach(), targets[span])).square().sum()

    exact = (reference.linear_logp(hidden, weight, targets) - reference.linear_logp(other, weight.detach(), targets)).square().sum()
    assert torch.allclose(linear_loss(hidden, weight, targets, objective)[0], exact)


def test_linear_loss_captured_tensors_must_not_require_gradients():
    hidden, weight, targets = inputs()
    scale = torch.ones(12, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"uses a tensor \[12\] that requires gradients.*detach it"):
        linear_loss(hidden, weight, targets, lambda logp, span: (logp * scale[span] * 2).sum())


def test_linear_loss_of_no_rows_is_zero_with_a_gradient():
    hidden, weight, targets = inputs(0)
    for units in (None, [0], [0, 0, 0]):
        loss, metrics = linear_loss(hidden, weight, targets, lambda logp, _: logp.mean(), units=units)
        loss.backward()
        assert float(loss.detach()) == 0
        assert len(metrics["logp"]) == 0
        assert metrics["num_chunks"] == 0
        assert not weight.grad.any()


def test_linear_loss_errors_say_what_was_expected():
    hidden, weight, targets = inputs()

    def objective(logp, _):
        return logp.sum()

    targets[3] = -100
    with pytest.raises(ValueError, match="linear_loss: targets must be >= 0, got -100 at row 3; drop the rows"):
        linear_loss(hidden, weight, targets, objective)
    targets[3] = VOCAB
    with pytest.raises(ValueError, match=f"targets must be < vocab size {VOCAB}, got {VOCAB} at row 3"):
        linear_loss(hidden, weight, targets, objective)
    targets[3] = 0
    for units in ([0, 5], [1, 12], [0, 7, 5, 12], []):
        with pytest.raises(ValueError, match="units must ascend from 0 to the number of rows 12"):
            linear_loss(hidden, weight, targets, objective, units=units)
    weight.main_grad = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="main_grad must be float32"):
        linear_loss(hidden, weight, targets, objective)


def test_linear_loss_nan_logits_give_a_nan_loss():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden[4, 1] = float("nan")
    loss, metrics = linear_loss(hidden, weight, targets, lambda logp, _: -logp.sum())
    assert loss.isnan()
    assert metrics["logp"][4].isnan()
    assert metrics["logp"].isnan().sum() == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_loss_second_derivative_raises(frozen):
    hidden, weight, targets = inputs()
    weight = weight.detach() if frozen else weight
    loss, _ = linear_loss(hidden, weight, targets, lambda logp, _: logp.square().sum())
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_loss: a second derivative"):
        (grad.square().sum() + hidden.sum()).backward()


def test_linear_loss_backward_scales_and_repeats():
    hidden, weight, targets = inputs()
    loss, _ = linear_loss(hidden, weight, targets, lambda logp, _: logp.square().sum())
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss * -2.5, (hidden, weight), retain_graph=True)
    assert all(torch.allclose(-2.5 * a, b) for a, b in zip(first, again, strict=True))
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.allclose(weight.grad, 2 * first[1])


def test_linear_loss_changed_gradients_change_no_other():
    hidden, weight, targets = inputs()
    loss, _ = linear_loss(hidden, weight, targets, lambda logp, _: logp.sum())
    (grad,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    first = grad.clone()
    grad.zero_()
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)


def test_linear_loss_tied_weights():
    _, weight, targets = inputs(12, torch.float64)
    tokens = torch.randint(VOCAB, (12,))

    def gradient(op):
        hidden = torch.tanh(weight[tokens])
        return torch.autograd.grad(op(hidden, weight, targets, lambda logp, _: logp.square().sum()), weight)[0]

    assert torch.allclose(gradient(lambda *a: linear_loss(*a)[0]), gradient(reference.linear_loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [5, 64])
def test_main_grad_takes_the_scaled_head_gradient(dtype, chunk_rows):
    hidden, weight, targets = inputs(24, dtype, 33, 16)
    chunk_bytes = chunk_rows * 33 * hidden.element_size()

    def run():
        return linear_loss(hidden, weight, targets, lambda logp, _: logp.square().sum(), max_chunk_bytes=chunk_bytes)[0]

    plain = torch.autograd.grad(run(), (hidden, weight))
    weight.main_grad = torch.ones(33, 16)
    one, two = run(), run()  # both alive before either backward
    (one * 0.5).backward()
    (two * 2.0).backward(retain_graph=True)
    two.backward()
    assert weight.grad is None
    tolerance = {"rtol": 2e-2, "atol": 2e-2 * float(plain[1].abs().max())} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    assert torch.allclose(weight.main_grad, 1 + 3.5 * plain[1].float(), **tolerance)
    assert torch.allclose(hidden.grad.float(), 3.5 * plain[0].float(), **tolerance)


def test_main_grad_memory_is_reused_and_its_loss_says_when_it_is_gone():
    hidden, weight, targets = inputs(24, torch.float32)
    weight.main_grad = torch.zeros(VOCAB, WIDTH)

    def run():
        return linear_loss(hidden, weight, targets, lambda logp, _: logp.sum(), max_chunk_bytes=5 * VOCAB * 4)[0]

    first = run()
    first.backward(retain_graph=True)
    second = run()  # takes the memory of the first, whose backward has run
    with pytest.raises(RuntimeError, match="given to a later call"):
        first.backward()
    second.backward()
    del first, second
    gc.collect()
    once = weight.main_grad.clone() / 2
    run()  # never differentiated: adds nothing, keeps nothing
    assert torch.equal(weight.main_grad / 2, once)


PEAKS = """
import gc
from pathlib import Path
import torch
from fastalign.ops.linear_head import release_buffers
from fastalign.ops.linear_loss import linear_loss

def status_kib(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

def peak_mib(rows):
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(32768, 8, requires_grad=True)
    targets = torch.randint(32768, (rows,))
    release_buffers()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    linear_loss(hidden, weight, targets, lambda logp, _: logp.sum())[0].backward()
    return (status_kib("VmHWM") - before) / 1024

peak_mib(512)  # loads what is loaded once
print(peak_mib(512), peak_mib(3072))  # 64 MiB and 384 MiB of logits
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark of memory")
def test_linear_loss_memory_is_one_chunk_whatever_the_rows():
    """In a process of its own: one in which a command has trained keeps what it frees, and shows no peaks."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    few, many = map(float, done.stdout.split())
    assert few >= 32, "the chunk itself was not seen"
    assert many <= few + 32, (few, many)


def test_linear_loss_hands_its_head_gradient_over_without_a_copy():
    hidden, weight, targets = inputs(12, torch.float32)
    seen = []
    loss, _ = linear_loss(hidden, weight, targets, lambda logp, _: logp.sum())
    weight.register_hook(lambda g: seen.append(g.data_ptr()))
    loss.backward()
    assert weight.grad.data_ptr() == seen[0]


def test_linear_loss_autocast_casts_both():
    hidden, weight, targets = inputs(20, torch.float32, 33, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = linear_loss(hidden.bfloat16(), weight, targets, lambda logp, _: logp.sum())
    assert torch.equal(metrics["logp"], linear_logp(hidden.bfloat16(), weight.bfloat16(), targets))
    loss.backward()
    assert weight.grad.dtype == torch.float32
    assert hidden.grad.dtype == torch.float32


def test_linear_loss_compiles_without_a_break():
    hidden, weight, targets = inputs(24, torch.float32, 33, 16)
    advantages = torch.randn(24)

    def objective(logp, entropy, span):
        ratio = torch.exp(logp - 0.9 * logp.detach())
        gain = torch.minimum(ratio * advantages[span], ratio.clamp(0.8, 1.2) * advantages[span])
        return -gain.sum() + 0.1 * entropy.square().sum(), {"ratio": ratio.sum()}

    def run(h, w, units):
        options = {"units": units, "return_entropy": True, "max_chunk_bytes": 10 * 33 * 4}
        loss, metrics = linear_loss(h, w, targets, objective, **options)
        return loss, metrics["ratio"]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for units in (None, torch.tensor([0, 3, 24])):
        (a, ratio), (b, compiled_ratio) = run(hidden, weight, units), compiled(hidden, weight, units)
        assert torch.allclose(a, b)
        assert torch.allclose(ratio, compiled_ratio)
        for x, y in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (a, b)), strict=True):
            assert torch.allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("viewed", ["hidden", "weight"])
def test_gradients_of_a_kept_graph_are_the_callers_own(viewed):
    """Behind a view autograd takes a gradient over without a copy: what is then done to it must not be done to the next one."""
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    targets, leaf = torch.randint(33, (10,)), hidden if viewed == "hidden" else weight
    loss, _ = linear_loss(hidden.view(-1, 8), weight.view(33, 8), targets, lambda logp, span: -logp.sum() / 10)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    leaf.grad.data.mul_(0.1)
    leaf.grad = None
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, 2 * first)
