"""What the tests of linear_kl share: inputs, the same divergence written in other ways, and relative errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastalign.ops import linear_head
from fastalign.ops.linear_kl import linear_kl

CASES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]


BOTH_WAYS = pytest.mark.parametrize("weighted", [False, True])


def inputs(rows, vocab, dtype=torch.float64, *, width=5, teacher_width=7, scale=1.5, seed=0):
    """hidden, weight, bias with gradients; teacher's without."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    student = (normal(rows, width), normal(vocab, width) * scale * width**-0.5, normal(vocab))
    teacher = (normal(rows, teacher_width), normal(vocab, teacher_width) * scale * teacher_width**-0.5, normal(vocab))
    return [t.to(dtype).requires_grad_() for t in student], [t.to(dtype) for t in teacher]


def run(student, teacher, op=linear_kl, **options):
    hidden, weight, bias = student
    teacher_hidden, teacher_weight, teacher_bias = teacher
    return op(hidden, weight, teacher_hidden, teacher_weight, bias=bias, teacher_bias=teacher_bias, **options)


def from_kl_div(student_logits, teacher_logits, name, beta, temperature):
    """The divergence by F.kl_div on log-probs, as distillation trainers write it: kl_div(log q, log p) is KL(p‖q)."""
    s, t = (torch.log_softmax(z / temperature, -1) for z in (student_logits, teacher_logits))
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return F.kl_div(s, t, reduction="none", log_target=True).sum(-1)
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return F.kl_div(t, s, reduction="none", log_target=True).sum(-1)
    b = torch.tensor(beta, dtype=s.dtype)
    m = torch.logsumexp(torch.stack((s + torch.log1p(-b), t + b.log())), 0)
    to_teacher, to_student = (F.kl_div(m, x, reduction="none", log_target=True).sum(-1) for x in (t, s))
    return b * to_teacher + (1 - b) * to_student


def eager(hidden, weight, teacher_hidden, teacher_weight, *, bias, teacher_bias, divergence, jsd_beta, temperature=1.0, row_weight=None):
    """What a trainer writes in plain torch, in the dtype of the inputs."""
    logits = F.linear(hidden, weight, bias), F.linear(teacher_hidden, teacher_weight, teacher_bias)
    found = from_kl_div(*logits, divergence, jsd_beta, temperature)
    return found if row_weight is None else (found * row_weight.to(found.dtype)).sum()


def graded(op, student, teacher, upstream, **options):
    """Per-token divergence and the gradients of its sum weighted by `upstream`; the weights go through row_weight when given there."""
    found = run(student, teacher, op=op, **options)
    loss = found if found.dim() == 0 else (found * upstream.to(found.dtype)).sum()
    return [loss.detach() if found.dim() == 0 else found.detach(), *torch.autograd.grad(loss, student)]


def relative(found, exact):
    return [((f.double() - e).norm() / e.norm().clamp(min=1e-300)).item() for f, e in zip(found, exact, strict=True)]


def small_chunks(monkeypatch, rows):
    monkeypatch.setattr(linear_head, "CHUNK_ROWS", rows)
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 0)
