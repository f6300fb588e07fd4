"""linear_logp against the fp64 reference; reference.py is the oracle, plain torch in the same dtype the yardstick."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastalign.ops import linear_chunks, linear_head, reference
from fastalign.ops.linear_head import even_chunks, head_logits
from fastalign.ops.linear_logp import linear_logp

ODD_SHAPES = [(1, 1, 7), (1, 33, 512), (5, 3, 7), (17, 31, 97), (40, 64, 512)]


def inputs(rows, width, vocab, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=g, dtype=torch.float64) * 1.5 * width**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=g)
    return hidden, weight, targets


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"logit_softcap": 2.0}, {"temperature": 1.3, "logit_softcap": 3.0}])
def test_linear_logp_gradcheck(options, entropy):
    hidden, weight, targets = inputs(3, 2, 5)
    targets[1] = -100
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def run(h, w, b):
        return linear_logp(h, w, targets, bias=b, return_entropy=entropy, **options)

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h: run(h, weight.detach(), bias.detach()), (hidden,))  # frozen head
    assert torch.autograd.gradcheck(lambda w: run(hidden.detach(), w, bias.detach()), (weight,))  # frozen hidden
    assert torch.autograd.gradcheck(lambda b: run(hidden.detach(), weight.detach(), b), (bias,))


def errors_of(op, hidden, weight, targets, upstream, exact, **options):
    found = op(hidden, weight, targets, return_entropy=True, **options)
    grads = torch.autograd.grad(sum((f * u.to(f.dtype)).sum() for f, u in zip(found, upstream, strict=True)), (hidden, weight))
    return [(f.double() - e).norm() / e.norm().clamp(min=1e-12) for f, e in zip((*found, *grads), exact, strict=True)]


def plain_torch(hidden, weight, targets, *, return_entropy, temperature=1.0, logit_softcap=None):
    logits = F.linear(hidden, weight)
    if logit_softcap:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "logit_softcap": 4.0}])
def test_linear_logp_is_at_least_as_exact_as_torch(shape, dtype, options):
    hidden, weight, targets = inputs(*shape, dtype, seed=sum(shape))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    upstream = torch.randn(2, shape[0], dtype=torch.float64)  # non-uniform, and of both signs
    exact = reference.linear_logp(*wide, targets, return_entropy=True, **options)
    exact = [e.detach() for e in (*exact, *torch.autograd.grad(sum((f * u).sum() for f, u in zip(exact, upstream, strict=True)), wide))]
    ours = errors_of(linear_logp, hidden, weight, targets, upstream, exact, **options)
    theirs = errors_of(plain_torch, hidden, weight, targets, upstream, exact, **options)
    for mine, other, name in zip(ours, theirs, ("logp", "entropy", "dhidden", "dweight"), strict=True):
        assert mine <= 1.2 * other + 4 * torch.finfo(dtype).eps, (name, mine, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logp_is_as_exact_at_a_real_vocabulary(dtype):
    test_linear_logp_is_at_least_as_exact_as_torch((24, 48, 50257), dtype, {})


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_logp_ignored_rows_cost_and_add_nothing(frozen):
    hidden, weight, targets = inputs(9, 5, 11, torch.float32)
    weight = weight.detach() if frozen else weight
    targets[::2] = -100
    with torch.no_grad():
        hidden[0] = float("nan")  # an ignored row is not read
    logp, entropy = linear_logp(hidden, weight, targets, return_entropy=True)
    assert (logp[::2] == 0).all()
    assert (entropy[::2] == 0).all()
    assert (logp[1::2] < 0).all()
    (logp.sum() + entropy.sum()).backward()
    assert (hidden.grad[::2] == 0).all()
    assert (hidden.grad[1::2] != 0).any()


@pytest.mark.parametrize("targets", [torch.full((6,), -100), torch.empty(0, dtype=torch.int64)])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_logp_all_ignored_or_empty_has_zero_gradients(targets, frozen):
    hidden, weight, _ = inputs(len(targets), 5, 11, torch.float32)
    weight = weight.detach() if frozen else weight
    linear_logp(hidden, weight, targets).sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert not hidden.grad.any()
    assert frozen or not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logp_is_bitwise_equal_in_any_batch(dtype, monkeypatch):
    hidden, weight, targets = (t.detach() for t in inputs(70, 48, 1003, dtype))
    whole, entropy = linear_logp(hidden, weight, targets, return_entropy=True)
    for part in (slice(0, 1), slice(3, 8), slice(11, 26), slice(30, 47), slice(2, 70)):
        logp, ent = linear_logp(hidden[part], weight, targets[part], return_entropy=True)
        assert torch.equal(logp, whole[part])
        assert torch.equal(ent, entropy[part])
    monkeypatch.setattr(linear_head, "CHUNK_ROWS", 9)
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 0)
    assert torch.equal(linear_logp(hidden, weight, targets), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 512, 5003])
def test_head_logits_of_a_row_do_not_depend_on_the_batch(dtype, vocab):
    hidden, weight, _ = (t.detach() for t in inputs(300, 64, vocab, dtype))
    whole = head_logits(hidden, weight)
    for rows in (1, 2, 11, 16, 17, 33, 100, 299):
        assert torch.equal(head_logits(hidden[:rows], weight), whole[:rows])


@pytest.mark.parametrize("sign", [1, -1])
def test_linear_logp_logits_of_ten_thousand(sign):
    hidden, weight, targets = inputs(6, 4, 9, torch.float32)
    bias = torch.zeros(9)
    bias[2] = sign * 1e4
    targets[:3] = 2
    logp, entropy = linear_logp(hidden, weight, targets, bias=bias, return_entropy=True)
    exact = reference.linear_logp(hidden.double(), weight.double(), targets, bias=bias.double())
    assert torch.allclose(logp.double(), exact, rtol=1e-6, atol=1e-3)
    grads = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in grads)


def test_linear_logp_minus_infinity_removes_a_token():
    hidden, weight, targets = inputs(6, 4, 9)
    targets[:] = 3
    bias = torch.zeros(9, dtype=torch.float64)
    bias[5] = -torch.inf
    keep = [0, 1, 2, 3, 4, 6, 7, 8]
    found = linear_logp(hidden, weight, targets, bias=bias, return_entropy=True)
    exact = reference.linear_logp(hidden, weight[keep], targets, return_entropy=True)
    for a, b in zip(found, exact, strict=True):
        assert torch.allclose(a, b)
        for x, y in zip(*(torch.autograd.grad(v.sum(), (hidden, weight), retain_graph=True) for v in (a, b)), strict=True):
            assert torch.allclose(x, y, atol=1e-12)


def test_linear_logp_nan_stays_in_its_row():
    hidden, weight, targets = inputs(4, 5, 11, torch.float32)
    with torch.no_grad():
        hidden[2, 0] = float("nan")
    logp = linear_logp(hidden, weight, targets)
    assert logp[2].isnan()
    assert logp[[0, 1, 3]].isfinite().all()


def test_linear_logp_non_contiguous_inputs():
    hidden, weight, targets = inputs(12, 8, 11)
    strided = hidden.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()
    columns = weight.detach().t().contiguous().t().requires_grad_()
    gaps = weight.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()
    exact = torch.autograd.grad(linear_logp(hidden, weight, targets).sum(), (hidden, weight))
    for w in (columns, gaps):
        found = torch.autograd.grad(linear_logp(strided, w, targets.repeat_interleave(2)[::2]).sum(), (strided, w))
        assert all(torch.allclose(a, b) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_logp_second_derivative_raises(frozen):
    hidden, weight, targets = inputs(4, 5, 11)
    weight = weight.detach() if frozen else weight
    (grad,) = torch.autograd.grad(linear_logp(hidden, weight, targets).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        (grad.square().sum() + hidden.sum()).backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_logp_backward_twice_adds_twice(frozen):
    hidden, weight, targets = inputs(4, 5, 11)
    weight = weight.detach() if frozen else weight
    loss = linear_logp(hidden, weight, targets).square().sum()
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once)


def test_linear_logp_rows_without_upstream_gradient_are_not_computed(monkeypatch):
    hidden, weight, targets = inputs(40, 5, 11)
    upstream = torch.randn(40, dtype=torch.float64)
    upstream[::2] = 0
    exact = torch.autograd.grad((reference.linear_logp(hidden, weight, targets) * upstream).sum(), (hidden, weight))
    logp = linear_logp(hidden, weight, targets)
    seen = []
    add = linear_chunks.Gradients.add
    monkeypatch.setattr(linear_chunks.Gradients, "add", lambda self, head, d, x, at: (seen.append(len(d)), add(self, head, d, x, at)))
    found = torch.autograd.grad((logp * upstream).sum(), (hidden, weight))
    assert seen == [20]
    assert all(torch.allclose(a, b) for a, b in zip(found, exact, strict=True))


def test_linear_logp_errors_say_what_was_expected():
    hidden, weight, targets = inputs(4, 5, 11, torch.float32)
    targets[2] = 13
    with pytest.raises(ValueError, match=r"linear_logp: targets must be < vocab size 11, got 13 at row 2; is the tokenizer"):
        linear_logp(hidden, weight, targets)
    targets[2] = -7
    with pytest.raises(ValueError, match="got -7 at row 2"):
        linear_logp(hidden, weight, targets)
    targets[2] = 0
    with pytest.raises(ValueError, match="one dtype outside autocast, got float32 and bfloat16"):
        linear_logp(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"expected targets \[4\]"):
        linear_logp(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match=r"hidden \[N, H\] and weight \[V, H\]"):
        linear_logp(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        linear_logp(hidden, weight, targets, temperature=0.0)
    with pytest.raises(TypeError, match="int64 targets"):
        linear_logp(hidden, weight, targets.float())


def test_linear_logp_autocast_casts_both():
    hidden, weight, targets = inputs(20, 16, 33, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logp = linear_logp(hidden.bfloat16(), weight, targets)
    assert torch.equal(logp, linear_logp(hidden.bfloat16(), weight.bfloat16(), targets))
    logp.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_linear_logp_compiles_without_a_break():
    hidden, weight, targets = inputs(20, 16, 33, torch.float32)
    targets[4] = -100

    def run(h, w):
        logp, entropy = linear_logp(h, w, targets, temperature=0.7, return_entropy=True)
        return (logp.exp() + entropy).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for w in (weight, weight.detach()):
        wanted = [t for t in (hidden, w) if t.requires_grad]
        for a, b in zip(torch.autograd.grad(run(hidden, w), wanted), torch.autograd.grad(compiled(hidden, w), wanted), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_linear_logp_custom_ops_hold_their_contract():
    from fastalign.ops.linear_passes import backward_op, forward_op, frozen_op

    hidden, weight, targets = (t.detach() for t in inputs(6, 5, 11, torch.float32))
    options = (0.8, None, -100, False)
    lse, entropy = torch.randn(6), torch.rand(6)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op, (hidden, weight, None, targets, *options, True), test_utils=checks)
    torch.library.opcheck(frozen_op, (hidden, weight, None, targets, *options, False), test_utils=checks)
    needs = (True, True, False)
    args = (torch.randn(6), None, None, hidden, weight, None, targets, lse, entropy, *options, *needs)
    torch.library.opcheck(backward_op, args, test_utils=checks)


def test_even_chunks_cover_every_row_once():
    for stop in (0, 1, 5, 16, 33):
        for rows in (1, 4, 16, 64):
            chunks = even_chunks(0, stop, rows)
            assert [i for s in chunks for i in range(s.start, s.stop)] == list(range(stop))
            assert all(s.stop - s.start <= rows for s in chunks)


def test_linear_logp_without_gradients_takes_none(monkeypatch):
    monkeypatch.setattr("fastalign.ops.linear_logp.logp_frozen", None)  # the pass of a frozen head, which takes them in the forward
    hidden, weight, targets = inputs(5, 3, 7)
    with torch.no_grad():
        assert not linear_logp(hidden, weight.detach(), targets).requires_grad
