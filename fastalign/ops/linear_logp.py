"""linear_logp: hidden × head → log-prob of the target, differentiable both ways, logits one chunk at a time.

Trainable head: 2TVH forward, 6TVH backward (the logits are computed again; rows whose upstream gradient is zero are
not). Frozen head: 4TVH in all, the unscaled gradient of each row is kept in the forward (6TVH with the entropy's).
Without gradients: 2TVH.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.linear_head import check_inputs, compute_dtype
from fastalign.ops.linear_passes import logp_backward, logp_forward, logp_frozen
from fastalign.ops.once import once


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Any:
    """Log-prob of each target under softmax(cap(hidden · weightᵀ + bias) / temperature), without the [N, V] logits.

    Args:
        hidden: [N, H]; weight: [V, H], of the same dtype outside autocast; targets: [N] int64; bias: [V].
        ignore_index: rows with this target are left out of every GEMM.

    Returns:
        logp [N] in nats, fp32 (fp64 for fp64 inputs), 0 where ignored; with `return_entropy`, (logp, entropy).
        A row with a NaN logit is NaN.

    Raises:
        ValueError: shapes that do not fit, two dtypes outside autocast, a target outside the vocabulary (names the row).
        RuntimeError: on a second differentiation.
    """
    check_inputs("linear_logp", hidden, weight, targets, bias, temperature, logit_softcap)
    dtype = compute_dtype("linear_logp", hidden, weight)
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    logp, entropy = _LinearLogp.apply(
        hidden, weight, bias, targets.long(), float(temperature), logit_softcap, int(ignore_index), return_entropy
    )
    return (logp, entropy) if return_entropy else logp


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, logit_softcap, ignore_index, return_entropy):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.options = (temperature, logit_softcap, ignore_index)
        needs = ctx.needs_input_grad
        ctx.frozen = needs[0] and not needs[1] and not needs[2]
        if ctx.frozen:
            logp, entropy, unit, unit_entropy = logp_frozen(
                hidden, weight, bias, targets, temperature, logit_softcap, ignore_index, return_entropy
            )
            ctx.save_for_backward(hidden, unit, unit_entropy)
        else:
            logp, lse, entropy = logp_forward(hidden, weight, bias, targets, temperature, logit_softcap, ignore_index, return_entropy)
            ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, g_logp, g_entropy):  # type: ignore[no-untyped-def]
        rest = (None,) * 5
        if g_logp is None and g_entropy is None:
            return (None,) * 3 + rest
        if ctx.frozen:
            hidden, unit, unit_entropy = ctx.saved_tensors
            d_hidden = torch.zeros_like(hidden)
            if g_logp is not None:
                d_hidden = unit * g_logp[:, None].to(unit.dtype)
            if g_entropy is not None:
                d_hidden = d_hidden + unit_entropy * g_entropy[:, None].to(unit.dtype)
            return (once("linear_logp", d_hidden, hidden), None, None, *rest)
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        g_logp = torch.zeros_like(lse) if g_logp is None else g_logp
        grads = logp_backward(g_logp, g_entropy, hidden, weight, bias, targets, lse, entropy, *ctx.options, *ctx.needs_input_grad[:3])
        inputs = [t for t in (hidden, weight, bias) if t is not None]
        return (*(None if g is None else once("linear_logp", g, *inputs) for g in grads), *rest)
