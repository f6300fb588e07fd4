"""linear_logp's Triton row kernels, interpreted on CPU tensors: the row tests of every backend, and the public ops over them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

import test_linear_cross_entropy as cross_entropy
import test_linear_logp as linear_logp
import test_linear_loss as linear_loss
import test_logits
from test_logits import (  # noqa: F401  (collected here a second time, over the fixture below)
    test_correct_is_the_first_of_equal_maxima,
    test_grad_rows_of_a_certain_target_keeps_its_digits,
    test_grad_rows_writes_zeros_where_nothing_flows,
    test_nan_logits_reach_the_log_prob,
    test_rows_do_not_depend_on_each_other,
    test_rows_read_a_view_and_write_nothing_beside_it,
    test_rows_survive_large_and_infinite_logits,
    test_rows_with_one_possible_token,
)

from fastalign.ops import reference
from fastalign.ops.backend import backend_for, load_triton, use_backend
from fastalign.ops.logits import grad_rows_, logp_rows

DTYPES = [torch.float32, torch.bfloat16]
# NaN and infinite logits are part of the tests; numpy says so.
pytestmark = [pytest.mark.usefixtures("rounding_interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(autouse=True, params=["triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything in this file runs on the Triton kernels."""
    with use_backend(request.param):
        assert backend_for("linear_logp") == "triton"
        yield request.param


@pytest.mark.parametrize("vocab", [1, 17, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", [(1.0, None), (1.3, 5.0)])
def test_triton_logp_rows_match_fp64(vocab, dtype, setting):
    test_logits.test_logp_rows_matches_fp64("triton", vocab, dtype, *setting)


@pytest.mark.parametrize("vocab", [1, 17, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", [(0.7, None), (1.0, 30.0)])
@pytest.mark.parametrize("entropy", [False, True])
def test_triton_grad_rows_match_fp64(vocab, dtype, setting, entropy):
    test_logits.test_grad_rows_matches_fp64("triton", vocab, dtype, *setting, entropy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 7), (17, 31, 97)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "logit_softcap": 4.0}])
def test_triton_linear_logp_is_at_least_as_exact_as_torch(shape, dtype, options):
    linear_logp.test_linear_logp_is_at_least_as_exact_as_torch(shape, dtype, options)


@pytest.mark.parametrize("frozen", [False, True])
def test_triton_linear_logp_ignored_rows_and_large_logits(frozen):
    linear_logp.test_linear_logp_ignored_rows_cost_and_add_nothing(frozen)
    linear_logp.test_linear_logp_all_ignored_or_empty_has_zero_gradients(torch.empty(0, dtype=torch.int64), frozen)
    linear_logp.test_linear_logp_logits_of_ten_thousand(1 if frozen else -1)


def test_triton_linear_logp_is_bitwise_equal_in_any_batch(monkeypatch):
    linear_logp.test_linear_logp_is_bitwise_equal_in_any_batch(torch.float32, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_triton_linear_loss_is_at_least_as_exact_as_torch(dtype, frozen):
    linear_loss.test_linear_loss_is_at_least_as_exact_as_torch(dtype, frozen)


def test_triton_linear_loss_skips_and_marks_rows():
    linear_loss.test_linear_loss_nan_logits_give_a_nan_loss()
    linear_loss.test_linear_loss_of_no_rows_is_zero_with_a_gradient()


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_linear_cross_entropy_is_at_least_as_exact_as_torch(dtype):
    cross_entropy.test_linear_cross_entropy_is_at_least_as_exact_as_torch(dtype, {"label_smoothing": 0.1, "z_loss": 1e-3})


@pytest.mark.parametrize("options", [{}, {"temperature": 1.4}, {"logit_softcap": 3.0}])
@pytest.mark.parametrize("frozen", [False, True])
def test_triton_linear_logp_gradients_against_the_fp64_reference(options, frozen):
    """gradcheck needs fp64, which the kernels do not take: the fp64 reference's own gradients, at fp32 accuracy."""
    hidden, weight, targets = linear_logp.inputs(9, 6, 300, torch.float32, seed=3)
    weight = weight.detach() if frozen else weight
    bias = torch.randn(300, requires_grad=not frozen)
    targets[4] = -100
    inputs = [t for t in (hidden, weight, bias) if t.requires_grad]
    wide = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight, bias)}
    upstream = torch.randn(2, 9)

    def gradients(op, h, w, b, over):
        found = op(h, w, targets, bias=b, return_entropy=True, **options)
        return torch.autograd.grad(sum((f * u.to(f.dtype)).sum() for f, u in zip(found, upstream, strict=True)), over)

    exact = gradients(reference.linear_logp, *(wide[id(t)] for t in (hidden, weight, bias)), [wide[id(t)] for t in inputs])
    ours = gradients(linear_logp.linear_logp, hidden, weight, bias, inputs)
    for got, want in zip(ours, exact, strict=True):
        assert (got.double() - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [16, 8192])
def test_triton_rows_in_whole_packs_give_what_loose_rows_give(dtype, vocab):
    """Both ways of loading a row: aligned, in packs, and at an odd address, one by one."""
    kernels = load_triton("linear_logp")
    logits, targets = test_logits.random_rows(3, vocab, dtype)
    buffer = torch.full((3, vocab + 5), math.nan, dtype=dtype)
    loose = buffer[:, 1 : 1 + vocab]
    loose.copy_(logits)
    assert kernels.layout_of("test", logits)["ALIGNED"]
    assert not kernels.layout_of("test", loose)["ALIGNED"]
    g_logp, g_entropy = torch.randn(2, 3)
    want, got = logp_rows(logits, targets, entropy=True), logp_rows(loose, targets, entropy=True)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-6, atol=1e-6)
    grad_rows_(loose, targets, want[1], want[2], g_logp, g_entropy)
    assert torch.equal(grad_rows_(logits, targets, want[1], want[2], g_logp, g_entropy), loose)
    assert buffer[:, 0].isnan().all()
    assert buffer[:, 1 + vocab :].isnan().all()


def test_triton_rows_name_a_bad_target():
    logits, targets = test_logits.random_rows(3, 12, torch.float32)
    targets[1] = 12
    with pytest.raises(ValueError, match=r"vocab size 12\), got 12 at row 1"):
        logp_rows(logits, targets)


def test_triton_rows_outside_the_vocabulary_are_nan():
    """On a GPU nobody looks at the targets first: loud, and in bounds."""
    logits = torch.zeros(1, 64)
    logp, lse, entropy = torch.zeros(3, 1)
    correct = torch.ones(1, dtype=torch.bool)
    load_triton("linear_logp").logp_rows(logits, torch.tensor([64]), 1.0, 0.0, logp, lse, entropy, correct)
    assert logp.isnan()
    assert not correct
    assert lse == pytest.approx(math.log(64))
