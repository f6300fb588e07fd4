"""Preference losses against a reference: equations over pairs.

Δ = (logp_w - ref_w) - (logp_l - ref_l), σ the logistic function. Sides without reference log-probs are measured against a uniform one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.ops.preference_reference import Side

from .scores import flip_share, gap, mean_gap, reward_shift, smoothed, softplus


def dpo(win: Side, lose: Side, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv:2305.18290, Eq. 7): -log σ(β Δ). Losses > 0.

    label_smoothing ε > 0 is conservative DPO (cDPO, Mitchell 2023): -(1 - ε) log σ(β Δ) - ε log σ(-β Δ). A margin m makes it ODPO
    (arXiv:2402.10571): β Δ - m in place of β Δ. TRL calls it sigmoid, without the smoothing.
    """
    return smoothed(gap(win, lose, beta), label_smoothing)


def robust(win: Side, lose: Side, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO (arXiv:2403.00409): ((1 - ε) ℓ(β Δ) - ε ℓ(-β Δ)) / (1 - 2ε), ℓ = -log σ, unbiased when a share ε < ½ of the labels is
    flipped. It can be negative, and is unbounded below. TRL's default ε is 0, which is DPO."""
    z, flipped = gap(win, lose, beta), flip_share("robust", label_smoothing, low=-1.0, high=0.5)
    return ((1 - flipped) * softplus(-z) - flipped * softplus(z)) / (1 - 2 * flipped)


def ipo(win: Side, lose: Side, *, beta: float = 0.1) -> Tensor:
    """IPO (arXiv:2310.12036, Eq. 17): (Δ - 1 / (2β))², Δ of whole completions. Losses ≥ 0. TRL's ipo is `ipo_avg`."""
    return (win.logratio - lose.logratio - 0.5 / beta).square()


def ipo_avg(win: Side, lose: Side, *, beta: float = 0.1) -> Tensor:
    """IPO with each side's log-ratio divided by its length, as TRL has it after asking the authors. Losses ≥ 0."""
    return (win.mean_logratio - lose.mean_logratio - 0.5 / beta).square()


def hinge(win: Side, lose: Side, *, beta: float = 0.1) -> Tensor:
    """RSO's hinge-norm (arXiv:2309.06657): max(0, 1 - β Δ), SLiC's loss with a reference. Losses ≥ 0."""
    return torch.relu(1 - gap(win, lose, beta))


def rso(win: Side, lose: Side, *, beta: float = 0.05) -> Tensor:
    """RSO (arXiv:2309.06657, sigmoid-norm with its γ = 0.05): DPO's equation; what differs is that pairs come from rejection sampling."""
    return softplus(-gap(win, lose, beta))


def spin(win: Side, lose: Side, *, beta: float = 0.1) -> Tensor:
    """SPIN (arXiv:2401.01335, logistic loss): DPO's equation; chosen is the ground truth, rejected a sample of the previous model, which is
    the reference."""
    return softplus(-gap(win, lose, beta))


def dpo_norm(win: Side, lose: Side, *, beta: float = 5.0) -> Tensor:
    """Length-normalized DPO (Tülu 3, arXiv:2411.15124, §5): -log σ(β Δ) of log-ratios a token. TRL calls it sigmoid_norm, with β = 0.1."""
    return softplus(-mean_gap(win, lose, beta))


def exo_pair(win: Side, lose: Side, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO (arXiv:2402.00856, Eq. 16): KL((q, 1 - q) || (1 - ε, ε)), q = σ(β Δ). Losses in [0, -log ε]; needs ε > 0."""
    z, flipped = gap(win, lose, beta), flip_share("exo_pair", label_smoothing, low=0.0, high=1.0)
    agree, differ = F.logsigmoid(z) - math.log1p(-flipped), F.logsigmoid(-z) - math.log(flipped)
    return torch.sigmoid(z) * agree + torch.sigmoid(-z) * differ


def nca_pair(win: Side, lose: Side, *, beta: float = 0.1) -> Tensor:
    """NCA for pairs (arXiv:2402.05369): -log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l), r = β log-ratio. Losses > 0."""
    chosen, rejected = beta * win.logratio, beta * lose.logratio
    return softplus(-chosen) + 0.5 * softplus(chosen) + 0.5 * softplus(rejected)


def bco_pair(win: Side, lose: Side, *, beta: float = 0.1, shift: float | Tensor = 0.0) -> Tensor:
    """BCO on pairs (arXiv:2404.04656): -log σ(r_w - δ) - log σ(δ - r_l), r = β log-ratio. Losses > 0.

    δ is the running reward shift (`bco_statistics`); TRL 1.16 has none here.
    """
    return softplus(shift - beta * win.logratio) + softplus(beta * lose.logratio - shift)


def bco_statistics(
    win: Side, lose: Side, *, beta: float = 0.1, previous: Tensor | None = None, decay: float = 0.9, **_options: float
) -> dict[str, Tensor]:
    """{"shift": δ} of a whole batch, to be kept and given as `previous` with the next one."""
    return {"shift": reward_shift(beta * win.logratio, beta * lose.logratio, previous, decay)}


def sppo_hard(win: Side, lose: Side, *, beta: float = 1e-3) -> Tensor:
    """SPPO (arXiv:2405.00675, Eq. 4.7) with win probabilities 1 and 0: (log-ratio_w - 1/(2β))² + (log-ratio_l + 1/(2β))².

    β = 1/η; the paper's η is 1e3, TRL's β 0.1.
    """
    return (win.logratio - 0.5 / beta).square() + (lose.logratio + 0.5 / beta).square()


def apo_zero(win: Side, lose: Side, *, beta: float = 0.1) -> Tensor:
    """APO-zero (arXiv:2408.06266, Eq. 7): σ(-r_w) + σ(r_l), r = β log-ratio. Losses in (0, 2)."""
    return torch.sigmoid(-beta * win.logratio) + torch.sigmoid(beta * lose.logratio)


def apo_down(win: Side, lose: Side, *, beta: float = 0.1) -> Tensor:
    """APO-down (arXiv:2408.06266, Eq. 8): σ(r_w) + σ(r_l - r_w), r = β log-ratio. Losses in (0, 2)."""
    chosen, rejected = beta * win.logratio, beta * lose.logratio
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def discopop(win: Side, lose: Side, *, beta: float = 0.1, tau: float = 0.05) -> Tensor:
    """DiscoPOP (arXiv:2406.08414, Eq. 5): m e^-z - (1 - m) log σ(z), z = β Δ, m = σ(z / τ). Losses > 0, finite for τ < 1;
    around z = 0 they rise with z.

    m e^-z is taken as one exponential: peers multiply 0 by infinity for a large negative z.
    """
    z = gap(win, lose, beta)
    return torch.sigmoid(-z / tau) * softplus(-z) + torch.exp(F.logsigmoid(z / tau) - z)


def aot(win: Side, lose: Side, *, beta: float = 0.1, label_smoothing: float = 0.0, matched: Tensor | None = None) -> Tensor:
    """AOT, paired (arXiv:2406.05882): DPO's loss of logp_w - logp_l against the reference margin of the same rank in the batch.

    matched: [B] that margin (`aot_statistics`); None: of the pairs at hand. TRL returns the same losses in the order of rank.
    """
    matched = aot_statistics(win, lose)["matched"] if matched is None else matched
    return smoothed(beta * (win.logp - lose.logp - matched), label_smoothing)


def aot_statistics(win: Side, lose: Side, **_options: float) -> dict[str, Tensor]:
    """{"matched": [B]}: the reference margin that has each pair's rank."""
    margins = (win.logp - lose.logp).detach()
    if win.ref_logp is None or lose.ref_logp is None:
        return {"matched": torch.zeros_like(margins)}
    return {"matched": _of_same_rank(margins, win.ref_logp - lose.ref_logp)}


def aot_unpaired(
    win: Side,
    lose: Side,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    matched_win: Tensor | None = None,
    matched_lose: Tensor | None = None,
) -> Tensor:
    """AOT, unpaired (arXiv:2406.05882): DPO's loss of chosen against rejected log-ratios of the same rank in the batch.

    matched_lose, matched_win: [B] the log-ratio of the other kind with each one's rank (`aot_unpaired_statistics`), taken as constants; a
    loss is then half of its chosen and half of its rejected completion's, with the gradient of both: sums and gradients are those of
    the whole batch. None: of the pairs at hand, and the gradient flows through both.
    """
    if matched_win is None or matched_lose is None:
        return smoothed(beta * (win.logratio - _of_same_rank(win.logratio, lose.logratio)), label_smoothing)
    chosen = smoothed(beta * (win.logratio - matched_lose), label_smoothing)
    both = chosen + smoothed(beta * (matched_win - lose.logratio), label_smoothing)
    return both - 0.5 * both.detach()


def aot_unpaired_statistics(win: Side, lose: Side, **_options: float) -> dict[str, Tensor]:
    """{"matched_win": [B], "matched_lose": [B]}: for each rejected log-ratio the chosen one of its rank, and the other way round."""
    chosen, rejected = win.logratio.detach(), lose.logratio.detach()
    return {"matched_win": _of_same_rank(rejected, chosen), "matched_lose": _of_same_rank(chosen, rejected)}


def _of_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """[B] the member of `others` whose rank is that of each value."""
    rank = values.detach().argsort(stable=True).argsort()
    return others.sort(stable=True).values[rank]
