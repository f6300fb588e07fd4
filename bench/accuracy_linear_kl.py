"""linear_kl: divergence of each row, and the gradients of a weighted sum; plain torch is the divergence of log_softmax'ed logits."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.accuracy import At, Case, Values, accuracy
from fastalign.ops import reference
from fastalign.ops.linear_kl import linear_kl


def case_of(at: At, divergence: str) -> Case:
    rows, vocab, width, teacher_width = (5, 301, 33, 17) if at.quick else (33, 4099, 65, 49)
    given = [
        at.randn(rows, width),
        at.randn(vocab, width, scale=0.3),
        at.randn(rows, teacher_width),
        at.randn(vocab, teacher_width, scale=0.3),
    ]
    row_weight = torch.linspace(0.5, 1.5, rows, device=at.device)

    def run(function, *tensors: Tensor) -> Values:  # type: ignore[no-untyped-def]
        hidden, weight = (t.detach().clone().requires_grad_() for t in tensors[:2])
        values = function(hidden, weight, *tensors[2:], divergence=divergence)
        d_hidden, d_weight = torch.autograd.grad((values * row_weight.to(values.dtype)).sum(), (hidden, weight))
        return {"divergence": values.detach(), "d_hidden": d_hidden, "d_weight": d_weight}

    exact = run(reference.linear_kl, *(t.double() for t in given))
    return Case(lambda: run(linear_kl, *given), run(reference.linear_kl, *given), exact)


@accuracy("linear_kl")
def linear_kl_forward(at: At) -> Case:
    return case_of(at, "forward_kl")


@accuracy("linear_kl")
def linear_kl_reverse(at: At) -> Case:
    return case_of(at, "reverse_kl")


@accuracy("linear_kl")
def linear_kl_jsd(at: At) -> Case:
    return case_of(at, "jsd")
