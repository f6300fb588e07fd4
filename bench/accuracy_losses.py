"""Losses of log-probs and divergences between heads; plain torch writes each equation on padded [B, T] or on whole logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy import At, Case, Values, accuracy
from fastalign.losses.packed import preference_loss
from fastalign.ops.linear_kl import linear_kl
from fastalign.ops.policy import PolicyOptions, policy_loss


def with_gradients(inputs: tuple[Tensor, ...], names: str, losses: Tensor) -> Values:
    """The losses, and the gradients of their sum."""
    gradients = torch.autograd.grad(losses.sum(), inputs)
    return {"loss": losses.detach()} | {f"d_{name}": d for name, d in zip(names.split(), gradients, strict=True)}


@accuracy("preference", dtypes=(torch.float32,))
def preference_dpo(at: At) -> Case:
    """Pairs of equal lengths: a padded batch without padding."""
    pairs, length = (4, 33) if at.quick else (64, 512)
    logp, ref = at.randn(2 * pairs, length) - 2, at.randn(2 * pairs, length) - 2
    cu_targets = torch.arange(0, 2 * pairs * length + 1, length, dtype=torch.int32)

    def plain(logp: Tensor, ref: Tensor) -> Values:
        logp = logp.detach().requires_grad_()
        win, lose = (logp.sum(1) - ref.sum(1)).view(pairs, 2).unbind(1)
        found = with_gradients((logp,), "logp", -F.logsigmoid(0.1 * (win - lose)))
        return {name: value.flatten() for name, value in found.items()}

    def ours() -> Values:
        flat = logp.flatten().requires_grad_()
        return with_gradients((flat,), "logp", preference_loss(flat, cu_targets, ref_logp=ref.flatten())[0])

    return Case(ours, plain(logp, ref), plain(logp.double(), ref.double()))


@accuracy("policy", dtypes=(torch.float32,))
def policy_clip(at: At) -> Case:
    """PPO's clipped loss with the k3 estimate of the KL, a mean over tokens."""
    tokens = 1000 if at.quick else 65536
    logp, advantages = at.randn(tokens) - 2, at.randn(tokens)
    old, ref = logp + at.randn(tokens, scale=0.2), logp + at.randn(tokens, scale=0.2)
    weights = torch.full_like(logp, 1 / tokens)

    def plain(logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor) -> Values:
        logp = logp.detach().requires_grad_()
        ratio = (logp - old).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        kl = (ref - logp).exp() - (ref - logp) - 1
        return with_gradients((logp,), "logp", (loss + 0.04 * kl).mean())

    def ours() -> Values:
        leaf = logp.detach().requires_grad_()
        options = PolicyOptions(kl="k3", kl_coef=0.04)
        return with_gradients((leaf,), "logp", policy_loss(leaf, old, advantages, weights, ref_logp=ref, options=options, epsilon=0.2)[0])

    inputs = (logp, old, ref, advantages)
    return Case(ours, plain(*inputs), plain(*(t.double() for t in inputs)))


@accuracy("linear_kl")
def linear_forward_kl(at: At) -> Case:
    """KL(teacher ‖ student) of each row, with the gradients of its sum."""
    rows, width, vocab = (9, 32, 517) if at.quick else (64, 256, 8000)
    student = at.randn(rows, width), at.randn(vocab, width, scale=0.1)
    teacher = at.randn(rows, width), at.randn(vocab, width, scale=0.1)

    def plain(*inputs: Tensor) -> Values:
        hidden, weight, *fixed = (t.detach().requires_grad_() for t in inputs)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        p = F.linear(*fixed).detach().log_softmax(-1, dtype=wide)
        q = F.linear(hidden, weight).log_softmax(-1, dtype=wide)
        return with_gradients((hidden, weight), "hidden weight", (p.exp() * (p - q)).sum(-1))

    def ours() -> Values:
        hidden, weight = (t.detach().requires_grad_() for t in student)
        return with_gradients((hidden, weight), "hidden weight", linear_kl(hidden, weight, *teacher))

    inputs = (*student, *teacher)
    return Case(ours, plain(*inputs), plain(*(t.double() for t in inputs)))
