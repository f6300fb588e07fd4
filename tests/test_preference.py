"""preference_loss and unpaired_loss: native against torch in fp64, gradcheck, edges, packed trees, linear_loss, torch.compile."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

import fastalign as fa
from fastalign.losses.packed import METRICS, preference_objective, wpo_weights
from fastalign.losses.preference import DIVERGENCES, PREFERENCE, Side, mixture
from fastalign.losses.unpaired import UNPAIRED
from fastalign.ops.backend import load_native, use_backend

LENGTHS = [3, 5, 1, 2, 9, 4, 17, 1, 4, 4]
LABELS = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
needs_native = pytest.mark.skipif(load_native()[0] is None, reason="the native module is not built")
CASES = [(name, div) for name, row in PREFERENCE.items() for div in DIVERGENCES if div == "reverse_kl" or row.divergence]


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(lengths=LENGTHS, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(sum(lengths), generator=g, dtype=dtype) * 3
    ref = logp + torch.randn(sum(lengths), generator=g, dtype=dtype) * 0.4
    return logp.requires_grad_(), ref, offsets(lengths)


def what_it_reads(name, ref, num_pairs, dtype=torch.float64):
    row, g = PREFERENCE[name], torch.Generator().manual_seed(1)
    given = {"loss": name, "weight": torch.rand(num_pairs, generator=g, dtype=dtype) + 0.5}
    given |= {"ref_logp": ref} if row.reference else {}
    return given | ({"margin": torch.rand(num_pairs, generator=g, dtype=dtype)} if row.margin else {})


def with_gradient(run, logp, upstream=None):
    losses, metrics = run(logp)
    upstream = torch.linspace(-1, 2, len(losses), dtype=logp.dtype) if upstream is None else upstream
    return losses.detach(), torch.autograd.grad(losses, logp, upstream)[0], metrics


@needs_native
@pytest.mark.parametrize("ld_alpha", [1.0, 0.3])
@pytest.mark.parametrize("name, divergence", CASES)
def test_preference_native_equals_torch(name, divergence, ld_alpha):
    logp, ref, cu = inputs()
    given = {**what_it_reads(name, ref, 5), "divergence": divergence, "divergence_alpha": 0.3, "ld_alpha": ld_alpha}
    sides = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            sides.append(with_gradient(lambda x: fa.preference_loss(x, cu, **given), logp))
    (losses, gradient, metrics), (want, want_gradient, want_metrics) = sides
    torch.testing.assert_close(losses, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-12, atol=1e-12)
    assert list(metrics)[:6] == list(METRICS)
    for key, value in want_metrics.items():
        torch.testing.assert_close(metrics[key], value, rtol=1e-12, atol=1e-12)
        assert not metrics[key].requires_grad


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_gradcheck(name, backend):
    logp, ref, cu = inputs([2, 3, 4, 1, 2, 2])
    given = what_it_reads(name, ref, 3)
    assert gradcheck(lambda x: fa.preference_loss(x, cu, **given)[0], (logp,))


@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_gradcheck_and_backends_agree(name, backend):
    logp, ref, cu = inputs()
    options = {"desirable_weight": 1.3, "undesirable_weight": 0.7, "beta": 0.4}
    options |= {key: 0.25 for key in ("z_ref", "shift") if key in UNPAIRED[name].options}
    given = {"loss": name, "options": options, "ref_logp": ref, "weight": torch.rand(10, dtype=torch.float64)}
    assert gradcheck(lambda x: fa.unpaired_loss(x, cu, LABELS, **given)[0], (logp,))
    losses, gradient, metrics = with_gradient(lambda x: fa.unpaired_loss(x, cu, LABELS, **given), logp)
    with use_backend("reference"):
        want, want_gradient, want_metrics = with_gradient(lambda x: fa.unpaired_loss(x, cu, LABELS, **given), logp)
    torch.testing.assert_close(losses, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-12, atol=1e-12)
    for key in ("rewards", "logps"):
        torch.testing.assert_close(metrics[key], want_metrics[key], rtol=1e-12, atol=1e-12)


def test_preference_metrics_are_what_their_names_say(backend):
    logp, ref, cu = inputs()
    _, metrics = fa.preference_loss(logp, cu, options={"beta": 0.3}, ref_logp=ref)
    sums = [float(part.sum()) for part in logp.detach().split(LENGTHS)]
    rewards = [0.3 * (s - float(part.sum())) for s, part in zip(sums, ref.split(LENGTHS), strict=True)]
    assert metrics["logps/chosen"].tolist() == pytest.approx(sums[0::2])
    assert metrics["logps/rejected"].tolist() == pytest.approx(sums[1::2])
    assert metrics["rewards/chosen"].tolist() == pytest.approx(rewards[0::2])
    assert metrics["rewards/rejected"].tolist() == pytest.approx(rewards[1::2])
    assert metrics["rewards/margins"].tolist() == pytest.approx([a - b for a, b in zip(rewards[0::2], rewards[1::2], strict=True)])
    assert metrics["rewards/accuracies"].tolist() == [float(a > b) for a, b in zip(rewards[0::2], rewards[1::2], strict=True)]


def test_preference_reference_as_tokens_or_sums(backend):
    logp, ref, cu = inputs()
    sums = torch.stack([part.sum() for part in ref.split(LENGTHS)])
    want, _ = fa.preference_loss(logp, cu, ref_logp=ref)
    for given in (sums, sums.view(5, 2)):
        torch.testing.assert_close(fa.preference_loss(logp, cu, ref_logp=given)[0], want)
    torch.testing.assert_close(
        fa.unpaired_loss(logp, cu, LABELS, ref_logp=ref)[0], fa.unpaired_loss(logp, cu, LABELS, ref_logp=sums[:, None])[0]
    )


def test_preference_reads_a_packed_tree():
    pairs = [fa.pair([1, 2, 3], [4, 5], [6]), fa.pair([1], [2, 3, 4], [5, 6])]
    packed = fa.pack(pairs)
    assert (packed.cu_targets.diff() == torch.tensor([2, 1, 3, 2])).all()
    logp = -torch.rand(packed.num_targets)
    losses, _ = fa.preference_loss(logp, packed.cu_targets)
    parts = [float(part.sum()) for part in logp.split([2, 1, 3, 2])]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.1 * (parts[i] - parts[i + 1]))) for i in (0, 2)], rel=1e-6)


@pytest.mark.parametrize("name", PREFERENCE)
@pytest.mark.parametrize("lengths", [[0, 3], [3, 0], [0, 0], [0, 0, 2, 1, 0, 4], [2, 2], []])
def test_preference_empty_completions_are_finite(name, lengths, backend):
    logp, ref, cu = inputs(lengths)
    losses, gradient, metrics = with_gradient(lambda x: fa.preference_loss(x, cu, **what_it_reads(name, ref, len(lengths) // 2)), logp)
    assert losses.shape == (len(lengths) // 2,)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.shape == logp.shape
    assert all(value.isfinite().all() for value in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_far_apart_scores_are_finite(name, dtype, backend):
    logp = torch.tensor([-1e4, -1e-3, -1e-3, -1e4, 0.0, 0.0, 0.0, -5.0, -5.0, 0.0], dtype=dtype, requires_grad=True)
    losses, gradient, _ = with_gradient(lambda x: fa.preference_loss(x, offsets([1] * 10), loss=name), logp)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name, row in PREFERENCE.items() if row.margin or name == "orpo"])
def test_preference_of_identical_completions_pulls_them_apart_equally(name, backend):
    logp = torch.full((8,), -0.7, dtype=torch.float64, requires_grad=True)
    options = {"nll_coef": 0.0} if "nll_coef" in PREFERENCE[name].options else {}
    losses, gradient, metrics = with_gradient(
        lambda x: fa.preference_loss(x, offsets([4, 4]), loss=name, options=options), logp, torch.ones(1, dtype=torch.float64)
    )
    gradient = gradient[:4] + (0.25 if name == "orpo" else 0.0), gradient[4:]  # orpo's NLL apart
    torch.testing.assert_close(gradient[0], -gradient[1])
    assert (gradient[0] < 0).all() or name == "discopop"  # which is not monotone around 0
    assert metrics["rewards/margins"].item() == metrics["rewards/accuracies"].item() == 0
    assert losses.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preference_orpo_near_certainty(dtype, backend):
    """The closed form at p_w -> 1: the odds term vanishes with slope -p_l / (1 - p_l), and never is NaN."""
    rejected = -1.5
    for chosen in (0.0, -1e-12, -1e-7, -1e-3):
        logp = torch.tensor([chosen, rejected], dtype=dtype, requires_grad=True)
        losses, gradient, metrics = with_gradient(
            lambda x: fa.preference_loss(x, offsets([1, 1]), loss="orpo"), logp, torch.ones(1, dtype=dtype)
        )
        p_w, p_l, q_w, q_l = math.exp(chosen), math.exp(rejected), -math.expm1(chosen), -math.expm1(rejected)
        mixed = p_w * q_l + p_l * q_w
        want = -chosen + 0.1 * (math.log(mixed) - chosen - math.log(q_l))
        assert float(losses[0]) == pytest.approx(want, rel=1e-6, abs=1e-9)
        assert gradient.tolist() == pytest.approx([-1 - 0.1 * p_l / mixed, 0.1 * p_l * q_w / (mixed * q_l)], rel=1e-5, abs=1e-9)
        assert metrics["nll_loss"].item() == pytest.approx(-chosen)
    both_certain = torch.zeros(2, dtype=dtype, requires_grad=True)
    losses, gradient, _ = with_gradient(
        lambda x: fa.preference_loss(x, offsets([1, 1]), loss="orpo"), both_certain, torch.ones(1, dtype=dtype)
    )
    assert float(losses[0]) == pytest.approx(0.1 * math.log(2), rel=1e-6)
    assert gradient.isfinite().all()
    assert gradient[0] < 0 < gradient[1]


@needs_native
def test_preference_error_is_at_most_torchs_under_noise():
    """fp32 log-probs with bf16's noise, long completions: against fp64, no worse than the eager fp32 computation."""
    lengths = [1500, 900] * 8
    logp, ref, cu = inputs(lengths, torch.float32)
    logp, ref = logp.detach().bfloat16().float().requires_grad_(), ref.bfloat16().float()
    upstream = torch.ones(8)
    wide = logp.detach().double().requires_grad_()
    with use_backend("reference"):
        exact, exact_gradient, _ = with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=ref.double()), wide, upstream.double())
    ours, gradient, _ = with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=ref), logp, upstream)

    def eager(x):
        sums = torch.stack([part.sum() for part in (x - ref).split(lengths)]).view(-1, 2)
        return -torch.nn.functional.logsigmoid(0.1 * (sums[:, 0] - sums[:, 1])), {}

    theirs, their_gradient, _ = with_gradient(eager, logp, upstream)
    assert (ours - exact).norm() <= (theirs - exact).norm() + 2e-7 * exact.norm()
    assert (gradient - exact_gradient).norm() <= (their_gradient - exact_gradient).norm() + 2e-7 * exact_gradient.norm()


@needs_native
def test_preference_writes_every_element(monkeypatch):
    """Outputs start as NaN: what the kernels do not write would show."""
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: plain(self, *a, **k).fill_(math.nan))
    for dtype in (torch.float32, torch.float64):
        logp, ref, cu = inputs([3, 0, 7, 8, 0, 0, 1, 19], dtype)
        for run in (
            functools.partial(fa.preference_loss, cu_targets=cu, ref_logp=ref, ld_alpha=0.5),
            functools.partial(fa.unpaired_loss, cu_targets=cu, labels=LABELS[:8], ref_logp=ref),
        ):
            losses, gradient, metrics = with_gradient(run, logp)
            assert losses.isfinite().all()
            assert gradient.isfinite().all()
            assert all(value.isfinite().all() for value in metrics.values())


@needs_native
def test_preference_is_the_same_to_the_bit_with_any_threads_and_neighbours(isa):
    lengths = [700, 650] * 60
    logp, ref, cu = inputs(lengths, torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=ref), logp)[:2])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    alone, _ = fa.preference_loss(logp.detach()[:1350], cu[:3], ref_logp=ref[:1350])
    assert torch.equal(alone, results[0][0][:1])


def test_preference_non_contiguous_and_strided_upstream(backend):
    logp, ref, cu = inputs()
    wide = torch.stack([logp.detach(), ref], 1)
    strided = wide[:, 0].requires_grad_()
    want, want_gradient, _ = with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=ref), logp)
    got, gradient, _ = with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=wide[:, 1]), strided)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient, want_gradient)
    upstream = torch.randn(5, 3, dtype=torch.float64)[:, 1]
    for given in (upstream, upstream.contiguous()[:1].expand(5)):
        got = with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=ref), logp, given)[1]
        torch.testing.assert_close(got, with_gradient(lambda x: fa.preference_loss(x, cu, ref_logp=ref), logp, given.contiguous())[1])


@needs_native
def test_preference_retains_its_graph_and_refuses_a_second_derivative():
    logp, ref, cu = inputs()
    losses, _ = fa.preference_loss(logp, cu, ref_logp=ref)
    first, second = (torch.autograd.grad(losses.mean(), logp, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(losses.sum(), logp, create_graph=True)
    with pytest.raises(RuntimeError, match="preference_loss: a second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo", "ipo_avg", "kto"])
def test_preference_inside_linear_loss_is_the_loss_outside(name, backend):
    hidden = torch.randn(sum(LENGTHS), 8, dtype=torch.float64, requires_grad=True)
    head = (torch.randn(19, 8, dtype=torch.float64) * 0.5).requires_grad_()
    targets, cu = torch.randint(19, (sum(LENGTHS),)), offsets(LENGTHS)
    ref = -torch.rand(sum(LENGTHS), dtype=torch.float64) * 3
    if name in UNPAIRED:

        def objective(logp, span):
            first = int((cu == span.start).nonzero()[-1])
            last = int((cu == span.stop).nonzero()[0])
            losses, _ = fa.unpaired_loss(logp, cu[first : last + 1] - span.start, LABELS[first:last], loss=name, ref_logp=ref[span])
            return losses.sum() / 10

        units = cu
        want = lambda logp: fa.unpaired_loss(logp, cu, LABELS, loss=name, ref_logp=ref)[0].sum() / 10  # noqa: E731
    else:
        given = what_it_reads(name, ref, 5)
        objective, units = preference_objective(cu, num_pairs=5, **given)
        want = lambda logp: fa.preference_loss(logp, cu, **given)[0].mean()  # noqa: E731
    reference_loss = want(fa.linear_logp(hidden, head, targets))
    exact = torch.autograd.grad(reference_loss, (hidden, head))
    for chunk_rows in (12, 100):
        loss, metrics = fa.linear_loss(hidden, head, targets, objective, units=units, max_chunk_bytes=chunk_rows * 19 * 8)
        torch.testing.assert_close(loss, reference_loss, rtol=1e-12, atol=1e-14)
        for a, b in zip(torch.autograd.grad(loss, (hidden, head)), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        if name not in UNPAIRED:
            sums = fa.preference_loss(metrics["logp"], cu, **given)[1]
            assert float(metrics["rewards/margins"]) == pytest.approx(float(sums["rewards/margins"].sum()))


@pytest.mark.parametrize("name", ["dpo", "aot", "orpo"])
@pytest.mark.parametrize("forced", [None, "reference"])
def test_preference_compiles_without_a_break(name, forced):
    logp, ref, cu = inputs(dtype=torch.float32)
    given = what_it_reads(name, ref, 5, torch.float32)

    def run(x):
        losses, metrics = fa.preference_loss(x, cu, **given)
        return losses.mean(), metrics["rewards/margins"]

    with use_backend(forced):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        (loss, margins), (want, want_margins) = compiled(logp), run(logp)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(margins, want_margins)
        torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.autograd.grad(want, logp)[0])
    torch._dynamo.reset()


def test_unpaired_compiles_without_a_break():
    logp, ref, cu = inputs(dtype=torch.float32)

    def run(x):
        return fa.unpaired_loss(x, cu, LABELS, ref_logp=ref)[0].mean()

    loss, want = torch.compile(run, fullgraph=True, backend="aot_eager")(logp), run(logp)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.autograd.grad(want, logp)[0])


def test_preference_inside_linear_loss_compiles_without_a_break():
    hidden, head = torch.randn(14, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    targets, ref = torch.randint(33, (14,)), -torch.rand(14)
    objective, units = preference_objective(offsets([3, 4, 2, 5]), num_pairs=2, ref_logp=ref)

    def run(hidden, head):
        loss, metrics = fa.linear_loss(hidden, head, targets, objective, units=units)
        return loss, metrics["rewards/margins"]

    (loss, margins), (want, want_margins) = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden, head), run(hidden, head)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(margins, want_margins)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (loss, want)), strict=True):
        torch.testing.assert_close(a, b)


@needs_native
def test_preference_custom_ops_are_well_formed():
    logp, ref, cu = inputs(dtype=torch.float32)
    logp = logp.detach()
    options = (True, "logistic", [0.1, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastalign.preference_pairs, (logp, cu, ref, None, None, *options, 1.0), test_utils=checks)
    single = (True, "kto", [0.1, 1.0, 1.0, 0.0])
    torch.library.opcheck(torch.ops.fastalign.preference_singles, (logp, cu, LABELS, ref, None, *single), test_utils=checks)


def test_mixture_is_the_weighted_sum(backend):
    logp, ref, cu = inputs()
    row = mixture({"dpo": 0.8, "bco_pair": 0.2, "sft": 1.0}, {"dpo": {"beta": 0.3}})
    got, _ = fa.preference_loss(logp, cu, loss=row, ref_logp=ref)
    parts = (("dpo", 0.8, {"beta": 0.3}, ref), ("bco_pair", 0.2, {}, ref), ("sft", 1.0, {}, None))
    want = sum(w * fa.preference_loss(logp, cu, loss=name, options=options, ref_logp=r)[0] for name, w, options, r in parts)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=r"mixture: expected rows out of .* got \['dqo'\]"):
        mixture({"dqo": 1.0})


def test_mixture_rewards_are_those_of_the_part_that_has_them(backend):
    logp, ref, cu = inputs()
    dpo = {"beta": 0.3}
    expected = fa.preference_loss(logp, cu, options=dpo, ref_logp=ref)[1]
    for parts in (
        {"sft": 1.0, "dpo": 0.5},
        {"simpo": 1.0, "dpo": 0.5, "ipo_avg": 0.2},
    ):  # neither NLL nor simpo measures against the reference
        found = fa.preference_loss(logp, cu, loss=mixture(parts, {"dpo": dpo}), ref_logp=ref)[1]
        torch.testing.assert_close(found, expected)
    expected = fa.preference_loss(logp, cu, loss="simpo")[1]
    found = fa.preference_loss(logp, cu, loss=mixture({"sft": 0.5, "simpo": 1.0}))[1]
    torch.testing.assert_close(found, expected)


def test_mixture_has_an_equation_of_its_own():
    win, lose = (Side(torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64), torch.full((4,), 7)) for _ in "wl")
    row = mixture({"dpo": 0.8, "sft": 0.2})
    torch.testing.assert_close(row.function(win, lose), 0.8 * PREFERENCE["dpo"](win, lose) + 0.2 * PREFERENCE["sft"](win, lose))


def test_preference_unknown_names_answer_with_trls_and_the_nearest():
    logp, _, cu = inputs()
    for name, answer in (
        ("sigmoid", "what TRL calls sigmoid is dpo"),
        ("sigmoid_norm", "is dpo_norm"),
        ("apo_zer", "did you mean apo_zero"),
    ):
        with pytest.raises(ValueError, match=answer):
            fa.preference_loss(logp, cu, loss=name)


def test_wpo_weights_are_the_product_of_mean_probabilities():
    logp, _, cu = inputs()
    means = [float(part.mean()) for part in logp.detach().split(LENGTHS)]
    assert wpo_weights(logp, cu).tolist() == pytest.approx([math.exp(a + b) for a, b in zip(means[0::2], means[1::2], strict=True)])
    assert not wpo_weights(logp, cu).requires_grad


def test_preference_errors_say_what_was_expected():
    logp, ref, cu = inputs()

    def fails(match, **given):
        with pytest.raises(ValueError, match=match):
            fa.preference_loss(**{"logp": logp, "cu_targets": cu, "ref_logp": ref, **given})

    fails("logp: expected float32 or float64", logp=logp.detach().bfloat16())
    fails(r"expected integer offsets \[2B\+1\]: two sequences a pair", cu_targets=cu[:-1])
    fails("cu_targets must rise from 0 to the 50", cu_targets=cu.flip(0))
    fails("did you mean ipo", loss="ipoo")
    fails("unknown bta; did you mean beta", options={"bta": 1.0})
    fails("beta must be > 0, got 0", options={"beta": 0})
    fails("simpo does not read ref_logp", loss="simpo")
    fails("ipo does not read margin; leave it out", loss="ipo", margin=torch.ones(5))
    fails("nca_pair does not read the divergence js", loss="nca_pair", divergence="js")
    fails("divergence: unknown jss; did you mean js", divergence="jss")
    fails("exo_pair: label_smoothing must lie between 0.0 and 1.0", loss="exo_pair", options={"label_smoothing": 0.0})
    fails("robust: label_smoothing must lie between", loss="robust", options={"label_smoothing": 0.5})
    fails(r"margin: expected \[5\], got \[4\]", margin=torch.ones(4))
    fails("ld_alpha weighs tokens", ld_alpha=0.5, ref_logp=torch.ones(10))
    fails(r"expected \[50\] a token or sums \[10\], got \[7\]", ref_logp=torch.ones(7))
    fails(
        r"\[4\] could be tokens or sums; give sums as \[2, 2\]",
        logp=logp[:4],
        cu_targets=offsets([2, 0, 1, 1]),
        ref_logp=ref[:4],
    )
    with pytest.raises(ValueError, match="labels must be bool"):
        fa.unpaired_loss(logp, cu, LABELS.long())
    with pytest.raises(ValueError, match="did you mean kto"):
        fa.unpaired_loss(logp, cu, LABELS, loss="kt0")


class Elsewhere:
    """What the binding reads of a tensor, in the other memory."""

    is_cuda = True

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@needs_native
def test_preference_names_a_tensor_in_the_other_memory():
    module, (logp, ref, cu) = load_native()[0], inputs(dtype=torch.float32)
    logp, one, pairs, numbers = logp.detach(), torch.ones(5), len(LENGTHS) // 2, [0.1] + [0.0] * 7
    results = torch.empty(pairs), torch.empty(6, pairs), torch.empty(2 * pairs)
    for name, given in (
        ("ref_logp", (Elsewhere(ref), True, cu, one, one)),
        ("margin", (ref, True, cu, Elsewhere(one), one)),
        ("weight", (ref, True, cu, one, Elsewhere(one))),
    ):
        with pytest.raises(ValueError, match=f"preference: {name}: expected a tensor on the CPU, where the log-probs are"):
            module.preference_pairs(logp, *given, "logistic", numbers, 1.0, *results)
    results = torch.empty(len(LENGTHS)), torch.empty(2, len(LENGTHS)), torch.empty(len(LENGTHS))
    with pytest.raises(ValueError, match="preference: labels: expected a tensor on the CPU, where the log-probs are"):
        module.preference_singles(logp, ref, True, cu, Elsewhere(LABELS), None, "kto", [0.1, 1.0, 1.0, 0.0], *results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, divergence", CASES)
def test_preference_on_the_gpu(name, divergence, dtype):
    logp, ref, cu = inputs([300, 0, 129, 128, 1, 700], dtype)
    given = {**what_it_reads(name, ref, 3, dtype), "divergence": divergence}
    want, want_gradient, _ = with_gradient(lambda x: fa.preference_loss(x, cu, **given), logp)
    there = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    moved = logp.detach().cuda().requires_grad_()
    losses, gradient, _ = with_gradient(lambda x: fa.preference_loss(x, cu, **there), moved, torch.linspace(-1, 2, 3, dtype=dtype).cuda())
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(losses.cpu(), want, **tolerance)
    torch.testing.assert_close(gradient.cpu(), want_gradient, **tolerance)


@pytest.mark.parametrize("other", ["sft", "simpo"])
def test_mixture_gives_a_divergence_to_the_parts_that_have_one(other):
    """What reads no reference is computed on log-probs, not on the divergence's score."""
    logp, ref, cu = -torch.rand(14, dtype=torch.float64), -torch.rand(14, dtype=torch.float64), offsets([3, 4, 2, 5])
    row = mixture({"dpo": 0.8, other: 0.2})
    found, _ = fa.preference_loss(logp, cu, loss=row, ref_logp=ref, divergence="js")
    dpo, _ = fa.preference_loss(logp, cu, loss="dpo", ref_logp=ref, divergence="js")
    plain, _ = fa.preference_loss(logp, cu, loss=other)
    torch.testing.assert_close(found, 0.8 * dpo + 0.2 * plain)


@pytest.mark.parametrize("row", ["aot", "aot_unpaired", "mixture"])
def test_preference_objective_keeps_ranked_pairs_together(row):
    """A loss that ranks its pairs has one unit, the micro-batch; given the batch's ranks, each pair is one."""
    cu = offsets([3, 4, 2, 5, 1, 2])
    loss = mixture({"dpo": 0.5, "aot": 0.5}) if row == "mixture" else row
    _, units = preference_objective(cu, num_pairs=3, loss=loss, ref_logp=torch.randn(17))
    assert units.tolist() == [0, 17]
    if row == "aot":
        _, units = preference_objective(cu, num_pairs=3, loss=row, options={"matched": torch.zeros(3)}, ref_logp=torch.randn(17))
        assert units.tolist() == [0, 7, 14, 17]
