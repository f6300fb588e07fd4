"""fp32 products on the CPU: torch's values, autograd's gradients, and one result for a row whatever the batch."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastalign.models.linear import RowLinear, use_row_linears
from fastalign.ops import gemm

onednn = pytest.mark.skipif(not gemm.AVAILABLE, reason="this build of torch has no fp32 oneDNN linear")
SHAPES = [(64, 172), (172, 64), (173, 61), (896, 500), (1376, 512), (128, 15)]


@pytest.mark.parametrize(("width", "out"), SHAPES)
def test_linear_no_worse_than_torch_and_gradients_agree(width, out):
    torch.manual_seed(width)
    x, w, b = (
        torch.randn(3, 33, width, requires_grad=True),
        torch.randn(out, width, requires_grad=True),
        torch.randn(out, requires_grad=True),
    )
    exact = F.linear(x.double(), w.double(), b.double())
    got, theirs = gemm.linear(x, w, b), F.linear(x, w, b)
    error, other = (got - exact).norm() / exact.norm(), (theirs - exact).norm() / exact.norm()
    assert error <= other + 1e-6, "both are rounding: one running sum a result here, several in MKL"
    g = torch.randn_like(got)
    for mine, other in zip(torch.autograd.grad(got, (x, w, b), g), torch.autograd.grad(theirs, (x, w, b), g), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@onednn
@pytest.mark.parametrize(("width", "out"), SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_a_row_has_the_same_bits_in_any_batch_packed_or_not(width, out, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(out)
        x, w, b = torch.randn(700, width), torch.randn(out, width), torch.randn(out)
        whole = gemm.linear(x, w.clone().requires_grad_(), b).detach()
        for rows in (2, 3, 7, 16, 31, 64, 256, 511):
            assert torch.equal(gemm.linear(x[:rows], w, b), whole[:rows])
            with gemm.packed_weights():
                assert torch.equal(gemm.linear(x[5 : 5 + rows], w, b), whole[5 : 5 + rows])
    finally:
        torch.set_num_threads(before)


@onednn
def test_packed_weights_are_dropped_at_the_end():
    x, w = torch.randn(4, 8), torch.randn(6, 8)
    with gemm.packed_weights():
        gemm.linear(x, w)
        with gemm.packed_weights():
            gemm.linear(x, w)
    w.mul_(2)
    torch.testing.assert_close(gemm.linear(x, w), F.linear(x, w))
    with gemm.packed_weights():
        torch.testing.assert_close(gemm.linear(x, w), F.linear(x, w))


def test_linear_other_inputs_take_torchs_route():
    w = torch.randn(6, 8)
    for x in (torch.randn(0, 8), torch.randn(2, 8).double(), torch.randn(2, 8).bfloat16()):
        assert torch.equal(gemm.linear(x, w.to(x.dtype)), F.linear(x, w.to(x.dtype)))
    strided = torch.randn(8, 6).t()
    assert torch.equal(gemm.linear(torch.ones(3, 8), strided), F.linear(torch.ones(3, 8), strided))
    x = torch.randn(5, 3, 8)
    assert torch.equal(torch.func.vmap(lambda row: gemm.linear(row, w))(x), F.linear(x, w))
    wide = torch.randn(4, 16)[:, ::2]
    torch.testing.assert_close(gemm.linear(wide, w), F.linear(wide, w))


def test_linear_unusual_bias_takes_torchs_route():
    x, w = torch.ones(3, 5), torch.ones(7, 5)
    strided = torch.arange(14.0)[::2]
    assert torch.equal(gemm.linear(x, w, strided), F.linear(x, w, strided))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gemm.linear(torch.ones(3, 4), w)


def test_packed_weights_are_a_threads_own():
    seen = []
    with gemm.packed_weights():
        thread = threading.Thread(target=lambda: seen.append(gemm._packing.get()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_linear_second_derivative_is_right():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    (g,) = torch.autograd.grad(gemm.linear(x, w).square().sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.sum(), w)
    (h,) = torch.autograd.grad(F.linear(x, w).square().sum(), x, create_graph=True)
    torch.testing.assert_close(gg, torch.autograd.grad(h.sum(), w)[0])


def test_use_row_linears_keeps_parameters_and_subclasses():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 3), Special(3, 2))
    names = list(model.state_dict())
    use_row_linears(model)
    assert type(model[0]) is RowLinear
    assert type(model[1]) is Special
    assert list(model.state_dict()) == names


@onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_kept_until_the_weight_changes(dtype):
    packs, x, w = gemm.PackedWeights(), torch.randn(4, 64).to(dtype), torch.randn(48, 64).to(dtype)

    def product():
        with torch.no_grad(), packs.active():
            return gemm.linear(x, w), packs.of(w)

    first, again = product(), product()
    assert first[1] is again[1]
    if first[1] is None:
        pytest.skip(f"nothing is packed in {dtype} on this CPU")
    w.mul_(2)
    changed = product()
    assert changed[1] is not again[1]
    torch.testing.assert_close(changed[0], 2 * first[0])
    w.data[0] = 0  # unseen by the version counter
    packs.clear()
    assert torch.equal(product()[0], gemm.linear(x, w))


@onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "out"), [(512, 512), (1408, 512), (64, 172), (173, 61)])
def test_packed_bf16_has_the_bits_of_the_dense_product(width, out, bias):
    torch.manual_seed(width)
    x, w = torch.randn(600, width).bfloat16(), torch.randn(out, width).bfloat16()
    b = torch.randn(out).bfloat16() if bias else None
    whole, packs, counts = gemm.linear(x, w, b), gemm.PackedWeights(), (2, 3, 7, 16, 31, 64, 256, 511)
    if not all(torch.equal(F.linear(x[5 : 5 + rows], w, b), whole[5 : 5 + rows]) for rows in counts):
        pytest.skip("on this CPU a row of torch's own bf16 product depends on the others (AMX)")
    for rows in counts:
        with torch.no_grad(), packs.active():
            assert torch.equal(gemm.linear(x[5 : 5 + rows], w, b), whole[5 : 5 + rows])


@onednn
def test_packed_bf16_leaves_a_gradient_to_torch_and_a_shape_that_differs(monkeypatch):
    monkeypatch.setattr(gemm, "native_products", lambda dtype: None)
    x, w = torch.randn(4, 64).bfloat16(), torch.randn(48, 64).bfloat16().requires_grad_()
    with gemm.PackedWeights().active():
        gemm.linear(x, w).sum().backward()
        assert w.grad is not None
    monkeypatch.setattr(gemm, "_exact", {})
    monkeypatch.setattr(gemm, "_packs_exactly", lambda weight, packed: False)
    packs = gemm.PackedWeights()
    with torch.no_grad(), packs.active():
        assert gemm.packed_product(x, w) is None, "nor where oneDNN cannot pack bf16 at all: AVX2 alone"
        assert torch.equal(gemm.linear(x, w), F.linear(x, w))
