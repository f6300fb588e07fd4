"""The policy op against its torch equations: loss, gradients and sums for every row and option, edges, compilation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

from fastalign.losses.policy import CORRECTIONS, KL, POLICY, PolicyLoss
from fastalign.ops.backend import load_native, use_backend
from fastalign.ops.linear_loss import linear_loss
from fastalign.ops.policy import PolicyOptions, policy_loss, policy_op
from fastalign.ops.policy_equations import Kernel

LENGTHS = [3, 0, 70, 1, 33, 0, 500]
NAMED = {  # every option of every row at least once
    "clip": [{}, {"epsilon": 0.1, "epsilon_high": 0.3}, {"dual_clip": 1.3}],
    "gspo": [{"epsilon": 0.02, "epsilon_high": 0.03}],
    "gspo_token": [{"epsilon": 0.02, "epsilon_high": 0.03}],
    "cispo": [{}, {"epsilon": 0.1, "epsilon_high": None}],
    "sapo": [{}, {"tau_positive": 0.5, "tau_negative": 2.0}],
    "gmpo": [{}, {"epsilon": 0.1}],
    "raft_pp": [{"epsilon": 0.1, "epsilon_high": 0.2}],
}
ROWS = [(name, options) for name in POLICY for options in NAMED.get(name, [{}])]


needs_native = pytest.mark.skipif(load_native()[0] is None, reason="the native module is not built")


@pytest.fixture(params=["native", "triton"])
def kernel(request):
    """Each backend that has kernels of its own."""
    if request.param == "native" and load_native()[0] is None:
        pytest.skip("the native module is not built")
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def inputs_of(lengths=LENGTHS, dtype=torch.float32, device="cpu", spread=0.4):
    n = sum(lengths)
    old = -3 * torch.rand(n, dtype=dtype)
    found = {
        "logp": old + spread * torch.randn(n, dtype=dtype),
        "old_logp": old,
        "advantages": torch.randn(n, dtype=dtype) * (torch.rand(n) > 0.2),
        "weights": torch.rand(n, dtype=dtype) / max(n, 1),
        "ref_logp": old + 0.3 * torch.randn(n, dtype=dtype),
        "sampler_logp": old + 0.4 * torch.randn(n, dtype=dtype),
        "entropy": torch.rand(n, dtype=dtype),
    }
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {name: value.to(device) for name, value in found.items()} | {"cu_targets": cu}


def run(backend, inputs, name, loss_options, options, upstream=1.0):
    """(loss, dlogp, dentropy, sums) of one backend."""
    own = {"logp": inputs["logp"].clone().requires_grad_(), "entropy": inputs["entropy"].clone().requires_grad_()}
    with use_backend(backend):
        loss, sums = policy_loss(**(inputs | own), loss=name, options=options, **loss_options)
        (loss * upstream).backward()
    assert not any(value.requires_grad for value in sums.values())
    return loss.detach(), own["logp"].grad, own["entropy"].grad, sums


def assert_agree(ours, theirs, tolerance):
    assert (ours[0] - theirs[0]).abs() <= tolerance * max(1.0, float(theirs[0].abs()))
    for got, expected in zip(ours[1:3], theirs[1:3], strict=True):
        if expected is not None:
            assert (got - expected).norm() <= tolerance * expected.norm() + 1e-30
            assert (got - expected).abs().max() <= 4 * tolerance * expected.abs().max()
    assert ours[3].keys() == theirs[3].keys()
    for name, expected in theirs[3].items():
        assert abs(float(ours[3][name] - expected)) <= tolerance * max(1.0, float(expected.abs())), name


@pytest.mark.parametrize("name, loss_options", ROWS)
def test_policy_equals_the_equations(kernel, name, loss_options):
    dtypes = [torch.float32, torch.float64] if kernel == "native" else [torch.float32]
    pairs = list(itertools.product(KL, CORRECTIONS))
    for dtype, (kl, correction) in itertools.product(dtypes, pairs if kernel == "native" else pairs[:: len(KL) + 1]):
        inputs = inputs_of(dtype=dtype)
        options = PolicyOptions(kl, 0.1, 0.01, correction, 0.7, 1.5)
        ours, theirs = (run(b, inputs, name, loss_options, options, upstream=-0.7) for b in (kernel, "reference"))
        assert theirs[1].norm() > 0
        assert_agree(ours, theirs, {torch.float64: 1e-12, torch.float32: 1e-6 if kernel == "native" else 2e-6}[dtype])


@pytest.mark.parametrize("name, loss_options", ROWS)
def test_policy_alone_equals_the_equations_on_every_instruction_set(isa, name, loss_options):
    inputs = inputs_of()
    bare = {key: inputs[key] for key in ("logp", "old_logp", "advantages", "weights", "cu_targets")}
    found = []
    for backend in ("native", "reference"):
        leaf = bare["logp"].clone().requires_grad_()
        with use_backend(backend):
            loss, sums = policy_loss(**(bare | {"logp": leaf}), loss=name, **loss_options)
        loss.backward()
        found.append((loss.detach(), leaf.grad, None, sums))
    assert set(found[0][3]) == {"clip_low", "clip_high", "ratio", "approx_kl"}
    assert_agree(*found, 2e-6)


@pytest.mark.parametrize("name, loss_options", [row for row in ROWS if row[0] not in ("cispo", "gspo_token")])  # these two detach
@pytest.mark.parametrize("kl", KL)
def test_policy_gradcheck(backend, name, loss_options, kl):
    inputs = inputs_of([4, 0, 3, 1], torch.float64)
    options = PolicyOptions(kl, 0.3, 0.1, "truncate")

    def loss(logp, entropy):
        return policy_loss(**(inputs | {"logp": logp, "entropy": entropy}), loss=name, options=options, **loss_options)[0]

    assert gradcheck(loss, (inputs["logp"].requires_grad_(), inputs["entropy"].requires_grad_()))


def test_policy_sums_mean_what_they_say(backend):
    old = torch.zeros(6)
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0, 0.1])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0])
    loss, sums = policy_loss(logp, old, advantages, torch.full((6,), 0.5), epsilon=0.2)
    assert float(sums["clip_high"]) == 1.0, "ratio above the range with A > 0"
    assert float(sums["clip_low"]) == 1.0, "ratio below the range with A < 0"
    assert math.isclose(float(sums["ratio"]), float(logp.double().exp().sum()), rel_tol=1e-6)
    assert math.isclose(float(sums["approx_kl"]), float(0.5 * logp.double().square().sum()), rel_tol=1e-6)
    r = logp.double().exp()
    expected = 0.5 * (-1.2 + r[1] - r[2] + 0.8 - r[4] - r[5])
    assert math.isclose(float(loss), float(expected), rel_tol=1e-6)


def test_policy_without_old_logp_is_on_policy(backend):
    inputs = inputs_of()
    logp = inputs["logp"].requires_grad_()
    loss, sums = policy_loss(logp, None, inputs["advantages"], inputs["weights"])
    loss.backward()
    torch.testing.assert_close(logp.grad, -inputs["advantages"] * inputs["weights"])
    assert float(sums["ratio"]) == len(logp)
    assert float(sums["approx_kl"]) == 0


def test_policy_correction_weighs_the_loss_and_not_the_kl(backend):
    old, sampler = torch.zeros(3), torch.tensor([0.0, -math.log(3), math.log(4)])  # ratios 1, 3, 1/4
    rest = {"advantages": torch.ones(3), "weights": torch.ones(3), "sampler_logp": sampler, "ref_logp": torch.full((3,), -0.5)}
    for correction, expected in (("truncate", [1.0, 2.0, 0.25]), ("mask", [1.0, 0.0, 0.0]), ("none", [1.0, 1.0, 1.0])):
        logp = torch.zeros(3, requires_grad=True)
        policy_loss(logp, old, **rest, options=PolicyOptions("k1", 0.1, correction=correction))[0].backward()
        torch.testing.assert_close(logp.grad, 0.1 - torch.tensor(expected))
    logp = torch.zeros(3, requires_grad=True)
    options = PolicyOptions("k1", correction="sequence_truncate")
    policy_loss(logp, old, **rest, cu_targets=torch.tensor([0, 2, 3]), options=options)[0].backward()
    torch.testing.assert_close(logp.grad, -torch.tensor([2.0, 2.0, 0.25]))


@pytest.mark.parametrize("side", ["reference", "native", "triton"])
@pytest.mark.parametrize("name, loss_options", ROWS)
def test_policy_survives_ratios_that_overflow(side, name, loss_options):
    if side == "triton":
        pytest.importorskip("triton")
    old = torch.tensor([-101.0, -101.0, -1.0, -1.0, -1.0, -1.0])
    logp = torch.tensor([-1.0, -1.0, -200.0, -200.0, -math.inf, -0.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0])
    inputs = {"logp": logp, "old_logp": old, "advantages": advantages, "weights": torch.full((6,), 1 / 6)}
    inputs |= {"ref_logp": old, "sampler_logp": old, "entropy": torch.ones(6), "cu_targets": torch.arange(7)}
    loss, grad, _, sums = run(side, inputs, name, loss_options, PolicyOptions("k3", 0.0, 0.0, "truncate"))
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert (grad[4:] == 0).all(), "an advantage of zero has no gradient, whatever the ratio"
    assert all(value.isfinite() for key, value in sums.items() if key != "kl")
    with_kl = run(
        side,
        {key: value[:4] if key != "cu_targets" else value[:5] for key, value in inputs.items()},
        name,
        loss_options,
        PolicyOptions("k3", 0.1),
    )
    assert with_kl[0].isfinite()
    assert with_kl[1].isfinite().all()


@pytest.mark.parametrize("side", ["reference", "native", "triton"])
@pytest.mark.parametrize("name", POLICY)
def test_policy_gives_exact_zeros(side, name):
    if side == "triton":
        pytest.importorskip("triton")
    inputs = inputs_of()
    cu = inputs["cu_targets"].tolist()
    inputs["advantages"][cu[2] : cu[3]] = 0  # one whole sequence, so that a sequence's ratio has none either
    inputs["weights"][cu[4] : cu[5]] = 0
    inputs["ref_logp"][cu[4]] = -math.inf  # k1 and its loss are infinite there: a weight of zero keeps them out
    _, grad, _, _ = run(side, inputs, name, {}, PolicyOptions("k1", 0.0))
    assert (grad[cu[2] : cu[3]] == 0).all()
    loss, grad, d_entropy, _ = run(side, inputs, name, {}, PolicyOptions("k1", 0.1, 0.1))
    assert (grad[cu[4] : cu[5]] == 0).all()
    assert (d_entropy[cu[4] : cu[5]] == 0).all()
    assert loss.isfinite()
    assert (grad != 0).any()


@pytest.mark.parametrize("side", ["reference", "native", "triton"])
def test_policy_shows_nan(side):
    if side == "triton":
        pytest.importorskip("triton")
    inputs = inputs_of([5, 3])
    inputs["logp"][2] = math.nan
    for name in POLICY:
        inputs["advantages"][:] = 1.0
        loss, grad, _, _ = run(side, inputs, name, {}, PolicyOptions())
        assert loss.isnan(), name
        assert side == "reference" or name in ("reinforce", "raft", "self_imitation") or grad[2].isnan(), name
        assert POLICY[name].unit == "sequence" or grad[5:].isfinite().all(), name


@pytest.mark.parametrize("side", ["reference", "native", "triton"])
@pytest.mark.parametrize("name", POLICY)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_policy_of_no_tokens(side, name, lengths):
    if side == "triton":
        pytest.importorskip("triton")
    loss, grad, _, sums = run(side, inputs_of(lengths), name, {}, PolicyOptions("k3", 0.1, 0.1, "sequence_mask"))
    assert float(loss) == 0
    assert grad.shape == (0,)
    assert all(float(value) == 0 for value in sums.values())


@needs_native
def test_policy_does_not_depend_on_threads():
    inputs = inputs_of([3000, 1, 5000, 2500])
    for name in ("clip", "gspo"):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(run("native", inputs, name, {}, PolicyOptions("k3", 0.1, 0.1, "sequence_truncate")))
        assert all(torch.equal(a, b) for a, b in zip(found[0][:3], found[1][:3], strict=True))
        assert all(torch.equal(value, found[1][3][key]) for key, value in found[0][3].items())


def test_policy_writes_all_of_its_outputs(kernel):
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        for name in POLICY:
            loss, grad, _, sums = run(kernel, inputs_of(), name, {}, PolicyOptions("k3", 0.1, 0.1, "mask"))
            assert loss.isfinite()
            assert grad.isfinite().all()
            assert all(value.isfinite() for value in sums.values())
    finally:
        torch.use_deterministic_algorithms(False)


def test_policy_reads_strided_inputs(kernel):
    wide = {key: torch.stack([value, value + 1], 1) for key, value in inputs_of().items() if key != "cu_targets"}
    strided = {key: value[:, 0] for key, value in wide.items()} | {"cu_targets": inputs_of()["cu_targets"].long()}
    dense = {key: value.contiguous() for key, value in strided.items()}
    found = [run(kernel, given, "gspo", {}, PolicyOptions("k3", 0.1)) for given in (strided, dense)]
    assert torch.equal(found[0][1], found[1][1])


def test_policy_row_without_a_kernel_runs_its_equation(backend, monkeypatch):
    def squared(logp, old_logp, advantages, cu_targets, *, scale: float = 1.0):
        return scale * advantages * (logp - old_logp).square()

    monkeypatch.setitem(POLICY, "squared", PolicyLoss(squared))
    inputs = inputs_of()
    logp = inputs["logp"].requires_grad_()
    loss, sums = policy_loss(logp, inputs["old_logp"], inputs["advantages"], inputs["weights"], loss="squared", scale=3.0)
    loss.backward()
    expected = 6 * inputs["advantages"] * inputs["weights"] * (logp - inputs["old_logp"])
    torch.testing.assert_close(logp.grad, expected)
    assert float(sums["clip_low"]) == float(sums["clip_high"]) == 0


def test_policy_rows_of_kernels_know_their_options():
    for name, row in POLICY.items():
        assert row.kernel is not None, name
        defaults = row.function.__kwdefaults__ or {}
        assert isinstance(row.kernel(**defaults), Kernel), name


def test_policy_second_derivative_raises(kernel):
    inputs = inputs_of()
    logp = inputs["logp"].requires_grad_()
    with use_backend(kernel):
        loss, _ = policy_loss(logp, inputs["old_logp"], inputs["advantages"], inputs["weights"])
        (gradient,) = torch.autograd.grad(loss, logp, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated only once"):
            gradient.sum().backward()


def test_policy_backward_twice_with_a_retained_graph(kernel):
    inputs = inputs_of()
    logp = inputs["logp"].requires_grad_()
    with use_backend(kernel):
        loss, _ = policy_loss(logp, inputs["old_logp"], inputs["advantages"], inputs["weights"])
        loss.backward(retain_graph=True)
        once = logp.grad.clone()
        loss.backward()
    torch.testing.assert_close(logp.grad, 2 * once)


@pytest.mark.parametrize("side, name", [*(("native", name) for name in POLICY), ("reference", "clip"), ("reference", "gmpo")])
def test_policy_compiles_in_one_graph(side, name):
    use_backend(side)
    inputs = inputs_of()
    options = PolicyOptions("k3", 0.1, 0.01, "sequence_truncate")
    torch.compiler.reset()

    def loss(logp, entropy):
        value, sums = policy_loss(**(inputs | {"logp": logp, "entropy": entropy}), loss=name, options=options)
        return value, sums["kl"]

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [inputs[key].clone().requires_grad_() for key in ("logp", "entropy")]
        value, kl = function(*leaves)
        (2 * value).backward()
        found.append((value.detach(), kl.detach(), *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@needs_native
def test_policy_op_is_sound():
    inputs = inputs_of([4, 0, 3])
    order = ("logp", "old_logp", "advantages", "weights", "ref_logp", "sampler_logp", "entropy", "cu_targets")
    numbers = [0.8, 1.2, 0.0, 1.0, 1.0, 0.4, 0.1, 0.1, 0.5, 2.0]
    with use_backend("native"):
        torch.library.opcheck(policy_op, (*(inputs[name] for name in order), [1, 0, 3, 1], numbers))


def test_policy_inside_a_compiled_linear_loss(backend):
    inputs = inputs_of([6, 5])
    hidden, weight, targets = torch.randn(11, 8), torch.randn(30, 8), torch.randint(30, (11,))
    units = inputs["cu_targets"]
    torch.compiler.reset()

    def objective(logp, span):
        own = {key: inputs[key][span] for key in ("old_logp", "advantages", "weights")}
        return policy_loss(logp, **own, cu_targets=units, loss="gspo")

    def step(hidden, weight):
        return linear_loss(hidden, weight, targets, objective, units=units)[0]

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        function(*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"loss": "clipp"}, "no loss named 'clipp'; rows: clip, reinforce"),
        ({"epsilom": 0.1}, "clip has no option 'epsilom'; options: epsilon, epsilon_high, dual_clip"),
        ({"loss": "gspo"}, "a sequence ratio needs cu_targets"),
        ({"options": PolicyOptions(kl_coef=0.1)}, "kl_coef 0.1 needs ref_logp"),
        ({"options": PolicyOptions(entropy_coef=0.1)}, "needs entropy"),
        ({"options": PolicyOptions(correction="mask")}, "needs sampler_logp"),
        ({"advantages": torch.zeros(3)}, r"advantages: expected torch.float32 \[4\]"),
        ({"weights": torch.zeros(4, dtype=torch.float64)}, "weights: expected torch.float32"),
        ({"logp": torch.zeros(4, dtype=torch.bfloat16)}, "logp: expected float32 or float64"),
        ({"cu_targets": torch.tensor([0, 3])}, "must rise from 0 to the 4 tokens"),
        ({"cu_targets": torch.tensor([0, 3, 2, 4])}, "must rise from 0 to the 4 tokens"),
        ({"cu_targets": torch.zeros(2)}, "expected integers"),
        ({"epsilon": -0.1}, "clip: epsilon must be >= 0, got -0.1"),
        ({"epsilon": math.nan}, "epsilon must be >= 0, got nan"),
        ({"epsilon": None}, "epsilon must be >= 0, got None"),
        ({"loss": "cispo", "epsilon_high": -1.0}, "cispo: epsilon_high must be >= 0"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1, got 1.0"),
        ({"loss": "sapo", "tau_negative": 0.0}, "tau_negative must be > 0, got 0.0"),
    ],
)
def test_policy_errors_say_what_was_expected(backend, change, words):
    given = {name: torch.zeros(4) for name in ("logp", "old_logp", "advantages", "weights")}
    with pytest.raises(ValueError, match=words):
        policy_loss(**(given | change))


def test_policy_options_are_checked():
    with pytest.raises(ValueError, match="kl: expected one of k1, k2, k3, got 'k4'"):
        PolicyOptions(kl="k4")
    with pytest.raises(ValueError, match="correction: expected one of none, truncate"):
        PolicyOptions(correction="tis")
    with pytest.raises(ValueError, match="correction_low <= correction_high"):
        PolicyOptions(correction_low=3.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name, loss_options", ROWS)
def test_policy_equals_the_equations_on_a_gpu(name, loss_options):
    for correction in CORRECTIONS:
        inputs = inputs_of([3000, 0, 1, 777], device="cuda")
        options = PolicyOptions("k3", 0.1, 0.01, correction, 0.7, 1.5)
        ours, theirs = (run(b, inputs, name, loss_options, options, upstream=-0.7) for b in ("triton", "reference"))
        assert_agree(ours, theirs, 4e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_policy_compiled_leaves_out_tokens_of_weight_zero(bad):
    inputs = inputs_of()
    inputs["weights"][3], inputs["logp"][3], inputs["entropy"][3] = 0.0, bad, bad
    del inputs["sampler_logp"]
    options = PolicyOptions(kl_coef=0.1, entropy_coef=0.1)

    def loss(logp, entropy):
        return policy_loss(**(inputs | {"logp": logp, "entropy": entropy}), options=options)[0]

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [inputs[name].clone().requires_grad_() for name in ("logp", "entropy")]
        scalar = run(*leaves)
        scalar.backward()
        found.append((scalar.detach(), *(leaf.grad for leaf in leaves)))
    assert all(value.isfinite().all() for value in found[0])
    torch.testing.assert_close(found[1], found[0])
