"""Edge cases of hidden × head that broke other implementations; fp64 is the oracle, plain torch in the same dtype the yardstick."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastalign.ops import gemm, gemm_wide, head_gradient, reference
from fastalign.ops.backend import load_native, use_backend
from fastalign.ops.linear_chunks import RowGrads, Rows, dlogits_
from fastalign.ops.linear_cross_entropy import linear_cross_entropy
from fastalign.ops.linear_head import Head
from fastalign.ops.linear_logp import linear_logp
from fastalign.ops.linear_loss import linear_loss
from fastalign.ops.logits import grad_rows_, logp_rows

DTYPES = [torch.float32, torch.bfloat16]
native = pytest.mark.skipif(load_native()[0] is None, reason="the native module is not built")


def inputs(rows, width, vocab, dtype, scale=1.5):
    hidden = torch.randn(rows, width, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, dtype=torch.float64) * scale * width**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,))


def nll(op, **options):
    """linear_logp, linear_loss and linear_cross_entropy as one sum of −logp."""
    return {
        "linear_logp": lambda h, w, y, bias=None: -linear_logp(h, w, y, bias=bias, **options).sum(),
        "linear_loss": lambda h, w, y, bias=None: linear_loss(h, w, y, lambda logp, _: -logp.sum(), bias=bias, **options)[0],
        "linear_cross_entropy": lambda h, w, y, bias=None: linear_cross_entropy(h, w, y, linear_bias=bias, reduction="sum", **options),
    }[op]


def oracle(hidden, weight, targets, bias=None):
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    loss = -reference.linear_logp(*wide, targets, bias=None if bias is None else bias.double()).sum()
    return loss.detach(), torch.autograd.grad(loss, wide)


def relative(found, exact):
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-12))


OPS = ["linear_logp", "linear_loss", "linear_cross_entropy"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 50257), (2, 5, 151936), (3, 1, 262144), (17, 33, 1000)])
def test_linear_ops_at_real_vocabularies_and_odd_widths(op, dtype, shape):
    hidden, weight, targets = inputs(*shape, dtype)
    targets[0] = shape[2] - 1
    loss = nll(op)(hidden, weight, targets)
    exact, exact_grads = oracle(hidden, weight, targets)
    plain = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    plain_grads = torch.autograd.grad(plain, (hidden, weight))
    eps = torch.finfo(dtype).eps
    assert abs(loss.double() - exact) <= 1.2 * abs(plain.double() - exact) + 4 * eps * abs(exact)
    for found, theirs, e in zip(torch.autograd.grad(loss, (hidden, weight)), plain_grads, exact_grads, strict=True):
        assert relative(found, e) <= 1.2 * relative(theirs, e) + 4 * eps


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_linear_ops_survive_logits_of_ten_thousand_and_minus_infinity(op, dtype, sign):
    hidden, weight, targets = inputs(6, 4, 9, dtype)
    bias = torch.zeros(9, dtype=dtype)
    bias[2], bias[5] = sign * 1e4, -math.inf
    targets[:3], targets[3:] = 2, 4
    loss = nll(op)(hidden, weight, targets, bias)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][5] == 0).all()
    exact, exact_grads = oracle(hidden, weight, targets, bias)
    assert abs(loss.double() - exact) <= (1e-6 if dtype == torch.float32 else 2**-8) * abs(exact) + 1e-3
    if dtype == torch.float32:  # one fp32 step at 1e4 is 1e-3
        assert all(relative(a, b) <= 5e-3 for a, b in zip(grads, exact_grads, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_linear_ops_target_at_minus_infinity_is_infinitely_unlikely(op):
    hidden, weight, targets = inputs(3, 4, 9, torch.float32)
    bias = torch.zeros(9)
    bias[int(targets[1])] = -math.inf
    assert float(nll(op)(hidden, weight, targets, bias).detach()) == math.inf


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_ops_non_contiguous_inputs_give_the_same_bits(op, dtype):
    hidden, weight, targets = inputs(20, 8, 33, dtype)
    strided = hidden.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()
    gaps = weight.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()
    some = targets.repeat_interleave(2)[::2]
    loss, same = nll(op)(hidden, weight, targets), nll(op)(strided, gaps, some)
    assert torch.equal(loss, same)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(same, (strided, gaps)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_linear_ops_upstream_and_two_backwards(op):
    hidden, weight, targets = inputs(7, 4, 9, torch.float64)
    _, exact = oracle(hidden, weight, targets)
    loss = nll(op)(hidden, weight, targets)
    (loss * -2.5).backward(retain_graph=True)
    loss.backward()
    for t, e in zip((hidden, weight), exact, strict=True):
        torch.testing.assert_close(t.grad, -1.5 * e)


@pytest.mark.parametrize("op", OPS)
def test_linear_ops_tied_head(op):
    _, weight, targets = inputs(12, 5, 11, torch.float64)
    tokens = torch.randint(11, (12,))
    found = torch.autograd.grad(nll(op)(torch.tanh(weight[tokens]), weight, targets), weight)[0]
    exact = torch.autograd.grad(-reference.linear_logp(torch.tanh(weight[tokens]), weight, targets).sum(), weight)[0]
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("head_dtype", [None, torch.float32])
def test_linear_ops_autocast(op, head_dtype):
    hidden, weight, targets = inputs(20, 16, 33, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nll(op, head_dtype=head_dtype)(hidden, weight, targets)
    assert torch.equal(loss, nll(op, head_dtype=head_dtype)(hidden.bfloat16(), weight.bfloat16(), targets))
    loss.backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev"])
def test_linear_ops_say_that_torch_func_is_not_supported(op, transform):
    hidden, weight, targets = inputs(4, 5, 11, torch.float32)
    h, w = hidden.detach(), weight.detach()
    run = {
        "grad": lambda: torch.func.grad(lambda x: nll(op)(x, w, targets))(h),
        "vmap": lambda: torch.func.vmap(lambda x: nll(op)(x, w, targets))(h[None]),
        "jacrev": lambda: torch.func.jacrev(lambda x: nll(op)(h, x, targets))(w),
    }[transform]
    with pytest.raises(RuntimeError, match=f"{op}: torch.func and vmap are not supported.*fastalign.ops.reference"):
        run()
    exact = torch.func.grad(lambda x: -reference.linear_logp(x, w, targets).sum())(h)  # what the message recommends
    torch.testing.assert_close(torch.autograd.grad(nll(op)(hidden, weight, targets), hidden)[0], exact)


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_kernels_index_beyond_two_to_the_31(dtype):
    """Two rows 2³¹ elements apart, in memory that is reserved and, but for them, never touched."""
    vocab, stride = 5001, 2**31 + 16
    logits = torch.empty(stride + vocab, dtype=dtype).as_strided((2, vocab), (stride, 1))
    near = (torch.randn(2, vocab) * 4).to(dtype)
    targets = torch.tensor([17, vocab - 1])
    logits.copy_(near)
    expected, got = logp_rows(near, targets, entropy=True), logp_rows(logits, targets, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    g = torch.randn(2)
    assert torch.equal(grad_rows_(near, targets, got[1], got[2], g, g), grad_rows_(logits, targets, got[1], got[2], g, g))


@native
def test_wide_product_indexes_beyond_two_to_the_31():
    x, w = torch.randn(16, 6).bfloat16(), torch.randn(70, 6).bfloat16()
    stride = 2**28 + 8  # 16 rows: the last one begins past 2³¹ elements
    out = torch.empty(15 * stride + 70, dtype=torch.float32).as_strided((16, 70), (stride, 1))
    gemm_wide.wide_product(x, w, None, out)
    assert torch.equal(out[15], gemm_wide.wide_product(x, w)[15])


@pytest.mark.parametrize("shape", [(1, 7, 3), (8, 48, 2), (17, 97, 31), (70, 1003, 48), (33, 100, 65), (1030, 70, 50), (65, 130, 97)])
@pytest.mark.parametrize("biased", [False, True])
def test_wide_product_is_as_exact_as_an_fp32_product(isa, shape, biased):
    rows, vocab, width = shape
    x, w = torch.randn(rows, width).bfloat16(), torch.randn(vocab, width).bfloat16()
    bias = torch.randn(vocab).bfloat16() if biased else None
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    plain = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    out = torch.full((rows + 1, vocab + 3), math.nan)[:rows, :vocab]
    found = gemm_wide.wide_product(x, w, bias, out)
    assert found is out
    assert relative(found, exact) <= relative(plain, exact) + 2e-7
    assert out._base[rows].isnan().all()
    assert out._base[:, vocab:].isnan().all()
    with use_backend("reference"):
        assert relative(gemm_wide.wide_product(x, w, bias), exact) <= relative(plain, exact) + 2e-7


@native
@pytest.mark.parametrize("shape", [(1, 7, 3), (8, 48, 2), (17, 97, 31), (33, 100, 65), (1030, 70, 50), (40, 300, 130)])
@pytest.mark.parametrize("first", [False, True])
def test_product_is_added_to_fp32_sums(isa, shape, first):
    rows, vocab, width = shape
    dlogits, hidden = torch.randn(rows, 2 * vocab).bfloat16()[:, :vocab], torch.randn(rows, width).bfloat16()
    before = torch.full((vocab, width), math.nan) if first else torch.randn(vocab, width)
    exact = -0.7 * dlogits.double().t() @ hidden.double() + (0 if first else before.double())
    total = before.clone()
    load_native()[0].bf16_product_columns(dlogits, hidden, total, -0.7, not first)
    assert relative(total, exact) <= 1e-6 + 2e-7 * rows**0.5


@native
def test_wide_product_of_a_row_has_its_bits_in_any_batch(isa):
    x, w = torch.randn(70, 131).bfloat16(), torch.randn(200, 131).bfloat16()
    whole = gemm_wide.wide_product(x, w)
    for first, last in [(0, gemm.MIN_ROWS), (3, 20), (40, 70)]:
        assert torch.equal(gemm_wide.wide_product(x[first:last], w), whole[first:last])


@native
def test_products_leave_those_of_torch_alone(isa):
    """The tiles' configuration is a thread's: oneDNN's kernels find theirs again."""
    x, w, total = torch.randn(64, 96).bfloat16(), torch.randn(80, 96).bfloat16(), torch.zeros(96, 96)
    before = F.linear(x, w)
    gemm_wide.wide_product(x, w)
    load_native()[0].bf16_product_columns(x, x, total, 1.0, True)
    assert torch.equal(F.linear(x, w), before)


def test_product_skips_no_nan(isa):
    """A row's NaN reaches that row's logits and no other's, also where the width is odd and pairs cross rows."""
    x, w = torch.randn(20, 7).bfloat16(), torch.randn(50, 7).bfloat16()
    x[3, 6] = math.nan
    found = gemm_wide.wide_product(x, w)
    assert found[3].isnan().all()
    assert found[[i for i in range(20) if i != 3]].isfinite().all()


def test_head_dtype_log_probs_are_those_of_an_fp32_head():
    """What bf16 logits cost at unlikely tokens, and what head_dtype gives back."""
    hidden, weight, _ = inputs(64, 64, 5003, torch.bfloat16, scale=4.0)
    hidden, weight = hidden.detach(), weight.detach()
    targets = F.linear(hidden.float(), weight.float()).argmin(1)  # logp ≈ −20
    exact = reference.linear_logp(hidden.double(), weight.double(), targets, return_entropy=True)
    plain = reference.linear_logp(hidden.float(), weight.float(), targets, return_entropy=True)
    wide = linear_logp(hidden, weight, targets, return_entropy=True, head_dtype=torch.float32)
    narrow = linear_logp(hidden, weight, targets)
    for found, theirs, e in zip(wide, plain, exact, strict=True):
        assert (found - e).abs().max() <= (theirs - e).abs().max() + 4e-6
    assert (narrow - exact[0]).abs().max() > 1e-2  # the test would see bf16 logits


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("width", [64, 33])
def test_head_dtype_gradients_are_at_least_as_exact_as_torch(op, frozen, width):
    hidden, weight, targets = inputs(40, width, 512, torch.bfloat16)
    bias = torch.randn(512).bfloat16()
    _, exact = oracle(hidden, weight, targets, bias)
    wanted = (hidden,) if frozen else (hidden, weight)
    plain = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum"), (hidden, weight))
    loss = nll(op, head_dtype=torch.float32)(hidden, weight.detach() if frozen else weight, targets, bias)
    assert loss.dtype == torch.float32
    for found, theirs, e in zip(torch.autograd.grad(loss, wanted), plain, exact, strict=False):
        assert found.dtype == torch.bfloat16
        assert relative(found, e) <= 1.2 * relative(theirs, e) + 4e-3


def test_head_dtype_entropy_gradients_and_zero_rows(backend):
    hidden, weight, targets = inputs(40, 32, 100, torch.bfloat16)
    scale = (torch.arange(40) % 3 > 0).float()  # some rows have no gradient

    def objective(logp, entropy, span):
        return ((logp.exp() + 0.3 * entropy) * scale[span].to(logp.dtype)).sum()

    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(reference.linear_loss(*wide, targets, objective, return_entropy=True), wide)
    loss, _ = linear_loss(hidden, weight, targets, objective, return_entropy=True, head_dtype=torch.float32)
    logp, entropy = linear_logp(hidden, weight, targets, return_entropy=True, head_dtype=torch.float32)
    for grads in (loss, objective(logp, entropy, slice(None))):
        found = torch.autograd.grad(grads, (hidden, weight))
        assert all(relative(a, b) <= 1e-2 for a, b in zip(found, exact, strict=True))
        assert not found[0][::3].any()


def test_head_dtype_is_bitwise_equal_in_any_batch_and_chunk(isa):
    hidden, weight, targets = (t.detach() for t in inputs(70, 47, 1003, torch.bfloat16))
    options = {"head_dtype": torch.float32, "return_entropy": True}
    whole, entropy = linear_logp(hidden, weight, targets, **options)
    for part in (slice(0, 1), slice(3, 8), slice(11, 26), slice(30, 47), slice(2, 70)):
        found = linear_logp(hidden[part], weight, targets[part], **options)
        assert torch.equal(found[0], whole[part])
        assert torch.equal(found[1], entropy[part])
    for rows in (1, 9, 23):
        limit = {"max_chunk_bytes": rows * 1003 * 4, "head_dtype": torch.float32}
        assert torch.equal(linear_loss(hidden, weight, targets, lambda logp, _: logp.sum(), **limit)[1]["logp"], whole)


@pytest.mark.parametrize("chunk_rows", [5, 64])
def test_head_dtype_main_grad_takes_the_head_gradient(chunk_rows):
    hidden, weight, targets = inputs(24, 16, 33, torch.bfloat16)
    weight.main_grad = torch.ones(33, 16)
    _, exact = oracle(hidden, weight, targets)
    options = {"max_chunk_bytes": chunk_rows * 33 * 4, "head_dtype": torch.float32}
    linear_loss(hidden, weight, targets, lambda logp, _: -logp.sum(), **options)[0].backward()
    assert weight.grad is None
    assert relative(weight.main_grad - 1, exact[1]) <= 4e-3
    assert relative(hidden.grad, exact[0]) <= 4e-3


def test_head_dtype_compiles_without_a_break():
    hidden, weight, targets = inputs(24, 16, 33, torch.bfloat16)
    for op in OPS:
        run = nll(op, head_dtype=torch.float32)
        compiled = torch.compile(lambda h, w, run=run: run(h, w, targets), fullgraph=True, backend="aot_eager")
        for a, b in zip(
            *(torch.autograd.grad(f, (hidden, weight)) for f in (run(hidden, weight, targets), compiled(hidden, weight))), strict=True
        ):
            assert torch.allclose(a, b, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_head_dtype_other_inputs(dtype):
    hidden, weight, targets = inputs(20, 16, 33, dtype)
    _, exact = oracle(hidden, weight, targets)
    loss = nll("linear_loss", head_dtype=torch.float32)(hidden, weight, targets)
    for found, e in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert found.dtype == dtype
        assert relative(found, e) <= (2e-3 if dtype == torch.float16 else 1e-6)
    if dtype != torch.float16:
        assert torch.equal(loss, nll("linear_loss")(hidden, weight, targets))


def test_head_dtype_says_what_it_takes():
    hidden, weight, targets = inputs(4, 5, 11, torch.bfloat16)
    for op in OPS:
        with pytest.raises(ValueError, match=f"{op}: head_dtype must be None .* or torch.float32, got torch.float64"):
            nll(op, head_dtype=torch.float64)(hidden, weight, targets)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 40])
def test_cuda_head_dtype_matches_fp64(width):
    hidden, weight, targets = (t.detach().cuda() for t in inputs(40, width, 5003, torch.bfloat16))
    hidden.requires_grad_(), weight.requires_grad_()
    exact, exact_grads = oracle(hidden, weight, targets)
    for op in OPS:
        loss = nll(op, head_dtype=torch.float32)(hidden, weight, targets)
        assert abs(loss.double() - exact) <= 1e-6 * abs(exact)
        for found, e in zip(torch.autograd.grad(loss, (hidden, weight)), exact_grads, strict=True):
            assert relative(found, e) <= 4e-3


def check_fp32_sums(add, device="cpu"):
    """total += alpha · aᵀ b keeps the sums of bf16 factors in fp32: no product is rounded to bf16 on the way."""
    a, b = (torch.randn(64, n, device=device).bfloat16() for n in (300, 8))
    total, exact = torch.full((300, 8), torch.nan, device=device), 0
    for first, alpha in ((True, 0.5), (False, 1.0), (False, -2.0)):
        add(total, a, b, alpha=alpha, first=first)
        exact = exact + alpha * (a.double().t() @ b.double())
        assert relative(total, exact) < 1e-5


def test_head_gradient_on_cuda_adds_blocks_of_fp32_sums(monkeypatch):
    """Its loop, over a stand-in for the GEMM that the CPU has not."""

    def mm(a, b, *, out_dtype, out=None):
        product = (a.double() @ b.double()).to(out_dtype)
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(head_gradient, "CUDA_BLOCK_BYTES", 128 * 4 * 8)
    check_fp32_sums(head_gradient._add_on_cuda_)


@pytest.mark.gpu
def test_cuda_head_gradient_is_summed_in_fp32():
    check_fp32_sums(head_gradient.add_product_, "cuda")


@pytest.mark.parametrize("vocab", [100, 98, 96, 31, 1001])
def test_wide_logits_leave_nothing_behind_their_gradient_that_a_tile_could_read(vocab, backend):
    """A gradient row lies in the first half of its fp32 logits; torch's AMX product reads past such rows, where halves may be NaN."""
    _, weight, targets = inputs(26, 32, vocab, torch.bfloat16)
    head = Head(weight.detach(), None, 1.0, None, True)
    logits = torch.full((26, vocab), -1.0)
    logits.view(torch.int32)[:, 1:].bitwise_or_(0x7FC0)  # their low halves are NaN as bf16
    assert logits.view(torch.bfloat16).isnan().any()
    lse = logits.logsumexp(1)
    half = dlogits_(head, logits, targets, Rows(lse, lse, None, lse), RowGrads(torch.ones(26)))
    behind = logits.view(torch.bfloat16)[:, vocab:]
    assert not behind[:, : -vocab % 32].any()
    assert not (half @ weight).isnan().any()
