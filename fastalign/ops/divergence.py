"""Row kernels over the logits of a student and a teacher: the divergence of each row, and its gradient in the student's place.

The formulas, and why near-equal distributions keep their digits, are in csrc/math/divergence.h. A row's result depends on
that row alone: not on the number of rows, the threads or the chunk it came in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import backend_reading, load_native

READS = {"native": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}
STATE = 5  # numbers kept a row: student's raw maximum and sum of e^(z − maximum), teacher's, and the center of the gradient


def log_mixture(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """log(beta e^t + (1 - beta) e^s)."""
    mixture = torch.stack((t + torch.tensor(beta, dtype=t.dtype).log(), s + torch.tensor(-beta, dtype=s.dtype).log1p()))
    return torch.logsumexp(mixture, 0)


def weighted(p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ p (a − b) over the last dimension; a probability of zero adds nothing, to the gradient neither."""
    dead = p == 0
    return (p * (a.masked_fill(dead, 0.0) - b.masked_fill(dead, 0.0))).sum(-1)


def around(s: Tensor, other: Tensor, center: Tensor) -> Tensor:
    """e^s (s − other − center) [N, V]; zero where the student's probability is."""
    p = s.exp()
    dead = p == 0
    return (p * (s.masked_fill(dead, 0.0) - other.masked_fill(dead, 0.0) - center)).masked_fill_(dead, 0.0)


def _forward_kl(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    return weighted(t.exp(), t, s), torch.zeros_like(s[:, 0])


def _forward_kl_slope(s: Tensor, t: Tensor, center: Tensor, beta: float) -> Tensor:
    return s.exp() - t.exp()


def _reverse_kl(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    value = weighted(s.exp(), s, t)
    return value, value


def _reverse_kl_slope(s: Tensor, t: Tensor, center: Tensor, beta: float) -> Tensor:
    return around(s, t, center)


def _jsd(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    m = log_mixture(s, t, beta)
    center = weighted(s.exp(), s, m)
    return beta * weighted(t.exp(), t, m) + (1.0 - beta) * center, center


def _jsd_slope(s: Tensor, t: Tensor, center: Tensor, beta: float) -> Tensor:
    return (1.0 - beta) * around(s, log_mixture(s, t, beta), center)


class Equation(NamedTuple):
    """A row: log-probs s and t [N, V], beta → (divergence, center of its gradient) [N]; with the center [N, 1] → its slope by the
    student's logits at temperature 1 [N, V]; and the betas at which it is another row."""

    value: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    slope: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    limits: Mapping[float, str] = {}


EQUATIONS = {  # in the order of csrc/math/divergence.h
    "forward_kl": Equation(_forward_kl, _forward_kl_slope),
    "reverse_kl": Equation(_reverse_kl, _reverse_kl_slope),
    "jsd": Equation(_jsd, _jsd_slope, {0.0: "forward_kl", 1.0: "reverse_kl"}),
}
DIVERGENCES = tuple(EQUATIONS)


class Divergence(NamedTuple):
    """Which divergence: index into DIVERGENCES, the teacher's weight in the mixture of "jsd", and the temperature of both sides."""

    kind: int
    beta: float
    temperature: float

    @classmethod
    def of(cls, op: str, name: str, jsd_beta: float, temperature: float) -> Divergence:
        """Checked; a JSD with beta 0 or 1 is its limit, the forward or the reverse KL.

        Raises:
            ValueError: an unknown divergence, jsd_beta outside [0, 1], temperature not above 0.
        """
        if name not in DIVERGENCES:
            raise ValueError(f"{op}: expected divergence {', '.join(map(repr, DIVERGENCES))}, got {name!r}")
        if not 0.0 <= jsd_beta <= 1.0:
            raise ValueError(f"{op}: jsd_beta must be in [0, 1], got {jsd_beta}")
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"{op}: temperature must be > 0 and finite, got {temperature}")
        name = EQUATIONS[name].limits.get(jsd_beta, name)
        return cls(DIVERGENCES.index(name), float(jsd_beta), float(temperature))

    @property
    def equation(self) -> Equation:
        """Its row."""
        return EQUATIONS[DIVERGENCES[self.kind]]


def kl_rows(student: Tensor, teacher: Tensor, divergence: Divergence, g: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Divergence of each row, and with `g` its gradient at once, while the row is in the cache.

    Args:
        student, teacher: logits [N, V] fp32 or bf16, rows contiguous; -inf is a probability of 0.
        g: [N] dL/d(divergence): the student's logits are overwritten by g · d(divergence)/d(logits), rows with g = 0 by zeros.

    Returns:
        divergence [N] in nats and the rows' state [N, 5] for `kl_grad_rows_`, both fp32 (fp64 for fp64 logits). Sums are fp32
        within a block and fp64 across; a NaN logit on either side makes its row NaN.
    """
    backend = _backend(student, teacher)
    if backend == "reference":
        found, state = _reference_rows(student, teacher, divergence)
        if g is not None:
            _reference_grad_(student, teacher, divergence, state, g)
        return found, state
    found = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    state = torch.empty(student.shape[0], STATE, dtype=torch.float32, device=student.device)
    _run(backend, student, teacher, divergence, found, state, g)
    return found, state


def kl_grad_rows_(student: Tensor, teacher: Tensor, divergence: Divergence, state: Tensor, g: Tensor) -> Tensor:
    """Turns the student's logits into g · d(divergence)/d(logits), in place; arguments as in `kl_rows`, and its state."""
    backend = _backend(student, teacher)
    if backend == "reference":
        return _reference_grad_(student, teacher, divergence, state, g)
    _run(backend, student, teacher, divergence, None, state, g)
    return student


def _backend(student: Tensor, teacher: Tensor) -> str:
    return backend_reading("linear_kl", student.device, READS, student.dtype, teacher.dtype)


def _run(
    backend: str, student: Tensor, teacher: Tensor, divergence: Divergence, found: Tensor | None, state: Tensor, g: Tensor | None
) -> None:
    kind, beta, temperature = divergence
    g = None if g is None else g.float().contiguous()
    if backend == "triton":
        from fastalign.kernels import linear_kl

        linear_kl.kl_rows(student, teacher, kind, beta, 1.0 / temperature, found, state, g)
        return
    module, _ = load_native()
    assert module is not None
    none = state.new_empty(0)
    module.kl_rows(student, teacher, kind, beta, 1.0 / temperature, none if found is None else found, state, none if g is None else g)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_probs(student: Tensor, teacher: Tensor, divergence: Divergence, state: Tensor) -> tuple[Tensor, Tensor]:
    """s and t [N, V]; -inf where the probability is zero."""
    sides = ((_wide(logits) - state[:, i, None], state[:, i + 1, None].log()) for logits, i in ((student, 0), (teacher, 2)))
    s, t = (down / divergence.temperature - log_sum for down, log_sum in sides)
    return s, t


def _reference_rows(student: Tensor, teacher: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """The specification, chunk by chunk: some [N, V] buffers more."""
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    state = torch.empty(student.shape[0], STATE, dtype=wide, device=student.device)
    for logits, i in ((student, 0), (teacher, 2)):
        state[:, i] = _wide(logits).amax(1)
        state[:, i + 1] = ((_wide(logits) - state[:, i, None]) / divergence.temperature).exp().sum(1)
    s, t = _log_probs(student, teacher, divergence, state)
    value, center = divergence_terms(s, t, divergence)
    state[:, 4] = center
    return value, state


def divergence_terms(s: Tensor, t: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Log-probs s and t [N, V] → (divergence [N], center of the gradient [N])."""
    return divergence.equation.value(s, t, divergence.beta)


def _reference_grad_(student: Tensor, teacher: Tensor, divergence: Divergence, state: Tensor, g: Tensor) -> Tensor:
    s, t = _log_probs(student, teacher, divergence, state)
    slope = divergence.equation.slope(s, t, state[:, 4, None], divergence.beta)
    g = (g / divergence.temperature)[:, None].to(slope.dtype)
    return student.copy_((slope * g).masked_fill_(g == 0, 0.0))
