"""linear_kl against the fp64 reference; reference.py is the oracle, plain torch in the same dtype the yardstick."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from linear_kl_inputs import BOTH_WAYS, CASES, eager, from_kl_div, graded, inputs, relative, run, small_chunks

from fastalign.ops import linear_kl_passes, reference
from fastalign.ops.linear_kl import linear_kl
from fastalign.ops.linear_kl_passes import backward_op, forward_op, frozen_op, fused_op

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # interpreted Triton, at -inf - -inf


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
