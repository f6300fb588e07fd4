"""The equations of the preference tables against scalar float64 formulas, written here as the papers (and TRL 1.16) write them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from fastalign.losses.packed import preference_loss
from fastalign.losses.preference import DIVERGENCES, PREFERENCE, Side
from fastalign.losses.unpaired import UNPAIRED

B = 7
LABELS = torch.tensor([1, 0, 0, 1, 1, 0, 1], dtype=torch.bool)


def sides(seed=0, spread=6.0):
    g = torch.Generator().manual_seed(seed)

    def side():
        length = torch.randint(1, 30, (B,), generator=g)
        logp = -torch.rand(B, generator=g, dtype=torch.float64) * length
        return Side(logp, logp + torch.randn(B, generator=g, dtype=torch.float64) * spread, length)

    return side(), side()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def odds(p):
    return p / (1 - p)


def robust(d, e, b=0.1):
    return (-(1 - e) * log_sigmoid(b * d) + e * log_sigmoid(-b * d)) / (1 - 2 * e)


def exo(d, e, b=0.1):
    q = sigmoid(b * d)
    return q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)


def discopop(z, tau=0.05):
    mix = sigmoid(z / tau)
    return -(1 - mix) * log_sigmoid(z) + mix * math.exp(-z)


def orpo(a, b, beta=0.1):
    return -a - beta * log_sigmoid(math.log(odds(math.exp(a)) / odds(math.exp(b))))


def alpha_reward(mean_logp, alpha):
    return (1 - math.exp(mean_logp) ** -alpha) / alpha


# name: f(x, y, a, b, p, q), x, y: log-ratios; a, b: log-probs a token; p, q: log-probs. Chosen first. n, m: lengths.
SCALAR = {
    "dpo": lambda x, y, a, b, n, m: -log_sigmoid(0.1 * (x - y)),
    "robust": lambda x, y, a, b, n, m: robust(x - y, 0.1),
    "ipo": lambda x, y, a, b, n, m: (x - y - 5.0) ** 2,
    "ipo_avg": lambda x, y, a, b, n, m: (x / n - y / m - 5.0) ** 2,
    "hinge": lambda x, y, a, b, n, m: max(0.0, 1 - 0.1 * (x - y)),
    "slic": lambda x, y, a, b, n, m: max(0.0, 1 - a * n + b * m) - 0.1 * a,
    "rso": lambda x, y, a, b, n, m: -log_sigmoid(0.05 * (x - y)),
    "spin": lambda x, y, a, b, n, m: -log_sigmoid(0.1 * (x - y)),
    "dpo_norm": lambda x, y, a, b, n, m: -log_sigmoid(5.0 * (x / n - y / m)),
    "exo_pair": lambda x, y, a, b, n, m: exo(x - y, 1e-3),
    "nca_pair": lambda x, y, a, b, n, m: -log_sigmoid(0.1 * x) - 0.5 * log_sigmoid(-0.1 * x) - 0.5 * log_sigmoid(-0.1 * y),
    "bco_pair": lambda x, y, a, b, n, m: -log_sigmoid(0.1 * x) - log_sigmoid(-0.1 * y),
    "sppo_hard": lambda x, y, a, b, n, m: (x - 500.0) ** 2 + (y + 500.0) ** 2,
    "apo_zero": lambda x, y, a, b, n, m: 1 - sigmoid(0.1 * x) + sigmoid(0.1 * y),
    "apo_down": lambda x, y, a, b, n, m: sigmoid(0.1 * x) + 1 - sigmoid(0.1 * (x - y)),
    "discopop": lambda x, y, a, b, n, m: discopop(0.1 * (x - y)),
    "simpo": lambda x, y, a, b, n, m: -log_sigmoid(2 * (a - b) - 1),
    "cpo": lambda x, y, a, b, n, m: -log_sigmoid(0.1 * (a * n - b * m)) - a,
    "cpo_simpo": lambda x, y, a, b, n, m: -log_sigmoid(2 * (a - b) - 1) - a,
    "alphapo": lambda x, y, a, b, n, m: -log_sigmoid(2 * (alpha_reward(a, 0.25) - alpha_reward(b, 0.25)) - 1),
    "orpo": lambda x, y, a, b, n, m: orpo(a, b),
    "sft": lambda x, y, a, b, n, m: -a,
}


def scalars(win, lose, function):
    numbers = zip(win.logratio, lose.logratio, win.mean_logp, lose.mean_logp, win.length, lose.length, strict=True)
    return torch.tensor([function(*(float(v) for v in row)) for row in numbers], dtype=torch.float64)


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_equations_are_the_papers(name):
    for seed in range(5):
        win, lose = sides(seed)
        got = PREFERENCE[name](win, lose)
        if name in SCALAR:
            want = scalars(win, lose, SCALAR[name])
        else:  # aot: sorts of whole columns
            columns = {
                "aot": (win.logp - lose.logp, win.ref_logp - lose.ref_logp),
                "aot_unpaired": (win.logratio, lose.logratio),
            }[name]
            left, right = (sorted(column.tolist()) for column in columns)
            want = torch.tensor([-log_sigmoid(0.1 * (x - y)) for x, y in zip(left, right, strict=True)], dtype=torch.float64)
            got, want = got.sort().values, want.sort().values
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# TRL 1.16, trl/trainer/dpo_trainer.py, its names and options; f(x, y) of the two log-ratios (divided by lengths where it divides).
TRL = {
    "sigmoid": ("dpo", {}, lambda d: -log_sigmoid(0.3 * d)),
    "hinge": ("hinge", {}, lambda d: max(0.0, 1 - 0.3 * d)),
    "ipo": ("ipo_avg", {}, lambda d: (d - 1 / 0.6) ** 2),
    "exo_pair": ("exo_pair", {"label_smoothing": 0.05}, lambda d: exo(d, 0.05, 0.3)),
    "robust": ("robust", {"label_smoothing": 0.05}, lambda d: robust(d, 0.05, 0.3)),
    "discopop": ("discopop", {"tau": 0.05}, lambda d: discopop(0.3 * d)),
    "sigmoid_norm": ("dpo_norm", {}, lambda d: -log_sigmoid(0.3 * d)),
}
SCORES = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - math.exp(-x),
    "js": lambda x: math.log(2 * math.exp(x) / (1 + math.exp(x))),
    "alpha": lambda x: (math.exp(x) ** (0.7 - 1) - 1) / (0.7 - 1),
}


@pytest.mark.parametrize(
    "peer, divergence", [(p, d) for p, (name, *_) in TRL.items() for d in DIVERGENCES if d == "reverse_kl" or PREFERENCE[name].divergence]
)
def test_preference_agrees_with_trl_on_the_same_sums(peer, divergence):
    name, options, function = TRL[peer]
    row = PREFERENCE[name]
    win, lose = sides(3, spread=2.0)
    got = row(win, lose, divergence=divergence, divergence_alpha=0.7, beta=0.3, **options)
    score = SCORES[divergence]

    def of_lengths(x, y, a, b, n, m):
        return function(score(x) / n - score(y) / m if row.per_token else score(x) - score(y))

    torch.testing.assert_close(got, scalars(win, lose, of_lengths), rtol=1e-6, atol=1e-6)


def test_preference_margin_is_odpo():
    win, lose = sides()
    margin = torch.rand(B, dtype=torch.float64)
    got = PREFERENCE["dpo"](Side(win.logp, win.ref_logp, win.length, margin=margin), lose, label_smoothing=0.2)
    z = 0.1 * (win.logratio - lose.logratio) - margin
    want = [-0.8 * log_sigmoid(float(v)) - 0.2 * log_sigmoid(-float(v)) for v in z]
    assert got.tolist() == pytest.approx(want)


SOFT = [name for name, row in PREFERENCE.items() if row.soft]


@pytest.mark.parametrize("name", SOFT)
def test_preference_soft_labels_are_a_smoothing_a_pair(backend, name):
    """Each pair's loss and gradient are those of the row with that pair's label_smoothing, which the kernels compute."""
    logp, cu = -torch.rand(40), torch.tensor([0, 3, 9, 15, 20, 31, 40], dtype=torch.int32)
    ref = {"ref_logp": -torch.rand(40)} if PREFERENCE[name].reference else {}
    flip = torch.tensor([0.0, 0.3, 1.0])
    leaf = logp.clone().requires_grad_()
    losses, metrics = preference_loss(leaf, cu, loss=name, options={"label_smoothing": flip}, **ref)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    for i, smoothing in enumerate(flip.tolist()):
        one = logp.clone().requires_grad_()
        hard, expected = preference_loss(one, cu, loss=name, options={"label_smoothing": min(smoothing, 1 - 1e-7)}, **ref)
        span = slice(int(cu[2 * i]), int(cu[2 * i + 2]))
        torch.testing.assert_close(losses[i], hard[i], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad[span], torch.autograd.grad(hard[i], one)[0][span], rtol=1e-5, atol=1e-6)
        assert all(torch.equal(metrics[key], expected[key]) for key in metrics)


def test_preference_soft_labels_gradcheck_and_refusals():
    logp, cu = -torch.rand(12, dtype=torch.float64), torch.tensor([0, 3, 6, 10, 12], dtype=torch.int32)

    def loss(logp, name="dpo", flip=(0.2, 0.6)):
        return preference_loss(logp, cu, loss=name, options={"label_smoothing": torch.tensor(flip)})[0]

    assert torch.autograd.gradcheck(loss, logp.requires_grad_())
    with pytest.raises(ValueError, match="robust reads one label_smoothing, not one a pair; these read both: dpo, simpo"):
        loss(logp, "robust")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got \[0.2"):
        loss(logp, "dpo", (0.2, 1.2))


def test_preference_weights_of_both_sides_multiply():
    win, lose = sides()
    weights = torch.rand(2, B, dtype=torch.float64)
    heavy = [Side(s.logp, s.ref_logp, s.length, weight=w) for s, w in zip((win, lose), weights, strict=True)]
    torch.testing.assert_close(PREFERENCE["apo_zero"](*heavy), PREFERENCE["apo_zero"](win, lose) * weights.prod(0))


@pytest.mark.parametrize("name, low, high", [("apo_zero", 0, 2), ("apo_down", 0, 2), ("dpo", 0, math.inf), ("ipo", 0, math.inf)])
def test_preference_ranges(name, low, high):
    for seed in range(5):
        losses = PREFERENCE[name](*sides(seed, spread=40.0))
        assert (losses >= low).all()
        assert (losses <= high).all()


@pytest.mark.parametrize("alpha", [1e-6, 1e-9])
def test_preference_alphapo_goes_to_simpo(alpha):
    win, lose = sides()
    torch.testing.assert_close(PREFERENCE["alphapo"](win, lose, alpha=alpha), PREFERENCE["simpo"](win, lose), rtol=1e-5, atol=1e-5)


def test_aot_of_micro_batches_is_aot_of_the_batch():
    """The statistics make both losses, values and gradients, sums over pairs."""
    for name in ("aot", "aot_unpaired"):
        row = PREFERENCE[name]
        win, lose = sides(1)
        leaves = [t.clone().requires_grad_() for t in (win.logp, lose.logp)]
        whole = [Side(x, s.ref_logp, s.length) for x, s in zip(leaves, (win, lose), strict=True)]
        want = row(*whole, label_smoothing=0.1).sum()
        exact = torch.autograd.grad(want, leaves)
        numbers = row.statistics(*(Side(s.logp.detach(), s.ref_logp, s.length) for s in whole))
        parts = []
        for cut in (slice(0, 3), slice(3, B)):
            here = [Side(s.logp[cut], s.ref_logp[cut], s.length[cut]) for s in whole]
            parts.append(row(*here, label_smoothing=0.1, **{key: value[cut] for key, value in numbers.items()}).sum())
        torch.testing.assert_close(sum(parts), want)
        for a, b in zip(torch.autograd.grad(sum(parts), leaves), exact, strict=True):
            torch.testing.assert_close(a, b)


def test_bco_shift_is_a_moving_average_of_both_kinds():
    win, lose = sides()
    mean = 0.1 * float(win.logratio.mean() + lose.logratio.mean()) / 2
    first = PREFERENCE["bco_pair"].statistics(win, lose)["shift"]
    assert float(first) == pytest.approx(mean)
    second = PREFERENCE["bco_pair"].statistics(win, lose, previous=torch.tensor(2.0), decay=0.75)["shift"]
    assert float(second) == pytest.approx(1.5 + 0.25 * mean)
    both = Side(torch.cat([win.logp, lose.logp]), torch.cat([win.ref_logp, lose.ref_logp]), torch.cat([win.length, lose.length]))
    labels = torch.arange(2 * B) < B
    assert float(UNPAIRED["bco"].statistics(both, labels)["shift"]) == pytest.approx(mean)
    alone = UNPAIRED["bco"].statistics(win, torch.ones(B, dtype=torch.bool))["shift"]
    assert float(alone) == pytest.approx(0.1 * float(win.logratio.mean()))
    losses = PREFERENCE["bco_pair"](win, lose, shift=first)
    want = scalars(win, lose, lambda x, y, *_: -log_sigmoid(0.1 * x - mean) - log_sigmoid(mean - 0.1 * y))
    torch.testing.assert_close(losses, want)


def test_kto_reference_point_is_clamped_and_detached():
    side, other = sides()
    labels = LABELS
    low = Side(side.ref_logp - 1, side.ref_logp, side.length)
    assert float(UNPAIRED["kto"].statistics(side, labels, mismatched=low)["z_ref"]) == 0
    high = Side((other.ref_logp + 2).requires_grad_(), other.ref_logp, other.length)
    z = UNPAIRED["kto"].statistics(side, labels, mismatched=high)["z_ref"]
    assert float(z) == pytest.approx(2)
    assert not z.requires_grad
    assert float(UNPAIRED["kto"].statistics(side, labels)["z_ref"]) == 0


@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_equations_are_the_papers(name):
    side, _ = sides()
    shift = {"kto": {"z_ref": 0.4}, "bco": {"shift": 0.4}}.get(name, {})
    got = UNPAIRED[name](side, LABELS, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, **shift)
    scalar = {
        "kto": lambda x, good: 1 - sigmoid(0.3 * (x - 0.4) if good else 0.3 * (0.4 - x)),
        "bco": lambda x, good: -log_sigmoid(0.3 * x - 0.4 if good else 0.4 - 0.3 * x),
        "apo_zero_unpaired": lambda x, good: 1 - sigmoid(0.3 * x) if good else sigmoid(0.3 * x),
    }[name]
    want = [(1.5 if good else 0.5) * scalar(float(x), bool(good)) for x, good in zip(side.logratio, LABELS, strict=True)]
    assert got.tolist() == pytest.approx(want)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [name for name, row in PREFERENCE.items() if row.divergence])
def test_preference_divergences_gradcheck(name, divergence):
    win, lose = sides(2, spread=1.0)

    def losses(a, b):
        return PREFERENCE[name](Side(a, win.ref_logp, win.length), Side(b, lose.ref_logp, lose.length), divergence=divergence)

    assert gradcheck(losses, (win.logp.requires_grad_(), lose.logp.requires_grad_()))
