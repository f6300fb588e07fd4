"""preference_loss and unpaired_loss: native against torch in fp64, gradcheck, edges, packed trees, linear_loss, torch.compile."""

from __future__ import annotations

import math

import pytest
import torch
from preference_inputs import CASES, LABELS, LENGTHS, inputs, needs_native, offsets, what_it_reads, with_gradient
from torch.autograd import gradcheck

import fastalign as fa
from fastalign.losses.packed import METRICS, wpo_weights
from fastalign.losses.preference import PREFERENCE, Side, mixture
from fastalign.losses.unpaired import UNPAIRED
from fastalign.ops.backend import load_native, use_backend


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


def test_wpo_weights_are_aligned():
    """exp of the mean over tokens of log p(token) - log Σ p², chosen plus rejected."""
    logp, _, cu = inputs()
    squares = torch.randn(len(logp), dtype=torch.float64) - 1
    means = [float(part.mean()) for part in (logp.detach() - squares).split(LENGTHS)]
    want = [math.exp(a + b) for a, b in zip(means[0::2], means[1::2], strict=True)]
    assert wpo_weights(logp, cu, squares).tolist() == pytest.approx(want)


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
