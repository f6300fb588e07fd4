"""Preference losses without a reference model. Sides' `ref_logp` is not read."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.preference_reference import Side

from .divergences import power
from .scores import nll, policy_gap, smoothed, softplus

CERTAIN = 2.0**-33  # a mean log-prob above minus this counts as this: 1 - p stays > 0, and gradients finite


def simpo(win: Side, lose: Side, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """SimPO (arXiv:2405.14734, Eq. 6): -log σ(β (logp_w/|w| - logp_l/|l|) - γ). Losses > 0. TRL's defaults are β = 0.1, γ = 0.5."""
    return smoothed(policy_gap(win.mean_logp, lose.mean_logp, win, beta, gamma), label_smoothing)


def cpo(win: Side, lose: Side, *, beta: float = 0.1, nll_coef: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """CPO (arXiv:2401.08417): -log σ(β (logp_w - logp_l)) + nll_coef · NLL_w. Losses > 0.

    NLL_w is a token's mean over the completion, as in the authors' code; the paper writes the sum, TRL averages over the tokens of all
    completions (prompts included where they are not masked).
    """
    return smoothed(policy_gap(win.logp, lose.logp, win, beta), label_smoothing) + nll_coef * nll(win)


def cpo_simpo(
    win: Side, lose: Side, *, beta: float = 2.0, gamma: float = 1.0, nll_coef: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """CPO-SimPO: SimPO's preference term and CPO's NLL term. Losses > 0."""
    return simpo(win, lose, beta=beta, gamma=gamma, label_smoothing=label_smoothing) + nll_coef * nll(win)


def alphapo(win: Side, lose: Side, *, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.25, label_smoothing: float = 0.0) -> Tensor:
    """AlphaPO (arXiv:2501.03884): SimPO of the rewards (1 - p^-α) / α, p = exp(logp / length); α = 0 is SimPO. Losses > 0.

    p^-α above e^80 counts as e^80 (TRL: infinity, then NaN).
    """
    chosen, rejected = power(win.mean_logp, -alpha), power(lose.mean_logp, -alpha)
    return smoothed(policy_gap(chosen, rejected, win, beta, gamma), label_smoothing)


def orpo(win: Side, lose: Side, *, beta: float = 0.1) -> Tensor:
    """ORPO (arXiv:2403.07691, Eq. 6): NLL_w - β log σ(log odds_w - log odds_l), odds = p / (1 - p), p = exp(logp / length). Losses > 0.

    β is the paper's λ. Near p = 1 the odds come from expm1, so value and gradient stay exact and finite; p = 1 counts as 1 - 2^-33.
    NLL_w is a token's mean over the completion; TRL's runs over the prompt too, averaged over the tokens of the batch.
    """
    return nll(win) + beta * softplus(-log_odds_ratio(win, lose))


def log_odds_ratio(win: Side, lose: Side) -> Tensor:
    """[B] log odds_w - log odds_l of probabilities a token (arXiv:2403.07691, Eq. 4–5)."""
    return _log_odds(win.mean_logp) - _log_odds(lose.mean_logp)


def orpo_metrics(win: Side, lose: Side) -> dict[str, Tensor]:
    """TRL's two: nll_loss, and log_odds_ratio, which is its log-sigmoid."""
    return {"nll_loss": nll(win), "log_odds_ratio": -softplus(-log_odds_ratio(win, lose))}


def _log_odds(x: Tensor) -> Tensor:
    x = x + (x.clamp(max=-CERTAIN) - x).detach()  # bounded, with the gradient of the identity
    near = x > -0.6931471805599453
    rest = torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x))))
    return x - rest


def slic(win: Side, lose: Side, *, delta: float = 1.0, nll_coef: float = 0.1) -> Tensor:
    """SLiC-HF (arXiv:2305.10425, Eq. 1): max(0, δ - logp_w + logp_l) + λ NLL_w. Losses ≥ 0.

    The regularization target is the chosen completion, its NLL a token's mean; the paper also allows the SFT target.
    """
    return torch.relu(delta - policy_gap(win.logp, lose.logp, win, 1.0)) + nll_coef * nll(win)


def sft(win: Side, lose: Side) -> Tensor:
    """The negative log-likelihood of the chosen completion a token, for mixtures. TRL averages over the tokens of the batch."""
    return nll(win)
