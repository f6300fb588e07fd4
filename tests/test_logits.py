"""The row kernels against fp64: log-prob, entropy, arg-max and their gradient."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.ops.backend import load_native, use_backend
from fastalign.ops.logits import grad_rows_, logp_rows

VOCABS = [1, 2, 15, 17, 65, 1000, 4095, 4097]
DTYPES = [torch.float32, torch.bfloat16]
SETTINGS = [(1.0, None), (0.7, None), (1.0, 30.0), (1.3, 5.0)]


def softened(logits, temperature, softcap):
    z = logits.double()
    return (torch.tanh(z / softcap) * softcap if softcap else z) / temperature


def oracle(logits, targets, g_logp, g_entropy, temperature, softcap):
    """log-prob, entropy and the gradient of g_logp * logp + g_entropy * entropy, in fp64."""
    leaf = logits.double().requires_grad_()
    logp_all = softened(leaf, temperature, softcap).log_softmax(1)
    logp = logp_all.gather(1, targets[:, None]).squeeze(1)
    entropy = -(logp_all.exp() * logp_all.clamp(min=-1e9)).sum(1)
    (gradient,) = torch.autograd.grad((logp * g_logp + entropy * g_entropy).sum(), leaf)
    return logp.detach(), entropy.detach(), gradient


def random_rows(num_rows, vocab, dtype, scale=4.0):
    logits = (torch.randn(num_rows, vocab) * scale).to(dtype)
    return logits, torch.randint(0, vocab, (num_rows,))


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature, softcap", SETTINGS)
def test_logp_rows_matches_fp64(backend, vocab, dtype, temperature, softcap):
    logits, targets = random_rows(5, vocab, dtype)
    zeros = torch.zeros(5, dtype=torch.float64)
    want_logp, want_entropy, _ = oracle(logits, targets, zeros, zeros, temperature, softcap)
    z = softened(logits, temperature, softcap).float()
    torch_error = (z.log_softmax(1).gather(1, targets[:, None]).squeeze(1).double() - want_logp).abs().max()
    logp, lse, entropy, correct = logp_rows(logits, targets, temperature=temperature, logit_softcap=softcap, entropy=True)
    assert logp.dtype == lse.dtype == entropy.dtype == torch.float32
    assert (logp.double() - want_logp).abs().max() <= torch_error + 3e-6
    torch.testing.assert_close(lse.double(), softened(logits, temperature, softcap).logsumexp(1), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=2e-5, atol=2e-5)
    assert torch.equal(correct, logits.argmax(1) == targets)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature, softcap", SETTINGS)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_grad_rows_matches_fp64(backend, vocab, dtype, temperature, softcap, with_entropy):
    logits, targets = random_rows(4, vocab, dtype)
    g_logp, g_entropy = torch.randn(4), torch.randn(4) * with_entropy
    _, _, want = oracle(logits, targets, g_logp.double(), g_entropy.double(), temperature, softcap)
    _, lse, entropy, _ = logp_rows(logits, targets, temperature=temperature, logit_softcap=softcap, entropy=with_entropy)
    upstream = g_entropy if with_entropy else None
    got = grad_rows_(logits.clone(), targets, lse, entropy, g_logp, upstream, temperature=temperature, logit_softcap=softcap)
    assert got.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(backend, dtype):
    logits, targets = random_rows(7, 5003, dtype)
    g_logp, g_entropy = torch.randn(7), torch.randn(7)
    torch.set_num_threads(2)
    together = logp_rows(logits, targets, entropy=True)
    gradient = grad_rows_(logits.clone(), targets, together[1], together[2], g_logp, g_entropy)
    torch.set_num_threads(1)
    for row in range(7):
        one = slice(row, row + 1)
        alone = logp_rows(logits[one].clone(), targets[one], entropy=True)
        for ours, all_rows in zip(alone, together, strict=True):
            assert torch.equal(ours, all_rows[one])
        grad = grad_rows_(logits[one].clone(), targets[one], alone[1], alone[2], g_logp[one], g_entropy[one])
        assert torch.equal(grad, gradient[one])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1e4, -1e4, 0.0])
def test_rows_survive_large_and_infinite_logits(backend, dtype, offset):
    logits, targets = random_rows(6, 9001, dtype, scale=100.0)
    logits = logits + offset
    logits[:, 1::3] = -math.inf
    logits[1, :8000] = -math.inf
    targets = logits.float().topk(2).indices[:, 1]
    want = logits.double().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    logp, lse, entropy, _ = logp_rows(logits, targets, entropy=True)
    torch.testing.assert_close(logp.double(), want, rtol=1e-6, atol=1e-3 if backend == "reference" else 2e-5)
    assert entropy.isfinite().all()
    assert (entropy >= -1e-6).all()
    gradient = grad_rows_(logits.clone(), targets, lse, entropy, torch.ones(6), torch.ones(6))
    assert gradient.isfinite().all()
    assert (gradient[logits == -math.inf] == 0).all()


@pytest.mark.parametrize("vocab", [5, 9001])
@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_rows_give_infinite_logits_no_probability_under_a_soft_cap(backend, vocab, temperature):
    """tanh lifts -inf to -softcap, where a banned token would have a probability."""
    logits, targets = random_rows(4, vocab, torch.float32, scale=5.0)
    logits[:, 2:4], targets[0], targets[1:] = -math.inf, 2, 1
    z = (2.0 * (logits.double() / 2.0).tanh()).masked_fill(logits == -math.inf, -math.inf) / temperature
    logp, lse, entropy, _ = logp_rows(logits, targets, temperature=temperature, logit_softcap=2.0, entropy=True)
    want = z.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    assert logp[0] == -math.inf
    torch.testing.assert_close(logp.double(), want, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), torch.distributions.Categorical(logits=z).entropy(), rtol=1e-5, atol=2e-5)
    options = {"temperature": temperature, "logit_softcap": 2.0}
    gradient = grad_rows_(logits.clone(), targets[1:].new_full((4,), 1), lse, entropy, torch.ones(4), torch.ones(4), **options)
    assert (gradient[:, 2:4] == 0).all()


def test_rows_are_float32_whatever_the_default_dtype(backend):
    logits, targets = random_rows(3, 40, torch.float32)
    want = logp_rows(logits, targets, entropy=True)
    torch.set_default_dtype(torch.float64)
    try:
        found = logp_rows(logits, targets, entropy=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(ours, theirs) and ours.dtype == theirs.dtype for ours, theirs in zip(found, want, strict=True))


def test_rows_with_one_possible_token(backend):
    logits = torch.full((2, 300), -math.inf)
    logits[:, 17] = torch.tensor([3.0, -1e4])
    targets = torch.tensor([17, 5])
    logp, lse, entropy, correct = logp_rows(logits, targets, entropy=True)
    assert logp[0] == 0.0
    assert logp[1] == -math.inf
    assert entropy.tolist() == [0.0, 0.0]
    assert correct.tolist() == [True, False]
    assert (grad_rows_(logits, targets, lse, entropy, torch.ones(2), torch.ones(2))[0] == 0).all()


@pytest.mark.parametrize("where", [0, 4095, 4096, 5000])
def test_nan_logits_reach_the_log_prob(backend, where):
    logits, targets = random_rows(3, 5001, torch.float32)
    logits[1, where] = math.nan
    targets[1] = 3
    logp, lse, entropy, correct = logp_rows(logits, targets, entropy=True)
    for result in (logp, lse, entropy):
        assert result.isnan().tolist() == [False, True, False]
    assert not correct[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_correct_is_the_first_of_equal_maxima(backend, dtype):
    logits = torch.zeros(3, 9000, dtype=dtype)
    logits[:, [100, 5000]] = 2.0
    assert logp_rows(logits, torch.tensor([100, 5000, 0]))[3].tolist() == [True, False, False]


def test_grad_rows_of_a_certain_target_keeps_its_digits(backend):
    logits = torch.zeros(1, 4)
    logits[0, 2] = 12.0
    targets = torch.tensor([2])
    _, lse, _, _ = logp_rows(logits, targets)
    _, _, want = oracle(logits, targets, torch.ones(1).double(), torch.zeros(1).double(), 1.0, None)
    got = grad_rows_(logits.clone(), targets, lse, None, torch.ones(1), None)
    torch.testing.assert_close(got.double(), want, rtol=0.1, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_rows_writes_zeros_where_nothing_flows(backend, dtype):
    logits, targets = random_rows(3, 100, dtype)
    logits[1] = math.nan
    _, lse, _, _ = logp_rows(logits, targets)
    gradient = grad_rows_(logits, targets, lse, None, torch.tensor([1.0, 0.0, 1.0]), None)
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_read_a_view_and_write_nothing_beside_it(backend, dtype):
    buffer = torch.full((4, 130), math.nan, dtype=dtype)
    logits, targets = random_rows(4, 101, dtype)
    view = buffer[:, 3:104]
    view.copy_(logits)
    expected, got = logp_rows(logits, targets, entropy=True), logp_rows(view, targets, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    grad_rows_(view, targets, got[1], got[2], torch.ones(4), torch.ones(4))
    assert not view.isnan().any()
    assert buffer[:, :3].isnan().all()
    assert buffer[:, 104:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature, softcap", SETTINGS)
def test_rows_match_between_instruction_sets(isa, dtype, temperature, softcap):
    logits, targets = random_rows(3, 8205, dtype)
    g_logp, g_entropy = torch.randn(3), torch.randn(3)
    options = {"temperature": temperature, "logit_softcap": softcap}
    want_logp, want_entropy, want = oracle(logits, targets, g_logp.double(), g_entropy.double(), temperature, softcap)
    logp, lse, entropy, _ = logp_rows(logits, targets, entropy=True, **options)
    torch.testing.assert_close(logp.double(), want_logp, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=2e-6, atol=2e-6)
    got = grad_rows_(logits, targets, lse, entropy, g_logp, g_entropy, **options)
    torch.testing.assert_close(got.double(), want, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=2e-6)


def test_exp_is_within_two_ulp(isa):
    # lse = 0 and g_logp = -1 make the gradient of every element but the target's e^x itself.
    x = torch.cat((torch.linspace(-87.0, 88.3, 200_001), torch.randn(50_000) * 1e-3, torch.tensor([0.0, -0.0, -87.5, -1e30, -math.inf])))
    logits = torch.cat((torch.zeros(1), x))[None].clone()
    got = grad_rows_(logits, torch.tensor([0]), torch.zeros(1), None, -torch.ones(1), None)[0, 1:]
    want = x.double().exp()
    normal = x >= -87.0
    ulp = torch.finfo(torch.float32).eps * want[normal]
    assert ((got[normal].double() - want[normal]).abs() / ulp).max() <= 2.0
    assert (got[~normal] == 0).all()


def test_rows_say_what_is_wrong(backend):
    logits, targets = random_rows(3, 10, torch.float32)
    with pytest.raises(ValueError, match=r"\[0, vocab size 10\), got 10 at row 1"):
        logp_rows(logits, torch.tensor([0, 10, 0]))
    with pytest.raises(ValueError, match="got -100 at row 2"):
        logp_rows(logits, torch.tensor([0, 1, -100]))
    for bad in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature must be > 0 and finite"):
            logp_rows(logits, targets, temperature=bad)
    for bad in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="logit_softcap must be > 0 and finite"):
            logp_rows(logits, targets, logit_softcap=bad)
    with pytest.raises(ValueError, match="expected logits"):
        logp_rows(logits, targets[:2])
    with pytest.raises(ValueError, match="needs the rows' entropy"):
        grad_rows_(logits, targets, torch.zeros(3), None, torch.zeros(3), torch.zeros(3))


def test_rows_accept_none_at_all(backend):
    logits, targets = torch.empty(0, 10), torch.empty(0, dtype=torch.long)
    logp, lse, entropy, correct = logp_rows(logits, targets, entropy=True)
    assert logp.shape == lse.shape == entropy.shape == correct.shape == (0,)
    assert grad_rows_(logits, targets, lse, entropy, logp, entropy).shape == (0, 10)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [*VOCABS, 151936])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature, softcap", SETTINGS)
def test_cuda_rows_match_fp64(vocab, dtype, temperature, softcap):
    module, _ = load_native()
    if module is None or not module.cuda_ops:
        pytest.skip("built without CUDA kernels")
    logits, targets = (t.cuda() for t in random_rows(5, vocab, dtype))
    g_logp, g_entropy = torch.randn(5, device="cuda"), torch.randn(5, device="cuda")
    options = {"temperature": temperature, "logit_softcap": softcap}
    want_logp, want_entropy, want = oracle(logits, targets, g_logp.double(), g_entropy.double(), temperature, softcap)
    with use_backend("native"):
        logp, lse, entropy, correct = logp_rows(logits, targets, entropy=True, **options)
        got = grad_rows_(logits.clone(), targets, lse, entropy, g_logp, g_entropy, **options)
    torch.testing.assert_close(logp.double(), want_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got.double(), want, rtol=2**-8 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
    assert torch.equal(correct, logits.argmax(1) == targets)


def test_logp_rows_names_targets_in_the_other_memory():
    module = load_native()[0]
    if module is None:
        pytest.skip("the native module is not built")

    class Elsewhere:  # what the binding reads of a tensor
        is_cuda, dtype, shape = True, torch.int64, (3,)
        data_ptr, stride = (lambda _: 64), (lambda _: (1,))

    rows = [torch.empty(3), torch.empty(3), torch.empty(0), torch.empty(3, dtype=torch.bool)]
    with pytest.raises(ValueError, match="logp_rows: targets: expected a tensor on the CPU, where the logits are"):
        module.logp_rows(torch.randn(3, 7), Elsewhere(), 1.0, 0.0, *rows)
