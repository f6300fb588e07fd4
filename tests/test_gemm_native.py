"""Our matrix product: fp64's values, one result for a row in any batch, packed or not, and torch's gradients where torch is slow."""

import pytest
import torch
from torch.nn import functional as F

from fastalign.ops import gemm, gemm_native
from fastalign.ops.backend import load_native
from fastalign.ops.linear_loss import linear_loss

# the borders of tiles (6 rows, 16 columns), of blocks (96 rows, 512 columns, 512 deep) and of what is packed at once (1,536)
SHAPES = [(1, 1, 1), (1, 5, 7), (2, 33, 513), (6, 16, 8), (7, 100, 1024), (97, 515, 1376), (513, 40, 77), (1600, 17, 9), (5, 3100, 30)]
SHAPES += [(1550, 40, 1030), (50, 1560, 1030)]  # passes over k, two of them in the same half of what is packed
DTYPES = [torch.float32, torch.bfloat16]


def layouts(m, n, k, dtype):
    """a [m, k] and b [k, n] with k or the other dimension contiguous, and as every other column of something larger."""
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    yield from ((x, y) for x in (a, a.t().contiguous().t()) for y in (b, b.t().contiguous().t()))
    yield torch.stack([a, a.new_full(a.shape, torch.nan)], 2)[:, :, 0], torch.stack([b.new_full(b.shape, torch.nan), b], 2)[:, :, 1]


def times(module, a, b, **options):
    out = torch.full((a.shape[0], b.shape[1]), torch.nan)
    gemm_native.add_(module, out, a, b, first=True, **options)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_has_fp64s_values_and_a_rows_bits_are_its_own(isa, shape, dtype):
    module = load_native()[0]
    for a, b in layouts(*shape, dtype):
        exact, bias = a.double() @ b.double(), torch.randn(shape[1])
        scale = a.double().abs() @ b.double().abs()
        got = times(module, a, b)
        theirs = ((a.float() @ b.float()) - exact).abs() / scale
        assert ((got - exact).abs() / scale).max() <= theirs.max() + 1e-6
        rows = slice(shape[0] // 2, shape[0] // 2 + 1)
        assert torch.equal(times(module, a[rows], b), got[rows]), "one row, as among the others"
        total = torch.ones(shape[0], 2 * shape[1])[:, : shape[1]]
        gemm_native.add_(module, total, a, b, alpha=-0.5, bias=bias)
        torch.testing.assert_close(total, (1 - 0.5 * (exact + bias)).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_packed_has_the_dense_bits_whatever_the_threads(isa, dtype):
    module = load_native()[0]
    x, w, b = torch.randn(130, 700).to(dtype), torch.randn(333, 700).to(dtype), torch.randn(333)
    dense = gemm_native.multiply(module, x, w, b)
    packed = gemm_native.pack(module, w)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(gemm_native.multiply(module, x, w, b), dense)
        for rows in (1, 2, 5, 64):
            assert torch.equal(gemm_native.product_with(module, packed, 333, dtype)(x[:rows], b), dense[:rows])
        assert torch.equal(gemm_native.product_with(module, packed, 333, dtype)(x.view(10, 13, 700), b).view(130, 333), dense)
    with pytest.raises(ValueError, match="gemm: packed: expected"):
        gemm_native.product_with(module, packed, 999, dtype)(x, b)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 7), (130, 129), (3, 9000)])
def test_a_bf16_part_is_added_to_fp32_sums_once_rounded(isa, shape):
    module, total = load_native()[0], torch.randn(shape)
    part = (3 * torch.randn(shape)).bfloat16()
    before = total.clone()
    module.add_widened(total, part, -0.25)
    exact = before.double() - 0.25 * part.double()
    torch.testing.assert_close(total.double(), exact, rtol=2**-23, atol=0)
    for wrong in (part.float(), part.t() if min(shape) > 1 else part[:, :0]):
        if wrong.shape != part.shape or wrong.dtype != part.dtype:
            with pytest.raises(ValueError, match="add_widened: "):
                module.add_widened(total, wrong, 1.0)


def test_gemm_of_nothing(isa):
    module = load_native()[0]
    assert not times(module, torch.randn(3, 0), torch.randn(0, 4)).any()
    assert times(module, torch.randn(0, 5), torch.randn(5, 4)).shape == (0, 4)
    assert times(module, torch.randn(2, 5), torch.randn(5, 0)).shape == (2, 0)


def test_gemm_keeps_nan_and_infinity(isa):
    a, b = torch.ones(9, 20), torch.ones(20, 30)
    a[4, 3], a[6, 2], b[5, 7] = torch.nan, torch.inf, -torch.inf
    got, exact = times(load_native()[0], a, b), a @ b
    assert torch.equal(got.isnan(), exact.isnan())
    torch.testing.assert_close(got.nan_to_num(), exact.nan_to_num())


@pytest.mark.parametrize(
    ("a", "b", "out", "words"),
    [
        (torch.ones(2, 3).double(), torch.ones(3, 4), torch.ones(2, 4), "expected float32 or bfloat16"),
        (torch.ones(2, 3), torch.ones(5, 4), torch.ones(2, 4), r"expected float32 \[3, \*\]"),
        (torch.ones(2, 3), torch.ones(3, 4).bfloat16(), torch.ones(2, 4), "got bfloat16"),
        (torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 5), r"expected float32 \[2, 4\]"),
        (torch.ones(2, 3), torch.ones(3, 4), torch.ones(4, 2).t(), "contiguous rows"),
    ],
)
def test_gemm_says_what_does_not_fit(isa, a, b, out, words):
    with pytest.raises(ValueError, match=words):
        gemm_native.add_(load_native()[0], out, a, b)


@pytest.fixture
def in_use(isa):
    """The native module, where its products are the ones that linear layers take."""
    module = gemm_native.native_products(torch.bfloat16)
    if module is None:
        pytest.skip(f"with {isa} linear layers take torch's products")
    return module


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_linear_no_worse_than_torch_in_value_and_gradients(in_use, bias):
    x, w = torch.randn(3, 21, 96).bfloat16().requires_grad_(), torch.randn(50, 96).bfloat16().requires_grad_()
    b = torch.randn(50).bfloat16().requires_grad_() if bias else None
    leaves = [t for t in (x, w, b) if t is not None]
    g = torch.randn(3, 21, 50).bfloat16()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = F.linear(*wide)
    wanted = torch.autograd.grad(exact, wide, g.double())
    for ours, theirs, right in zip(
        (gemm.linear(x, w, b), *torch.autograd.grad(gemm.linear(x, w, b), leaves, g)),
        (F.linear(x, w, b), *torch.autograd.grad(F.linear(x, w, b), leaves, g)),
        (exact, *wanted),
        strict=True,
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours - right).norm() <= 1.01 * (theirs - right).norm() + 1e-6 * right.norm()


def test_bf16_head_gradient_is_summed_in_fp32(in_use):
    hidden, weight = torch.randn(300, 64).bfloat16().requires_grad_(), torch.randn(500, 64).bfloat16().requires_grad_()
    weight.main_grad = torch.zeros(500, 64)
    targets = torch.randint(0, 500, (300,))
    loss, _ = linear_loss(hidden, weight, targets, lambda logp, span: -logp.sum() / 300, max_chunk_bytes=64 * 500 * 2)
    loss.backward()
    wide = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.detach().double() @ wide.t(), targets).backward()
    plain = weight.detach().clone().requires_grad_()
    F.cross_entropy((hidden.detach() @ plain.t()).float(), targets).backward()
    assert (weight.main_grad - wide.grad).norm() <= (plain.grad - wide.grad).norm()


def test_native_products_are_taken_where_they_are_the_faster_or_the_exact_ones(isa):
    assert (gemm_native.native_products(torch.float32) is not None) == (isa in ("avx2", "avx512"))
    assert (gemm_native.native_products(torch.bfloat16) is not None) == (isa in ("avx2", "amx"))
    assert gemm_native.native_products(torch.float64) is None


@pytest.mark.parametrize("shape", [(3, 50, 100), (70, 33, 1000), (40, 20, 9000), (300, 65, 129)])
def test_bf16_results_are_fp32_ones_rounded_once_and_a_rows_bits_are_its_own(isa, shape):
    rows, columns, depth = shape
    module = load_native()[0]
    a, b, bias = torch.randn(rows, depth).bfloat16(), torch.randn(depth, columns).bfloat16(), torch.randn(columns)
    got = gemm_native.product(module, a, b, bias)
    sums = times(module, a, b, bias=bias)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), sums, rtol=2**-8, atol=1e-4)
    if depth <= 1024:
        assert torch.equal(got, sums.bfloat16()), "one rounding"
    assert torch.equal(gemm_native.product(module, a[1:3], b, bias), got[1:3])
    packed = gemm_native.pack(module, b.t().contiguous())
    assert torch.equal(gemm_native.product_with(module, packed, columns, a.dtype)(a, bias), got)


@pytest.mark.parametrize("rows", [1, 2, 17, 300])
def test_linear_has_a_rows_bits_in_any_batch_dense_and_packed(in_use, rows):
    """What the sampler's log-probs being the trainer's rests on; torch's product has other bits from 256 rows on with AMX."""
    x, w = torch.randn(600, 96).bfloat16(), torch.randn(80, 96).bfloat16()
    whole = gemm.linear(x, w)
    assert torch.equal(gemm.linear(x[:rows], w), whole[:rows])
    with torch.no_grad(), gemm.packed_weights():
        assert torch.equal(gemm.linear(x[:rows], w), whole[:rows])
    assert torch.equal(gemm.linear(x[:rows].requires_grad_(), w), whole[:rows])
