"""What is checked before a preference loss runs: shapes, names, options, and that nothing that was given is ignored."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign import catalogue
from fastalign.ops.preference import Formula, Sequences

from .divergences import DIVERGENCES
from .preference import PREFERENCE, PairLoss
from .unpaired import UNPAIRED, UnpairedLoss

POSITIVE = ("beta", "tau")  # options that divide, or whose sign is the loss's


class Plan(NamedTuple):
    """A row with its options: what the kernels evaluate, and the same in torch."""

    row: Any
    formula: Formula
    equation: Callable[..., Tensor]


def pair_plan(loss: str | PairLoss, options: Mapping[str, Any] | None, divergence: str, divergence_alpha: float) -> Plan:
    """The plan of a pair loss. Remembered for options that are numbers: making one takes as long as evaluating it."""
    given = tuple(options.items()) if options else ()
    if torch.compiler.is_compiling() or any(isinstance(value, Tensor) for _, value in given):
        return _plan_pairs(loss, given, divergence, divergence_alpha)
    return _known_pairs(loss, given, divergence, divergence_alpha)


def single_plan(loss: str | UnpairedLoss, options: Mapping[str, Any] | None) -> Plan:
    """The plan of an unpaired loss."""
    given = tuple(options.items()) if options else ()
    if torch.compiler.is_compiling() or any(isinstance(value, Tensor) for _, value in given):
        return _plan_singles(loss, given)
    return _known_singles(loss, given)


def _plan_pairs(loss: str | PairLoss, given: tuple[tuple[str, Any], ...], divergence: str, divergence_alpha: float) -> Plan:
    row, chosen, formula = _resolve("preference_loss", PREFERENCE, loss, dict(given))
    if divergence not in DIVERGENCES:
        raise ValueError(f"preference_loss: divergence: {catalogue.nearest(divergence, DIVERGENCES)}")
    kind = DIVERGENCES[divergence]
    if divergence != "reverse_kl" and not row.divergence:
        raise ValueError(f"preference_loss: {loss} does not read the divergence {divergence}; leave it out")
    if kind.transform != "identity":
        power = kind.power(divergence_alpha)
        formula = replace(formula, transform=kind.transform if power or kind.transform == "js" else "identity", power=power)
    return Plan(row, formula, functools.partial(row, divergence=divergence, divergence_alpha=divergence_alpha, **chosen))


def _plan_singles(loss: str | UnpairedLoss, given: tuple[tuple[str, Any], ...]) -> Plan:
    row, chosen, formula = _resolve("unpaired_loss", UNPAIRED, loss, dict(given))
    return Plan(row, formula, functools.partial(row, **chosen))


_known_pairs = functools.lru_cache(maxsize=256)(_plan_pairs)
_known_singles = functools.lru_cache(maxsize=256)(_plan_singles)


def count(op: str, logp: Tensor, cu_targets: Tensor, unit: int) -> int:
    """How many pairs or completions there are."""
    if logp.dim() != 1 or logp.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: logp: expected float32 or float64 [N], got {logp.dtype} {list(logp.shape)}")
    if cu_targets.dim() != 1 or cu_targets.is_floating_point() or cu_targets.shape[0] % unit != 1 % unit or not cu_targets.shape[0]:
        what = "[2B+1]: two sequences a pair" if unit == 2 else "[B+1]"
        raise ValueError(f"{op}: cu_targets: expected integer offsets {what}, got {cu_targets.dtype} {list(cu_targets.shape)}")
    return (cu_targets.shape[0] - 1) // unit


def reference_form(op: str, ref_logp: Tensor | None, num_tokens: int, cu_targets: Tensor, unit: int) -> tuple[Tensor | None, bool]:
    """The reference's log-probs, and whether they are one a token; else they are sums [S]."""
    num = cu_targets.shape[0] - 1
    if ref_logp is None:
        return None, False
    if ref_logp.shape == (num // unit, unit):
        return ref_logp.reshape(-1), False
    if ref_logp.shape not in ((num_tokens,), (num,)):
        raise ValueError(f"{op}: ref_logp: expected [{num_tokens}] a token or sums [{num}], got {list(ref_logp.shape)}")
    if num == num_tokens and not torch.compiler.is_compiling() and bool((cu_targets.diff() != 1).any()):
        raise ValueError(f"{op}: ref_logp [{num}] could be tokens or sums; give sums as [{num // unit}, {unit}]")
    return ref_logp, ref_logp.shape[0] == num_tokens


def expect(op: str, name: str, given: Tensor | None, num: int) -> None:
    if given is not None and given.shape != (num,):
        raise ValueError(f"{op}: {name}: expected [{num}], got {list(given.shape)}")


def _resolve(op: str, table: Mapping[str, Any], loss: Any, options: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any], Formula]:
    """The row, all of its options, and the formula that the kernels evaluate."""
    if isinstance(loss, str) and loss not in table:
        raise ValueError(f"{op}: loss: {catalogue.nearest(loss, table)}")
    row = table[loss] if isinstance(loss, str) else loss
    chosen = {**row.options, **(options or {})}
    for name, value in chosen.items():
        if name not in row.options:
            raise ValueError(f"{op}: options of {loss}: {catalogue.nearest(name, row.options)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{op}: {name} must be finite, got {value}")
        if name in POSITIVE and not value > 0:
            raise ValueError(f"{op}: {name} must be > 0, got {value}")
        if name == "label_smoothing" and not isinstance(value, Tensor) and not 0 <= value < 1:
            raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {value}")
    if isinstance(chosen.get("label_smoothing"), Tensor):
        return row, chosen, _soft_formula(op, loss, row, chosen)
    if torch.compiler.is_compiling() and any(isinstance(value, Tensor) for value in chosen.values()):
        return row, chosen, Formula(beta=chosen.get("beta", 1.0))  # its number cannot be read while tracing
    return row, chosen, row.formula(**chosen)


def _soft_formula(op: str, loss: Any, row: Any, chosen: dict[str, Any]) -> Formula:
    """Of labels that differ from pair to pair: no kernel has it, torch evaluates the equation."""
    if not getattr(row, "soft", False):
        able = ", ".join(name for name, other in PREFERENCE.items() if other.soft)
        raise ValueError(f"{op}: {loss} reads one label_smoothing, not one a pair; these read both: {able}")
    if not torch.compiler.is_compiling() and not bool(((chosen["label_smoothing"] >= 0) & (chosen["label_smoothing"] <= 1)).all()):
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {chosen['label_smoothing'].tolist()[:16]}")
    return replace(row.formula(**{**chosen, "label_smoothing": 0.0}), name="torch")


def check_read(loss: str | PairLoss, row: PairLoss, sequences: Sequences) -> None:
    """Nothing that is given may be ignored."""
    ref = sequences.ref_logp
    if sequences.tail != 1.0 and ref is not None and not sequences.ref_per_token:
        raise ValueError("preference_loss: ld_alpha weighs tokens; give ref_logp a token [N], not sums")
    if ref is not None and not row.reference:
        raise ValueError(f"preference_loss: {loss} does not read ref_logp; leave it out")
    if sequences.margin is not None and not row.margin:
        raise ValueError(f"preference_loss: {loss} does not read margin; leave it out")
