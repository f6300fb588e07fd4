"""Preference losses over packed log-probs: segment sums, the formula of a pair or a completion, dL/dlogp; one launch each way.

The forward keeps one slope a sequence (dloss/dsum); the backward writes upstream * slope to its tokens. The formulas are those of
csrc/math/preference.h; an equation without one there runs as the plain torch function it is, on the same sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import preference_reference as reference
from .backend import backend_for, constant_when_compiled
from .offsets import as_int32
from .preference_native import pairs, singles
from .preference_reference import Side

TRANSFORMS = ("identity", "power", "js")


@dataclass(frozen=True)
class Formula:
    """A loss as csrc/math/preference.h knows it.

    Attributes:
        name: a formula of that file, or "torch": none, the equation is evaluated by torch.
        beta: multiplies the scores.
        first, second, target: what the formula calls so.
        nll: weight of the chosen completion's negative log-likelihood a token.
        per_token: scores are divided by the number of tokens.
        transform: of the scores: "identity", "power" ((e^(power * x) - 1) / power) or "js".
        power: its exponent.
    """

    name: str = "torch"
    beta: float = 1.0
    first: float = 1.0
    second: float = 0.0
    target: float = 0.0
    nll: float = 0.0
    per_token: bool = False
    transform: str = "identity"
    power: float = 0.0

    @property
    def pair_numbers(self) -> list[float]:
        transform = float(TRANSFORMS.index(self.transform))
        return [self.beta, self.first, self.second, self.target, self.nll, transform, self.power, float(self.per_token)]

    @property
    def single_numbers(self) -> list[float]:
        return [self.beta, self.first, self.second, self.target]


class Sequences(NamedTuple):
    """What the losses read beside the log-probs. The tensors get no gradient.

    Attributes:
        cu_targets: [S+1] int32 offsets; checked when they are on the CPU.
        ref_logp: [N] or, as sums, [S]; None: no reference.
        ref_per_token: which of the two.
        weight: [B] or None: 1.
        margin: [B] or None: 0 (pairs).
        tail: what a token past the length of its pair's shorter completion counts (pairs).
        fits: the native kernels on the CPU take all of these as they are (`preference_native.fits`); False: not known.
    """

    cu_targets: Tensor
    ref_logp: Tensor | None = None
    ref_per_token: bool = False
    weight: Tensor | None = None
    margin: Tensor | None = None
    tail: float = 1.0
    fits: bool = False


def pair_losses(logp: Tensor, sequences: Sequences, formula: Formula, equation: Callable[[Side, Side], Tensor]) -> tuple[Tensor, Tensor]:
    """Losses of pairs: sequences 2i (chosen) and 2i+1 (rejected) of packed log-probs.

    Args:
        logp: [N] fp32 or fp64, nats.
        sequences: 2B of them.
        formula: what the kernels evaluate.
        equation: the same in torch, for the reference and where the formula is "torch".

    Returns:
        [B] losses, differentiable in logp once, and [6, B] detached: rewards of chosen and rejected, their margin, whether it is > 0,
        log-probs of chosen and rejected. Sums and formulas in fp64, rounded to logp's dtype.
    """
    cu, ref, per_token, weight, margin, tail, ready = sequences
    if ready and formula.name != "torch":
        return pairs(logp, cu, ref, margin, weight, per_token, formula.name, formula.pair_numbers, tail)
    if formula.name == "torch" or not _runs_native(logp):
        cu = _offsets(sequences, logp, kernel=False)
        return reference.pair_losses(
            equation,
            logp,
            ref,
            cu,
            margin,
            weight,
            ref_per_token=per_token,
            beta=formula.beta,
            per_token=formula.per_token,
            tail=tail,
        )
    cu = _offsets(sequences, logp, kernel=True)
    return pairs(logp.contiguous(), cu, *_like(logp, ref, margin, weight), per_token, formula.name, formula.pair_numbers, tail)


def single_losses(
    logp: Tensor, sequences: Sequences, labels: Tensor, formula: Formula, equation: Callable[[Side, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Losses of completions on their own. labels: [B] bool, whether a completion is desirable.

    Returns:
        [B] losses, differentiable in logp once, and [2, B] detached: rewards and log-probs.
    """
    cu, ref, per_token, weight, _, _, ready = sequences
    if ready and formula.name != "torch":
        return singles(logp, cu, labels.contiguous(), ref, weight, per_token, formula.name, formula.single_numbers)
    if formula.name == "torch" or not _runs_native(logp):
        cu = _offsets(sequences, logp, kernel=False)
        return reference.single_losses(equation, logp, ref, cu, labels, weight, ref_per_token=per_token, beta=formula.beta)
    cu = _offsets(sequences, logp, kernel=True)
    return singles(logp.contiguous(), cu, labels.contiguous(), *_like(logp, ref, weight), per_token, formula.name, formula.single_numbers)


@constant_when_compiled
def _has_native(device: str) -> bool:
    return backend_for("preference", device) == "native"


def _runs_native(logp: Tensor) -> bool:
    return _has_native(logp.device.type)


def _like(logp: Tensor, *given: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else (t if t.dtype == logp.dtype and t.device == logp.device else t.to(logp)).contiguous() for t in given]


def _offsets(sequences: Sequences, logp: Tensor, *, kernel: bool) -> Tensor:
    """The offsets where the log-probs are. The native kernel checks int32 on the CPU itself."""
    cu = sequences.cu_targets
    if not (kernel and logp.is_cpu and cu.is_cpu and cu.dtype == torch.int32):
        cu = as_int32("preference: cu_targets", cu, logp.shape[0], of="log-probs")
    return cu.to(logp.device).contiguous()
