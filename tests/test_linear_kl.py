"""linear_kl against the fp64 reference; reference.py is the oracle, plain torch in the same dtype the yardstick."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from fastalign.ops import linear_head, linear_kl_passes, reference
from fastalign.ops.backend import load_native, use_backend
from fastalign.ops.divergence import Divergence, kl_grad_rows_, kl_rows
from fastalign.ops.linear_kl import linear_kl
from fastalign.ops.linear_kl_passes import backward_op, forward_op, frozen_op, fused_op

CASES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # interpreted Triton, at -inf - -inf
BOTH_WAYS = pytest.mark.parametrize("weighted", [False, True])


@pytest.fixture(params=["native", "triton"])
def kernel(request):
    """Each kernel that runs on this machine's CPU; Triton interpreted."""
    if request.param == "native" and load_native()[0] is None:
        pytest.skip("the native module is not built")
    if request.param == "triton" and (importlib.util.find_spec("triton") is None or torch.cuda.is_available()):
        pytest.skip("no interpreted Triton")
    with use_backend(request.param):
        yield request.param


def inputs(rows, vocab, dtype=torch.float64, *, width=5, teacher_width=7, scale=1.5, seed=0):
    """hidden, weight, bias with gradients; teacher's without."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    student = (normal(rows, width), normal(vocab, width) * scale * width**-0.5, normal(vocab))
    teacher = (normal(rows, teacher_width), normal(vocab, teacher_width) * scale * teacher_width**-0.5, normal(vocab))
    return [t.to(dtype).requires_grad_() for t in student], [t.to(dtype) for t in teacher]


def run(student, teacher, op=linear_kl, **options):
    hidden, weight, bias = student
    teacher_hidden, teacher_weight, teacher_bias = teacher
    return op(hidden, weight, teacher_hidden, teacher_weight, bias=bias, teacher_bias=teacher_bias, **options)


def from_kl_div(student_logits, teacher_logits, name, beta, temperature):
    """The divergence by F.kl_div on log-probs, as distillation trainers write it: kl_div(log q, log p) is KL(p‖q)."""
    s, t = (torch.log_softmax(z / temperature, -1) for z in (student_logits, teacher_logits))
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return F.kl_div(s, t, reduction="none", log_target=True).sum(-1)
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return F.kl_div(t, s, reduction="none", log_target=True).sum(-1)
    b = torch.tensor(beta, dtype=s.dtype)
    m = torch.logsumexp(torch.stack((s + torch.log1p(-b), t + b.log())), 0)
    to_teacher, to_student = (F.kl_div(m, x, reduction="none", log_target=True).sum(-1) for x in (t, s))
    return b * to_teacher + (1 - b) * to_student


def eager(hidden, weight, teacher_hidden, teacher_weight, *, bias, teacher_bias, divergence, jsd_beta, temperature=1.0, row_weight=None):
    """What a trainer writes in plain torch, in the dtype of the inputs."""
    logits = F.linear(hidden, weight, bias), F.linear(teacher_hidden, teacher_weight, teacher_bias)
    found = from_kl_div(*logits, divergence, jsd_beta, temperature)
    return found if row_weight is None else (found * row_weight.to(found.dtype)).sum()


@pytest.mark.parametrize(("divergence", "beta"), CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@BOTH_WAYS
def test_linear_kl_gradcheck(divergence, beta, temperature, weighted):
    student, teacher = inputs(4, 6, width=3)
    options = {"divergence": divergence, "jsd_beta": beta, "temperature": temperature}
    if weighted:
        options["row_weight"] = torch.tensor([0.3, 0.0, -1.7, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *s: run(s, teacher, **options), student)
    fixed = [t.detach() for t in student]
    for i in range(3):  # each of hidden, weight, bias alone; hidden alone is the frozen head

        def alone(x, i=i):
            return run([*fixed[:i], x, *fixed[i + 1 :]], teacher, **options)

        assert torch.autograd.gradcheck(alone, (student[i],))


@pytest.mark.parametrize(("divergence", "beta"), [*CASES, ("jsd", 0.0), ("jsd", 1.0)])
def test_linear_kl_is_what_kl_div_says(divergence, beta, backend):
    (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias) = inputs(9, 31)
    logits = hidden @ weight.t() + bias, teacher_hidden @ teacher_weight.t() + teacher_bias
    exact = from_kl_div(*logits, divergence, beta, 1.3)
    options = {"divergence": divergence, "jsd_beta": beta, "temperature": 1.3}
    student, teacher = (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias)
    assert torch.allclose(run(student, teacher, op=reference.linear_kl, **options), exact, rtol=1e-12, atol=1e-14)
    assert torch.allclose(run(student, teacher, **options), exact, rtol=1e-12, atol=1e-14)
    narrow = [[t.detach().float() for t in side] for side in (student, teacher)]
    assert torch.allclose(run(*narrow, **options).double(), exact, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_linear_kl_is_gkd_of_trl(beta):
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias) = inputs(9, 31)
    logits = hidden @ weight.t() + bias, teacher_hidden @ teacher_weight.t() + teacher_bias
    theirs = trainer.generalized_jsd_loss(*(z[None] for z in logits), beta=beta, temperature=1.3, reduction="sum")
    ours = run((hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias), divergence="jsd", jsd_beta=beta, temperature=1.3)
    assert torch.allclose(ours.sum(), theirs, rtol=1e-12)


def graded(op, student, teacher, upstream, **options):
    """Per-token divergence and the gradients of its sum weighted by `upstream`; the weights go through row_weight when given there."""
    found = run(student, teacher, op=op, **options)
    loss = found if found.dim() == 0 else (found * upstream.to(found.dtype)).sum()
    return [loss.detach() if found.dim() == 0 else found.detach(), *torch.autograd.grad(loss, student)]


def relative(found, exact):
    return [((f.double() - e).norm() / e.norm().clamp(min=1e-300)).item() for f, e in zip(found, exact, strict=True)]


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
        assert mine <= 1.2 * other + 4 * torch.finfo(dtype).eps, (name, mine, other)


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


@BOTH_WAYS
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_linear_kl_of_nothing_has_zero_gradients(rows, weighted, backend, monkeypatch):
    student, teacher = inputs(rows, 11, torch.float32)
    options = {"row_weight": torch.zeros(rows)} if weighted else {}
    if weighted:
        monkeypatch.setattr(linear_kl_passes, "head_logits", None)  # rows of weight zero reach no GEMM
    found = run(student, teacher, **options)
    assert found.shape == (() if weighted else (rows,))
    grads = torch.autograd.grad((found * 0).sum(), student)
    assert [g.shape for g in grads] == [t.shape for t in student]
    assert all(not g.any() for g in grads)


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


def small_chunks(monkeypatch, rows):
    monkeypatch.setattr(linear_head, "CHUNK_ROWS", rows)
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 0)


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


def test_linear_kl_holds_one_chunk_of_logits(monkeypatch):
    student, teacher = inputs(50, 11, torch.float32)
    small_chunks(monkeypatch, 8)
    seen = []
    plain = linear_kl_passes.head_logits
    monkeypatch.setattr(linear_kl_passes, "head_logits", lambda x, *a, **k: (seen.append(len(x)), plain(x, *a, **k))[1])
    run(student, teacher, row_weight=torch.rand(50)).backward()
    assert max(seen) <= 8
    assert sum(seen) == 2 * 50  # the student's once, the teacher's once
    seen.clear()
    run(student, teacher).sum().backward()
    assert sum(seen) == 4 * 50


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_kl_rows_without_a_gradient_are_not_computed(frozen, monkeypatch):
    student, teacher = inputs(40, 11)
    leaves = student[:1] if frozen else student
    student = [*leaves, *(t.detach() for t in student[len(leaves) :])]
    upstream = torch.randn(40, dtype=torch.float64)
    upstream[::2] = 0
    exact = torch.autograd.grad((run(student, teacher, op=reference.linear_kl) * upstream).sum(), leaves)
    seen = []
    plain = linear_kl_passes.head_logits
    monkeypatch.setattr(linear_kl_passes, "head_logits", lambda x, *a, **k: (seen.append(len(x)), plain(x, *a, **k))[1])
    weighted = torch.autograd.grad(run(student, teacher, row_weight=upstream), leaves)
    assert seen == [20, 20]
    found = run(student, teacher)
    seen.clear()
    each = torch.autograd.grad((found * upstream).sum(), leaves)
    assert seen == ([] if frozen else [20, 20])  # a frozen head computes nothing again
    for grads in (weighted, each):
        assert all(torch.allclose(a, b) for a, b in zip(grads, exact, strict=True))


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


@pytest.mark.parametrize("chunk", [512, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_kl_main_grad_takes_the_head_gradient(chunk, dtype, monkeypatch):
    (hidden, weight, bias), teacher = inputs(9, 21, dtype)
    small_chunks(monkeypatch, chunk)
    row_weight = torch.rand(9)
    loss = run((hidden, weight, bias), teacher, row_weight=row_weight)
    exact = torch.autograd.grad(2 * loss, (hidden, weight, bias))
    weight.main_grad = torch.ones(21, 5)
    (2 * run((hidden, weight, bias), teacher, row_weight=row_weight)).backward()
    assert weight.grad is None
    assert torch.equal(hidden.grad, exact[0])
    assert torch.allclose(weight.main_grad - 1, exact[1].float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    weight.main_grad = torch.ones(21, 5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"linear_kl: weight\.main_grad must be float32"):
        run((hidden, weight, bias), teacher, row_weight=row_weight)


@pytest.mark.parametrize("frozen", [False, True])
@BOTH_WAYS
def test_linear_kl_backward_twice_adds_twice_and_a_second_derivative_raises(frozen, weighted):
    (hidden, weight, bias), teacher = inputs(4, 11)
    student = (hidden, weight.detach(), bias.detach()) if frozen else (hidden, weight, bias)
    options = {"row_weight": torch.rand(4, dtype=torch.float64)} if weighted else {}
    loss = run(student, teacher, **options).square().sum()
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once)
    (grad,) = torch.autograd.grad(run(student, teacher, **options).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_kl: a second derivative"):
        (grad.square().sum() + hidden.sum()).backward()


def test_linear_kl_teacher_gets_no_gradient():
    student, teacher = inputs(4, 11)
    teacher = [t.requires_grad_() for t in teacher]
    for options in ({}, {"row_weight": torch.ones(4)}):
        run(student, teacher, **options).sum().backward()
        assert all(t.grad is None for t in teacher)
        assert all(t.grad is not None for t in student)


@BOTH_WAYS
def test_linear_kl_non_contiguous_inputs(weighted, kernel):
    student, teacher = ([t.detach().float() for t in s] for s in inputs(12, 19))
    options = {"row_weight": torch.rand(12)} if weighted else {}
    exact = graded(linear_kl, [t.requires_grad_() for t in student], teacher, torch.arange(12.0), **options)

    def gaps(t):
        return t.detach().repeat_interleave(2, -1)[..., ::2]

    columns = [t.detach().t().contiguous().t() if t.dim() == 2 else gaps(t) for t in student]
    for change in (columns, [gaps(t) for t in student]):
        odd = {"row_weight": gaps(options["row_weight"])} if weighted else {}
        found = graded(linear_kl, [t.requires_grad_() for t in change], [gaps(t) for t in teacher], torch.arange(12.0), **odd)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, exact, strict=True))


def test_linear_kl_teacher_may_have_another_dtype(kernel):
    student, teacher = inputs(12, 103, torch.float32)
    narrow = [t.bfloat16() for t in teacher]
    found = run(student, narrow, divergence="jsd")
    logits = [F.linear(s[0], s[1], s[2]).double() for s in (student, narrow)]
    exact = from_kl_div(*logits, "jsd", 0.5, 1.0)
    assert torch.allclose(found.double(), exact, rtol=1e-5)
    student = [t.detach().bfloat16().requires_grad_() for t in student]
    found = run(student, teacher, divergence="jsd", row_weight=torch.ones(12))
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(found, student))


def test_linear_kl_autocast_casts_both_sides():
    student, teacher = inputs(20, 33, torch.float32)
    narrow = [[t.detach().bfloat16() for t in s] for s in (student, teacher)]
    for options in ({}, {"row_weight": torch.rand(20)}):
        with torch.autocast("cpu", torch.bfloat16):
            found = run(student, teacher, **options)
        assert torch.equal(found, run(*narrow, **options))
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(found.sum(), student))


@BOTH_WAYS
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_kl_compiles_without_a_break(weighted, frozen, monkeypatch):
    student, teacher = inputs(20, 33, torch.float32)
    student = [student[0], *(t.detach() for t in student[1:])] if frozen else student
    wanted = [t for t in student if t.requires_grad]
    options = {"row_weight": torch.rand(20).masked_fill(torch.arange(20) == 4, 0.0)} if weighted else {}

    def loss(*tensors):
        return run(tensors, teacher, divergence="jsd", temperature=0.7, **options).exp().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(loss(*student), wanted), torch.autograd.grad(compiled(*student), wanted), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_linear_kl_custom_ops_hold_their_contract():
    student, teacher = ([t.detach() for t in s] for s in inputs(6, 11, torch.float32))
    which = (2, 0.3, 0.8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op, (*student, *teacher, *which), test_utils=checks)
    torch.library.opcheck(frozen_op, (*student[:2], None, *teacher[:2], None, *which), test_utils=checks)
    state = forward_op(*student, *teacher, *which)[1]
    for needs in ((True, True, False), (False, True, True)):
        torch.library.opcheck(backward_op, (torch.randn(6), state, *student, *teacher, *which, *needs), test_utils=checks)
        torch.library.opcheck(fused_op, (torch.rand(6), *student, *teacher, *which, *needs), test_utils=checks)


def test_linear_kl_errors_say_what_was_expected():
    (hidden, weight, bias), (teacher_hidden, teacher_weight, _) = inputs(4, 11, torch.float32)
    four = (hidden, weight, teacher_hidden, teacher_weight)
    with pytest.raises(ValueError, match="linear_kl: student and teacher must have one vocabulary, got 11 and 9 rows"):
        linear_kl(hidden, weight, teacher_hidden, teacher_weight[:9])
    with pytest.raises(ValueError, match=r"expected teacher_hidden \[4, K\]"):
        linear_kl(hidden, weight, teacher_hidden[:3], teacher_weight)
    with pytest.raises(ValueError, match=r"expected teacher_hidden \[N, K\] and teacher_weight \[V, K\]"):
        linear_kl(hidden, weight, hidden, teacher_weight)
    with pytest.raises(ValueError, match=r"linear_kl \(teacher\): hidden and weight must have one dtype"):
        linear_kl(hidden, weight, teacher_hidden.bfloat16(), teacher_weight)
    with pytest.raises(ValueError, match=r"expected bias \[11\]"):
        linear_kl(*four, bias=bias[:5])
    with pytest.raises(ValueError, match="expected divergence 'forward_kl', 'reverse_kl', 'jsd', got 'kl'"):
        linear_kl(*four, divergence="kl")
    with pytest.raises(ValueError, match="jsd_beta must be in"):
        linear_kl(*four, divergence="jsd", jsd_beta=1.5)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        linear_kl(*four, temperature=0.0)
    with pytest.raises(ValueError, match=r"expected row_weight \[4\]"):
        linear_kl(*four, row_weight=torch.ones(3))
    with pytest.raises(ValueError, match="row_weight must not require gradients"):
        linear_kl(*four, row_weight=torch.ones(4, requires_grad=True))
    with pytest.raises(TypeError, match="floating-point"):
        linear_kl(hidden.long(), weight, teacher_hidden, teacher_weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 7), (17, 1003), (33, 50257)])
@pytest.mark.parametrize(("divergence", "beta"), CASES)
@BOTH_WAYS
def test_linear_kl_on_a_gpu(rows, vocab, divergence, beta, dtype, weighted):
    student, teacher = ([t.detach().cuda() for t in s] for s in inputs(rows, vocab, dtype, width=64, teacher_width=32))
    upstream = torch.randn(rows).cuda()
    options = {"divergence": divergence, "jsd_beta": beta, "temperature": 0.8} | ({"row_weight": upstream} if weighted else {})
    wide = [[t.double() for t in s] for s in (student, teacher)]
    student = [t.requires_grad_() for t in student]
    exact = graded(reference.linear_kl, [t.requires_grad_() for t in wide[0]], wide[1], upstream, **options)
    ours, theirs = (graded(op, student, teacher, upstream, **options) for op in (linear_kl, eager))
    for mine, other, name in zip(relative(ours, exact), relative(theirs, exact), ("value", "hidden", "weight", "bias"), strict=True):
        assert mine <= 1.2 * other + 4 * torch.finfo(dtype).eps, (name, mine, other)


@BOTH_WAYS
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_kl_takes_a_teacher_made_under_inference_mode(frozen, weighted):
    student, teacher = inputs(6, 11, torch.float32)
    student = [student[0], *(t.detach() for t in student[1:])] if frozen else student
    with torch.inference_mode():
        unwatched = [t.clone() for t in teacher]
    options = {"row_weight": torch.rand(6)} if weighted else {}
    learned = [t for t in student if t.requires_grad]
    found, expected = (torch.autograd.grad(run(student, t, **options).sum(), learned) for t in (unwatched, teacher))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_linear_kl_without_gradients_takes_none(monkeypatch):
    monkeypatch.setattr("fastalign.ops.linear_kl.kl_frozen", None)  # the pass of a frozen head, which takes them in the forward
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3)
    with torch.no_grad():
        assert not linear_kl(hidden, weight, hidden, weight).requires_grad
