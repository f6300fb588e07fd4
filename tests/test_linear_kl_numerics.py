"""The digits of linear_kl: against plain torch in the same dtype, at the ends of the range, in any batch."""

from __future__ import annotations

import pytest
import torch
from linear_kl_inputs import BOTH_WAYS, CASES, eager, from_kl_div, graded, inputs, relative, run, small_chunks

from fastalign.ops import reference
from fastalign.ops.backend import use_backend
from fastalign.ops.divergence import Divergence, kl_grad_rows_, kl_rows
from fastalign.ops.linear_kl import linear_kl

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # interpreted Triton, at -inf - -inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 512), (5, 7), (17, 1003)])
@pytest.mark.parametrize(("divergence", "beta"), CASES)
@BOTH_WAYS
def test_linear_kl_is_at_least_as_exact_as_torch(rows, vocab, divergence, beta, dtype, weighted, kernel):
    student, teacher = inputs(rows, vocab, dtype, seed=rows)
    upstream = torch.randn(rows)
    options = {"divergence": divergence, "jsd_beta": beta, "temperature": 0.8} | ({"row_weight": upstream} if weighted else {})
    wide = [[t.detach().double() for t in side] for side in (student, teacher)]
    exact = graded(reference.linear_kl, [t.requires_grad_() for t in wide[0]], wide[1], upstream, **options)
    ours, theirs = (graded(op, student, teacher, upstream, **options) for op in (linear_kl, eager))
    if vocab == 1:  # one token: no divergence, no gradient
        assert all(t.abs().max() < 1e-6 for t in ours)
        return
    for mine, other, name in zip(relative(ours, exact), relative(theirs, exact), ("value", "hidden", "weight", "bias"), strict=True):
        assert mine <= 1.2 * other + 8 * torch.finfo(dtype).eps, (name, mine, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_linear_kl_is_as_exact_at_a_real_vocabulary(divergence, beta, dtype):
    with use_backend("native"):
        test_linear_kl_is_at_least_as_exact_as_torch(20, 50257, divergence, beta, dtype, True, "native")


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_linear_kl_bf16_gradients_are_within_the_rounding_of_the_logits(divergence, beta, kernel):
    """A student near its teacher, as in distillation's last phase. What is left is the rounding of the logits by the CPU's bf16 GEMM."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(24, 64, generator=g), torch.randn(1003, 64, generator=g) * 0.4
    student = [(hidden + 0.3 * torch.randn(24, 64, generator=g)).bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()]
    teacher = [hidden.bfloat16(), weight.bfloat16()]
    upstream = torch.rand(24, generator=g)

    def gradients(op, dtype):
        leaves, others = ([t.detach().to(dtype) for t in side] for side in (student, teacher))
        leaves = [t.requires_grad_() for t in leaves]
        options = {"divergence": divergence, "jsd_beta": beta, "bias": None, "teacher_bias": None, "row_weight": upstream}
        return torch.autograd.grad(op(*leaves, *others, **options), leaves)

    exact = gradients(reference.linear_kl, torch.float64)
    ours, theirs = (relative(gradients(op, torch.bfloat16), exact) for op in (linear_kl, eager))
    assert max(ours) < 0.035, (ours, theirs)
    assert all(mine < other for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_linear_kl_of_close_distributions_keeps_its_digits(divergence, beta, kernel):
    """fp32 rows whose divergence is near 1e-7: plain sums in fp32 lose all of it."""
    student = torch.randn(4, 1003) * 3
    teacher = student + 5e-4 * torch.randn(4, 1003)
    exact = from_kl_div(student.double(), teacher.double(), divergence, beta, 1.0)
    found, _ = kl_rows(student, teacher, Divergence.of("test", divergence, beta, 1.0))
    assert exact.max() < 1e-6
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("divergence", "beta"), CASES)
@BOTH_WAYS
def test_linear_kl_of_equals_is_zero(divergence, beta, weighted, kernel):
    (hidden, weight, bias), _ = inputs(9, 103, torch.float32)
    options = {"row_weight": torch.rand(9)} if weighted else {}
    found = run((hidden, weight, bias), [t.detach() for t in (hidden, weight, bias)], divergence=divergence, jsd_beta=beta, **options)
    assert not found.any()
    assert all(not d.any() for d in torch.autograd.grad(found.sum(), (hidden, weight, bias)))


@pytest.mark.parametrize("vocab", [1, 3, 17, 4096, 4099, 8191])
@pytest.mark.parametrize("pair", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_kl_rows_on_every_instruction_set(isa, vocab, pair):
    logits = [torch.full((3, vocab + 9), float("nan"), dtype=dtype) for dtype in pair]  # odd offsets, among poison
    student, teacher = (z[:, 4 : 4 + vocab].copy_((torch.randn(3, vocab) * 3).to(z.dtype)) for z in logits)
    g = torch.randn(3)
    for divergence, beta in CASES:
        which = Divergence.of("test", divergence, beta, 0.6)
        found, state = kl_rows(student, teacher, which)
        leaf = student.double().requires_grad_()
        exact = from_kl_div(leaf, teacher.double(), divergence, beta, 0.6)
        (slope,) = torch.autograd.grad((exact * g).sum(), leaf)
        assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-7)
        whole = logits[0].clone()
        mine = whole[:, 4 : 4 + vocab]
        kl_grad_rows_(mine, teacher, which, state, g)
        eps = torch.finfo(student.dtype).eps
        assert torch.allclose(mine.double(), slope, rtol=eps + 1e-5, atol=1e-6 * max(1.0, exact.max().item()))
        at_once = student.clone()
        again, _ = kl_rows(at_once, teacher, which, g)
        assert torch.equal(again, found)
        assert torch.allclose(at_once.double(), slope, rtol=eps + 1e-5, atol=1e-6 * max(1.0, exact.max().item()))
        assert whole[:, :4].isnan().all()
        assert whole[:, 4 + vocab :].isnan().all()


@pytest.mark.parametrize(("divergence", "beta"), CASES)
@pytest.mark.parametrize("side", ["teacher", "both"])
@BOTH_WAYS
def test_linear_kl_minus_infinity_removes_a_token(divergence, beta, side, weighted, kernel):
    student, teacher = ([t.detach().float() for t in s] for s in inputs(6, 9))
    masked = [[t.clone() for t in s] for s in (student, teacher)]
    for tensors in masked[1:] if side == "teacher" else masked:
        tensors[2][5] = -torch.inf
    options = {"divergence": divergence, "jsd_beta": beta} | ({"row_weight": torch.rand(6)} if weighted else {})
    leaves = [t.requires_grad_() for t in masked[0]]
    found = run(leaves, masked[1], **options)
    if divergence == "reverse_kl" and side == "teacher":  # the student gives mass to what the teacher rules out
        assert (found == torch.inf).all()
        return
    assert found.isfinite().all()
    grads = torch.autograd.grad(found.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    if side == "both":
        keep = [0, 1, 2, 3, 4, 6, 7, 8]
        cut = [[s[0], s[1][keep], s[2][keep]] for s in (student, teacher)]
        cut[0] = [t.requires_grad_() for t in cut[0]]
        exact = run(*cut, **options)
        wanted = torch.autograd.grad(exact.sum(), cut[0])
        assert torch.allclose(found, exact, rtol=1e-5, atol=1e-6)
        for mine, other, rows in zip(grads, wanted, (slice(None), keep, keep), strict=True):
            assert torch.allclose(mine[rows], other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("divergence", "beta"), CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_linear_kl_logits_of_ten_thousand(divergence, beta, sign, kernel):
    student, teacher = inputs(6, 9, torch.float32)
    with torch.no_grad():
        student[2][2] += sign * 1e4
        teacher[2][4] -= sign * 1e4
    found, *grads = graded(linear_kl, student, teacher, torch.ones(6), divergence=divergence, jsd_beta=beta)
    wide = [[t.detach().double() for t in s] for s in (student, teacher)]
    exact = run(*wide, op=reference.linear_kl, divergence=divergence, jsd_beta=beta)
    assert torch.allclose(found.double(), exact, rtol=1e-4, atol=2e-3)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("shift", [300.0, -1e4])
@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_linear_kl_does_not_see_a_shift_of_all_logits(divergence, beta, shift, kernel):
    student, teacher = torch.randn(4, 203) * 3, torch.randn(4, 203).mul(3).round(decimals=2)
    which = Divergence.of("test", divergence, beta, 1.0)
    moved = teacher + shift
    exact = from_kl_div(student.double(), moved.double(), divergence, beta, 1.0)
    assert torch.allclose(kl_rows(student, moved, which)[0].double(), exact, rtol=2e-6, atol=1e-7)


def test_linear_kl_nan_stays_in_its_row(kernel):
    for side in (0, 1):
        sides = [[t.detach().clone() for t in s] for s in inputs(4, 11, torch.float32)]
        sides[side][0][2, 0] = torch.nan
        for divergence, beta in CASES:
            found = run(*sides, divergence=divergence, jsd_beta=beta)
            assert found[2].isnan()
            assert found[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_linear_kl_is_bitwise_equal_in_any_batch(divergence, beta, dtype, monkeypatch):
    student, teacher = ([t.detach() for t in s] for s in inputs(70, 1003, dtype, width=48, teacher_width=33))
    options = {"divergence": divergence, "jsd_beta": beta}
    whole = run(student, teacher, **options)
    for part in (slice(0, 1), slice(3, 8), slice(11, 26), slice(30, 47), slice(2, 70)):
        cut = [[s[0][part], *s[1:]] for s in (student, teacher)]
        assert torch.equal(run(*cut, **options), whole[part])
    small_chunks(monkeypatch, 9)
    assert torch.equal(run(student, teacher, **options), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOTH_WAYS
def test_linear_kl_head_gradient_error_is_flat_in_the_chunks(dtype, weighted, monkeypatch):
    student, teacher = inputs(256, 203, dtype, width=16)
    upstream = torch.rand(256)
    options = {"divergence": "jsd"} | ({"row_weight": upstream} if weighted else {})
    wide = [[t.detach().double() for t in s] for s in (student, teacher)]
    exact = graded(reference.linear_kl, [t.requires_grad_() for t in wide[0]], wide[1], upstream, **options)
    errors = []
    for rows in (256, 32, 2):
        small_chunks(monkeypatch, rows)
        errors.append(relative(graded(linear_kl, student, teacher, upstream, **options), exact))
    for many in errors[1:]:
        assert many[2] <= 1.1 * errors[0][2] + 1e-6, errors


def test_linear_kl_row_that_has_no_gradient_may_be_infinite():
    """Reverse KL where the teacher rules a token out: a zero upstream gradient keeps the NaN out of the others."""
    (hidden, weight, _), (teacher_hidden, teacher_weight, _) = inputs(3, 9, torch.float32)
    teacher_hidden[1] = torch.inf
    for w in (weight, weight.detach()):
        found = linear_kl(hidden, w, teacher_hidden, teacher_weight, divergence="reverse_kl")
        assert not found[1].isfinite()
        (d_hidden,) = torch.autograd.grad((found * torch.tensor([1.0, 0.0, 1.0])).nansum(), hidden)
        assert d_hidden.isfinite().all()
        assert not d_hidden[1].any()
