"""linear_logp: hidden × head → log-prob of the target, differentiable both ways, logits one chunk at a time.

Trainable head: 2TVH forward, 6TVH backward (the logits are computed again; rows whose upstream gradient is zero are
not). Frozen head: 4TVH in all, the unscaled gradient of each row is kept in the forward (6TVH with the entropy's).
Without gradients: 2TVH.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.linear_head import check_inputs, compute_dtype, wants_wide
from fastalign.ops.linear_passes import Scored, backward_op, forward_op, frozen_op, logp_backward, logp_forward, logp_frozen
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
    head_dtype: torch.dtype | None = None,
) -> Any:
    """Log-prob of each target under softmax(cap(hidden · weightᵀ + bias) / temperature), without the [N, V] logits.

    Args:
        hidden: [N, H]; weight: [V, H], of the same dtype outside autocast; targets: [N] int64; bias: [V].
        ignore_index: rows with this target are left out of every GEMM.
        head_dtype: torch.float32 keeps the logits of 16-bit inputs in fp32 (the GEMM's own sums, not rounded to 16 bits).

    Returns:
        logp [N] in nats, fp32 (fp64 for fp64 inputs), 0 where ignored; with `return_entropy`, (logp, entropy).
        A row with a NaN logit is NaN.

    Raises:
        ValueError: shapes that do not fit, two dtypes outside autocast, a target outside the vocabulary (names the row).
        RuntimeError: on a second differentiation, or inside torch.func and vmap.
    """
    check_inputs("linear_logp", hidden, weight, targets, bias, temperature, logit_softcap)
    dtype = compute_dtype("linear_logp", hidden, weight)
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():  # autograd.Function does not tell: a hidden that requires gradients would have its slope taken
        hidden = hidden.detach()
    options = (float(temperature), logit_softcap, int(ignore_index), wants_wide("linear_logp", dtype, head_dtype))
    logp, entropy, _ = LinearLogp.apply(hidden, weight, bias, targets.long(), options, return_entropy, False)
    return (logp, entropy) if return_entropy else logp


class LinearLogp(torch.autograd.Function):
    """(hidden, weight, bias, targets, (temperature, logit_softcap, ignore_index, wide), ...) → (logp, entropy | None, lse | None)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: tuple[float, float | None, int, bool],
        return_entropy: bool,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.frozen = tuple(ctx.needs_input_grad[:3]) == (True, False, False) and not return_lse
        if torch.compiler.is_compiling():
            found = (frozen_op if ctx.frozen else forward_op)(hidden, weight, bias, targets, *options, return_entropy)
        else:
            found = (logp_frozen if ctx.frozen else logp_forward)(Scored.of(hidden, weight, bias, targets, *options), return_entropy)
        if ctx.frozen:
            logp, entropy, slope, slope_entropy = found
            ctx.save_for_backward(hidden, slope, slope_entropy)
            return logp, entropy if return_entropy else None, None
        logp, lse, entropy, _ = found
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        return logp, entropy if return_entropy else None, lse if return_lse else None

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None) -> Any:
        if g_logp is None and g_entropy is None and g_lse is None:
            return (None,) * 7
        if ctx.frozen:
            hidden, slope, slope_entropy = ctx.saved_tensors
            d_hidden = torch.zeros_like(slope) if g_logp is None else slope * g_logp[:, None].to(slope.dtype)
            if g_entropy is not None:
                d_hidden = d_hidden + slope_entropy * g_entropy[:, None].to(slope.dtype)
            return (once("linear_logp", d_hidden, hidden), *(None,) * 6)
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        g_logp = torch.zeros_like(lse) if g_logp is None else g_logp
        run = backward_op if torch.compiler.is_compiling() else logp_backward
        needs = ctx.needs_input_grad[:3]
        with torch.no_grad():  # create_graph turns gradients on in here
            grads = run(g_logp, g_entropy, g_lse, hidden, weight, bias, targets, lse, entropy, *ctx.options, *needs)
        inputs = [t for t in (hidden, weight, bias) if t is not None]
        return (*(once("linear_logp", g, *inputs) if n else None for g, n in zip(grads, needs, strict=True)), *(None,) * 4)
