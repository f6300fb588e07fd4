"""Preference and policy losses of given log-probs: value and dL/dlogp; plain torch is the equation in fp32 on the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.accuracy import At, Case, Values, accuracy
from fastalign.losses.packed import preference_loss, unpaired_loss
from fastalign.losses.policy import KL, POLICY
from fastalign.ops.policy import PolicyOptions, policy_loss


def differentiated(logp: Tensor, loss: Callable[[Tensor], Tensor]) -> Values:
    """A weighted sum of the losses, and its gradient."""
    leaf = logp.detach().clone().requires_grad_()
    losses = loss(leaf)
    upstream = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype, device=losses.device).view(losses.shape)
    (gradient,) = torch.autograd.grad((losses * upstream).sum(), leaf)
    return {"loss": losses.detach(), "d_logp": gradient}


def sequences(at: At, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the policy and the reference, and the offsets of ragged sequences, one of them empty."""
    lengths = torch.randint(1, 40 if at.quick else 400, (count,))
    lengths[1] = 0
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
    total = int(offsets[-1])
    logp = -at.randn(total).abs()
    return logp, logp + at.randn(total, scale=0.1), offsets


def sums(values: Tensor, offsets: Tensor) -> Tensor:
    index = torch.repeat_interleave(offsets.diff().to(values.device))
    return values.new_zeros(len(offsets) - 1).index_add(0, index, values)


@accuracy("preference", dtypes=(torch.float32,))
def preference_dpo(at: At) -> Case:
    logp, ref, offsets = sequences(at, 32)

    def equation(values: Tensor) -> Tensor:
        gap = (sums(values, offsets) - sums(ref.to(values.dtype), offsets)).view(-1, 2)
        return -torch.nn.functional.logsigmoid(0.1 * (gap[:, 0] - gap[:, 1]))

    def ours() -> Values:
        return differentiated(logp, lambda values: preference_loss(values, offsets, ref_logp=ref)[0])

    return Case(ours, differentiated(logp, equation), differentiated(logp.double(), equation))


@accuracy("preference", dtypes=(torch.float32,))
def preference_simpo(at: At) -> Case:
    logp, _, offsets = sequences(at, 32)

    def equation(values: Tensor) -> Tensor:
        means = (sums(values, offsets) / offsets.diff().clamp(min=1).to(values.device)).view(-1, 2)
        return -torch.nn.functional.logsigmoid(2.0 * (means[:, 0] - means[:, 1]) - 0.5)

    def ours() -> Values:
        options = {"beta": 2.0, "gamma": 0.5}
        return differentiated(logp, lambda values: preference_loss(values, offsets, loss="simpo", options=options)[0])

    return Case(ours, differentiated(logp, equation), differentiated(logp.double(), equation))


@accuracy("preference", dtypes=(torch.float32,))
def unpaired_kto(at: At) -> Case:
    logp, ref, offsets = sequences(at, 32)
    labels = torch.arange(32, device=logp.device) % 3 == 0

    def equation(values: Tensor) -> Tensor:
        ratio = sums(values, offsets) - sums(ref.to(values.dtype), offsets)
        return torch.where(labels, 1 - torch.sigmoid(0.1 * (ratio - 0.3)), 1 - torch.sigmoid(0.1 * (0.3 - ratio)))

    def ours() -> Values:
        return differentiated(logp, lambda values: unpaired_loss(values, offsets, labels, options={"z_ref": 0.3}, ref_logp=ref)[0])

    return Case(ours, differentiated(logp, equation), differentiated(logp.double(), equation))


def policy_case(at: At, loss: str) -> Case:
    logp, ref, offsets = sequences(at, 16)
    old, advantages, weights = logp + at.randn(len(logp), scale=0.1), at.randn(len(logp)), at.randn(len(logp)).abs() / len(logp)
    options = PolicyOptions(kl_coef=0.05)

    def equation(values: Tensor) -> Tensor:
        given = (t.to(values.dtype) for t in (old, advantages))
        per_token = POLICY[loss].function(values, *given, offsets.to(values.device)) + 0.05 * KL["k3"](values, ref.to(values.dtype))
        return (weights.to(values.dtype) * per_token).sum()

    def ours() -> Values:
        given = {"loss": loss, "cu_targets": offsets, "ref_logp": ref, "options": options}
        return differentiated(logp, lambda values: policy_loss(values, old, advantages, weights, **given)[0])

    return Case(ours, differentiated(logp, equation), differentiated(logp.double(), equation))


@accuracy("policy", dtypes=(torch.float32,))
def policy_clip_k3(at: At) -> Case:
    return policy_case(at, "clip")


@accuracy("policy", dtypes=(torch.float32,))
def policy_gspo_k3(at: At) -> Case:
    return policy_case(at, "gspo")
