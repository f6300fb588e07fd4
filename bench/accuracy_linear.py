"""linear_logp, linear_loss and linear_cross_entropy: plain torch upcasts the logits to fp32 before the softmax, as trainers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy import At, Case, Values, accuracy
from fastalign.ops import reference
from fastalign.ops.linear_cross_entropy import linear_cross_entropy
from fastalign.ops.linear_logp import linear_logp
from fastalign.ops.linear_loss import linear_loss


def inputs(at: At) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [V, H], targets [T]; logits with a standard deviation of 3."""
    rows, vocab, width = (24, 500, 48) if at.quick else (160, 5003, 256)
    hidden, weight = at.randn(rows, width), at.randn(vocab, width, scale=3 * width**-0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), at.randint(vocab, rows)


def with_gradients(run: Callable[..., dict[str, Tensor]], upstream: dict[str, Tensor], hidden: Tensor, weight: Tensor) -> Values:
    """What run(hidden, weight) returns, and the gradients of its values under `upstream`."""
    found = run(hidden, weight)
    total = sum((found[name] * g.to(found[name].dtype)).sum() for name, g in upstream.items())
    d_hidden, d_weight = torch.autograd.grad(total, (hidden, weight))  # type: ignore[arg-type]
    return {**found, "d_hidden": d_hidden, "d_weight": d_weight}


def widened(*tensors: Tensor) -> list[Tensor]:
    """fp64 copies that take gradients."""
    return [t.detach().double().requires_grad_() for t in tensors]


def logp_case(at: At, **options: Any) -> Case:
    hidden, weight, targets = inputs(at)
    upstream = {name: torch.randn(len(targets), dtype=torch.float64, device=at.device) for name in ("logp", "entropy")}

    def named(op: Callable[..., Any], **more: Any) -> Callable[..., dict[str, Tensor]]:
        return lambda h, w: dict(zip(("logp", "entropy"), op(h, w, targets, return_entropy=True, **more), strict=True))

    return Case(
        lambda: with_gradients(named(linear_logp, **options), upstream, hidden, weight),
        with_gradients(named(reference.linear_logp), upstream, hidden, weight),
        with_gradients(named(reference.linear_logp), upstream, *widened(hidden, weight)),
    )


@accuracy("linear_logp", dtypes=(torch.float32, torch.bfloat16))
def linear_logp_rows(at: At) -> Case:
    return logp_case(at)


@accuracy("linear_logp", dtypes=(torch.bfloat16,))
def linear_logp_fp32_head(at: At) -> Case:
    """head_dtype=float32: log-probs and entropy are held to a head that is fp32 in torch too, gradients to bf16."""
    case = logp_case(at, head_dtype=torch.float32)
    torch.manual_seed(0)
    hidden, weight, targets = inputs(at)
    logp, entropy = reference.linear_logp(hidden.float(), weight.float(), targets, return_entropy=True)
    return Case(case.ours, {**case.plain, "logp": logp.detach(), "entropy": entropy.detach()}, case.exact)


@accuracy("linear_logp")
def linear_loss_8_chunks(at: At) -> Case:
    """A clipped policy loss; the head gradient of eight chunks, summed in main_grad."""
    hidden, weight, targets = inputs(at)
    advantages = torch.randn(len(targets), device=at.device)
    limit = -(-len(targets) // 8) * weight.shape[0] * weight.element_size()

    def objective(logp: Tensor, span: slice) -> Tensor:
        ratio = torch.exp(logp - logp.detach())
        return -(ratio * advantages[span].to(logp.dtype)).sum() / len(targets)

    def ours() -> Values:
        hidden.grad, weight.main_grad = None, torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        loss, _ = linear_loss(hidden, weight, targets, objective, max_chunk_bytes=limit)
        loss.backward()
        assert hidden.grad is not None
        found = {"loss": loss, "d_hidden": hidden.grad, "d_weight": weight.main_grad}  # type: ignore[attr-defined]
        del weight.main_grad  # type: ignore[attr-defined]
        return found

    def plain(h: Tensor, w: Tensor) -> dict[str, Tensor]:
        return {"loss": reference.linear_loss(h, w, targets, objective, units=[0, len(targets)])}

    one = {"loss": torch.ones((), dtype=torch.float64)}
    return Case(ours, with_gradients(plain, one, hidden, weight), with_gradients(plain, one, *widened(hidden, weight)))


@accuracy("linear_logp")
def linear_cross_entropy_mean(at: At) -> Case:
    hidden, weight, targets = inputs(at)
    targets[::4] = -100
    one = {"loss": torch.ones((), dtype=torch.float64)}

    def plain(h: Tensor, w: Tensor) -> dict[str, Tensor]:
        logits = F.linear(h, w)
        return {"loss": F.cross_entropy(logits if h.dtype == torch.float64 else logits.float(), targets)}

    return Case(
        lambda: with_gradients(lambda h, w: {"loss": linear_cross_entropy(h, w, targets)}, one, hidden, weight),
        with_gradients(plain, one, hidden, weight),
        with_gradients(plain, one, *widened(hidden, weight)),
    )
