"""linear_kl: divergence of a student's head from a teacher's, exact over the vocabulary, logits one chunk at a time.

With `row_weight` 8TVH: both forwards (4), the gradient taken while the chunk is there (4). Per token 12TVH: 4 forward, then 4
again and 4 of gradients; rows whose upstream gradient is zero stop at 4. Frozen student head: 6TVH either way. Without
gradients 4TVH. A teacher of width K counts its 2 as 2TVK. Memory: two chunks of logits and the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.divergence import Divergence
from fastalign.ops.head_gradient import lend_for
from fastalign.ops.linear_fused import tie, wanted_gradients
from fastalign.ops.linear_kl_passes import (
    Heads,
    Reading,
    backward_op,
    forward_op,
    frozen_op,
    fused_op,
    kl_backward,
    kl_forward,
    kl_frozen,
    kl_fused,
)
from fastalign.ops.once import once

OP = "linear_kl"


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> Tensor:
    """Divergence between teacher T and student S of each row, over the whole vocabulary, without the [N, V] logits.

    S = softmax((hidden · weightᵀ + bias) / temperature), T likewise; there is no temperature² factor. "forward_kl" is
    KL(T‖S), "reverse_kl" KL(S‖T), "jsd" the generalized Jensen-Shannon divergence of GKD (arXiv:2306.13649, Eq. 1):
    β·KL(T‖M) + (1−β)·KL(S‖M) with M = β·T + (1−β)·S. As in TRL's GKD, β = 0 is the forward KL and β = 1 the reverse KL (Eq. 1
    itself goes to 0 there; divided by β or 1−β it goes to these).

    The floor is 8TVH with `row_weight` (student forward, both its gradients, teacher forward), 12TVH without (both forwards
    again in the backward), 6TVH with a frozen student head, 4TVH without gradients.

    Args:
        hidden: [N, H]; weight: [V, H]; bias: [V]. Gradients go to these alone.
        teacher_hidden: [N, K]; teacher_weight: [V, K]; teacher_bias: [V]. The teacher may have its own width and dtype.
        row_weight: [N]; the result is then Σ row_weight · divergence with its gradient taken in the forward, and rows of weight
            zero are left out of every GEMM. `weight.main_grad` (fp32 [V, H]) is honoured as in `linear_loss`.

    Returns:
        Nats, fp32 (fp64 for fp64 inputs): [N], or a scalar with `row_weight`. A token that the teacher rules out with a logit of
        −inf is fine for the forward KL and JSD; where the student gives it probability, the reverse KL is +inf and has no
        gradient (NaN). A row with a NaN logit is NaN.

    Raises:
        ValueError: shapes that do not fit, two vocabularies, two dtypes in one head outside autocast, unknown options.
        RuntimeError: on a second differentiation.
    """
    which = Divergence.of(OP, divergence, jsd_beta, temperature)
    given = Reading(hidden, weight, bias), Reading(teacher_hidden, teacher_weight, teacher_bias)
    _check(*given, row_weight)
    student, teacher = given[0].cast(OP), given[1].cast(f"{OP} (teacher)").detached()
    if row_weight is None:
        student = student if torch.is_grad_enabled() else student.detached()  # else a frozen head's gradient would be taken all the same
        found: Tensor = LinearKl.apply(*student, *teacher, which)
        return found
    wanted = wanted_gradients(hidden, weight, bias)
    student = student.detached()
    weights = row_weight.detach().to(torch.promote_types(student.hidden.dtype, torch.float32))
    if torch.compiler.is_compiling():
        if wanted[1]:
            lend_for(weight, student.weight.dtype, 0, op=OP)  # raises when there is a main_grad
        loss, *gradients = fused_op(weights, *student, *teacher, *which, *wanted)
        return tie(OP, loss, given[0], tuple(g if need else None for g, need in zip(gradients, wanted, strict=True)))  # type: ignore[arg-type]
    with torch.no_grad():
        loss, gradients, loan = kl_fused(Heads.of(student, teacher, which), weights, wanted, weight if wanted[1] else None)
    return tie(OP, loss, given[0], gradients, loan)


class LinearKl(torch.autograd.Function):
    """(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, which) → divergence [N]."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        student, teacher, ctx.which = Reading(*inputs[:3]), Reading(*inputs[3:6]), inputs[6]
        ctx.frozen = tuple(ctx.needs_input_grad[:3]) == (True, False, False)
        if torch.compiler.is_compiling():
            found, state = (frozen_op if ctx.frozen else forward_op)(*student, *teacher, *ctx.which)
        else:
            found, state = (kl_frozen if ctx.frozen else kl_forward)(Heads.of(student, teacher, ctx.which))
        if ctx.frozen:
            ctx.save_for_backward(student.hidden, state)
            return found
        # autograd refuses to save a tensor that was made under inference_mode: it could not tell whether it has changed since
        unwatched = not torch.compiler.is_compiling() and any(t is not None and t.is_inference() for t in teacher)
        ctx.teacher = teacher if unwatched else None
        ctx.save_for_backward(*student, *(() if unwatched else teacher), state)
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if ctx.frozen:
            hidden, slope = ctx.saved_tensors
            g = g[:, None].to(slope.dtype)  # where g is zero the slope may be NaN, and adds nothing
            return (once(OP, torch.where(g == 0, torch.zeros_like(slope), slope * g), hidden), *(None,) * 6)
        *inputs, state = ctx.saved_tensors
        student, teacher = Reading(*inputs[:3]), Reading(*inputs[3:]) if ctx.teacher is None else ctx.teacher
        needs = ctx.needs_input_grad[:3]
        with torch.no_grad():  # create_graph turns gradients on in here
            if torch.compiler.is_compiling():
                grads = backward_op(g, state, *student, *teacher, *ctx.which, *needs)
            else:
                grads = kl_backward(g, state, Heads.of(student, teacher, ctx.which), needs)
        kept = [t for t in student if t is not None]
        return (*(once(OP, d, *kept) if need else None for d, need in zip(grads, needs, strict=True)), *(None,) * 4)


def _check(student: Reading, teacher: Reading, row_weight: Tensor | None) -> None:
    """Shapes and dtypes; raises ValueError or TypeError that says what was expected."""
    for side, width, (x, w, b) in (("", "H", student), ("teacher_", "K", teacher)):
        if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
            raise ValueError(
                f"{OP}: expected {side}hidden [N, {width}] and {side}weight [V, {width}], got {list(x.shape)} and {list(w.shape)}"
            )
        if not (x.dtype.is_floating_point and w.dtype.is_floating_point):
            raise TypeError(f"{OP}: expected floating-point {side}hidden and {side}weight, got {x.dtype} and {w.dtype}")
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"{OP}: expected {side}bias [{w.shape[0]}], one a row of {side}weight, got {list(b.shape)}")
    if student.weight.shape[0] != teacher.weight.shape[0]:
        raise ValueError(
            f"{OP}: student and teacher must have one vocabulary, got {student.weight.shape[0]} and {teacher.weight.shape[0]} rows;"
            " if one head is only padded, cut both to the shorter"
        )
    if student.hidden.shape[0] != teacher.hidden.shape[0]:
        raise ValueError(
            f"{OP}: expected teacher_hidden [{student.hidden.shape[0]}, K], a row a row of hidden, got {list(teacher.hidden.shape)}"
        )
    if student.weight.shape[0] == 0:
        raise ValueError(f"{OP}: expected at least one row of weight, got {list(student.weight.shape)}")
    if row_weight is None:
        return
    if row_weight.shape != student.hidden.shape[:1]:
        raise ValueError(f"{OP}: expected row_weight [{student.hidden.shape[0]}], one a row of hidden, got {list(row_weight.shape)}")
    if row_weight.requires_grad:
        raise ValueError(f"{OP}: row_weight must not require gradients; multiply the per-token divergence, or detach it")
