"""Per-token log-probs → policy-gradient loss, its gradient and metrics, in one launch.

The kernels write dL/dlogp beside the loss, so that backward only scales it. A row of `POLICY` without a kernel, and inputs or
devices that no kernel reads, take the torch equations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backend import backend_for, constant_when_compiled, load_native
from .offsets import as_int32
from .once import once, unscaled
from .policy_equations import ADVANTAGES, CORRECTIONS, KINDS, KL, POLICY, Kernel, PolicyLoss
from .policy_reference import PolicyInputs, policy_reference

SUMS = ("loss", "clip_low", "clip_high", "kl", "ratio", "approx_kl", "entropy", "correction", "correction_clipped")
LEAST = {"epsilon": 0.0, "epsilon_high": 0.0}  # options that must be this or more
ABOVE = {"dual_clip": 1.0, "tau_positive": 0.0, "tau_negative": 0.0}  # and more than this


@dataclass(frozen=True)
class PolicyOptions:
    """The terms beside the policy loss.

    Attributes:
        kl: the estimator of the KL to the reference, a row of `KL`.
        kl_coef: its coefficient.
        entropy_coef: coefficient of the entropy bonus.
        correction: weight of samples that another policy drew, from ρ = exp(old_logp - sampler_logp), detached: "truncate" min(ρ, high)
            (TIS), "mask" ρ inside [low, high] and 0 outside (IcePop, arXiv:2510.18855), "sequence_truncate", "sequence_mask" the same
            with the product of a sequence's ρ, "none". It weighs the policy loss alone, not KL and entropy.
        correction_low, correction_high: its range; the default high is TIS's, IcePop's paper has [0.5, 5].
    """

    kl: str = "k3"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    correction: str = "none"
    correction_low: float = 0.5
    correction_high: float = 2.0

    def __post_init__(self) -> None:
        for name, value, rows in (("kl", self.kl, tuple(KL)), ("correction", self.correction, CORRECTIONS)):
            if value not in rows:
                raise ValueError(f"PolicyOptions: {name}: expected one of {', '.join(rows)}, got {value!r}")
        for name in ("kl_coef", "entropy_coef", "correction_low", "correction_high"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"PolicyOptions: {name}: expected a finite number, got {getattr(self, name)}")
        if not 0 <= self.correction_low <= self.correction_high:
            found = f"{self.correction_low}, {self.correction_high}"
            raise ValueError(f"PolicyOptions: expected 0 <= correction_low <= correction_high, got {found}")


NO_TERMS = PolicyOptions()


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    loss: str = "clip",
    cu_targets: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    options: PolicyOptions = NO_TERMS,
    **loss_options: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weights · (correction · loss + kl_coef · KL - entropy_coef · entropy) over tokens, differentiable in logp and entropy.

    Args:
        logp: [N] fp32 or fp64, nats, of the sampled tokens.
        old_logp: [N] those of the policy that the ratio is taken against; None: logp itself, detached (ratio 1).
        advantages: [N].
        weights: [N] each token's share of the scalar, global divisors inside (`losses.policy.token_weights`); at 0 a token has no loss.
        loss: a row of `losses.policy.POLICY`; its own arguments are further keywords (`epsilon=0.2`).
        cu_targets: [B+1] integer offsets of the sequences; for rows and corrections that take a sequence's ratio.
        ref_logp: [N] the reference's, for the KL.
        sampler_logp: [N] those of the engine that sampled, for the correction.
        entropy: [N] nats.
        options: KL, entropy and correction.

    Returns:
        The scalar in logp's dtype (sums in fp64), and detached sums over tokens: clip_low, clip_high (tokens outside the clip range on
        the side that matters), ratio, approx_kl (½ log-ratio²), with their inputs kl, entropy, correction and correction_clipped.
        A token of advantage 0 gets a gradient of exactly 0 from the loss; log-ratios saturate at ±20, where the gradient is 0.

    Raises:
        ValueError: unknown row or option, an option out of range (epsilon < 0, dual_clip <= 1, tau <= 0), shapes, dtypes or devices
            that differ, offsets that do not cover the tokens, a term whose input is missing.
        RuntimeError: on a second differentiation.
    """
    row = _row(loss)
    inputs = _checked(logp, old_logp, advantages, weights, ref_logp, sampler_logp, entropy, cu_targets, row, options)
    compiling = torch.compiler.is_compiling()  # it does not look into caches
    kernel = (_kernel.__wrapped__ if compiling else _kernel)(loss, row, tuple(sorted(loss_options.items())))
    if kernel is None or not _has_kernel(logp):
        return policy_reference(inputs, row, loss_options, kernel, options)
    codes, numbers = (_plan.__wrapped__ if compiling else _plan)(kernel, options)
    run = _traced if compiling else _Policy.apply
    scalar, sums = run(logp, entropy, inputs, codes, numbers)
    return scalar, _named(sums, inputs, options)


def _named(sums: Tensor, inputs: PolicyInputs, options: PolicyOptions) -> dict[str, Tensor]:
    found = dict(zip(SUMS, sums.unbind(), strict=True))
    absent = {"loss"} | ({"kl"} if inputs.ref_logp is None else set()) | ({"entropy"} if inputs.entropy is None else set())
    if inputs.sampler_logp is None or options.correction == "none":
        absent |= {"correction", "correction_clipped"}
    return {name: value for name, value in found.items() if name not in absent}


def _row(loss: str) -> PolicyLoss:
    if loss not in POLICY:
        raise ValueError(f"policy_loss: no loss named {loss!r}; rows: {', '.join(POLICY)}")
    return POLICY[loss]


@functools.lru_cache(maxsize=256)
def _kernel(loss: str, row: PolicyLoss, items: tuple[tuple[str, Any], ...]) -> Kernel | None:
    """The row's form for kernels with its options and their defaults; unknown options raise."""
    known = row.function.__kwdefaults__ or {}
    for name, value in items:
        if name not in known:
            raise ValueError(f"policy_loss: {loss} has no option {name!r}; options: {', '.join(known) or 'none'}")
        _check_range(loss, name, value, may_be_none=known[name] is None)
    return None if row.kernel is None else row.kernel(**known | dict(items))


def _check_range(loss: str, name: str, value: Any, *, may_be_none: bool) -> None:
    """NaN fails; None passes where it means something."""
    if name not in LEAST and name not in ABOVE:
        return
    if value is None and (may_be_none or name == "epsilon_high"):
        return
    least, sign = (LEAST[name], ">=") if name in LEAST else (ABOVE[name], ">")
    if value is None or not (value >= least if sign == ">=" else value > least):
        raise ValueError(f"policy_loss: {loss}: {name} must be {sign} {least:g}, got {value}")


@functools.lru_cache(maxsize=256)
def _plan(kernel: Kernel, options: PolicyOptions) -> tuple[list[int], list[float]]:
    """The codes and numbers of math::Policy (csrc/math/policy.h), in its order."""
    kl, correction = 1 + list(KL).index(options.kl), CORRECTIONS.index(options.correction)
    codes = [KINDS.index(kernel.kind), ADVANTAGES.index(kernel.advantage), kl, correction]
    own = [kernel.low, kernel.high, kernel.dual_clip, kernel.tau_positive, kernel.tau_negative, kernel.log_epsilon]
    return codes, [*own, options.kl_coef, options.entropy_coef, options.correction_low, options.correction_high]


def _checked(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    entropy: Tensor | None,
    cu_targets: Tensor | None,
    row: PolicyLoss,
    options: PolicyOptions,
) -> PolicyInputs:
    if logp.dim() != 1 or logp.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"policy_loss: logp: expected float32 or float64 [N], got {logp.dtype} {list(logp.shape)}")
    given = {"old_logp": old_logp, "advantages": advantages, "weights": weights, "ref_logp": ref_logp, "sampler_logp": sampler_logp}
    for name, value in {**given, "entropy": entropy}.items():
        if value is not None and (value.shape != logp.shape or value.dtype != logp.dtype or value.device != logp.device):
            want = f"{logp.dtype} {list(logp.shape)} on {logp.device}"
            raise ValueError(f"policy_loss: {name}: expected {want}, got {value.dtype} {list(value.shape)} on {value.device}")
    needs = (
        ("ref_logp", ref_logp, options.kl_coef != 0, f"kl_coef {options.kl_coef}"),
        ("entropy", entropy, options.entropy_coef != 0, f"entropy_coef {options.entropy_coef}"),
        ("sampler_logp", sampler_logp, options.correction != "none", f"correction {options.correction!r}"),
        ("cu_targets", cu_targets, row.unit == "sequence", "a sequence ratio"),
        ("cu_targets", cu_targets, options.correction.startswith("sequence"), f"correction {options.correction!r}"),
    )
    for name, value, needed, by in needs:
        if needed and value is None:
            raise ValueError(f"policy_loss: {by} needs {name}")
    old = logp if old_logp is None else old_logp
    ref, sampler = (None if t is None else t.detach() for t in (ref_logp, sampler_logp))
    offsets = torch.tensor([0, len(logp)], dtype=torch.int32) if cu_targets is None else _offsets(cu_targets, len(logp))
    return PolicyInputs(logp, old.detach(), advantages.detach(), weights.detach(), ref, sampler, entropy, offsets)


def _offsets(cu_targets: Tensor, num_tokens: int) -> Tensor:
    """int32, checked where reading them costs no synchronization."""
    if cu_targets.dim() != 1 or cu_targets.numel() < 1 or cu_targets.is_floating_point():
        raise ValueError(f"policy_loss: cu_targets: expected integers [B+1], got {cu_targets.dtype} {list(cu_targets.shape)}")
    return as_int32("policy_loss: cu_targets", cu_targets, num_tokens)


@constant_when_compiled
def _backend(device: str) -> str:
    return backend_for("policy", device)


def _has_kernel(logp: Tensor) -> bool:
    backend = _backend(logp.device.type)
    return backend == "native" or (backend == "triton" and logp.dtype == torch.float32)


def _launch(inputs: PolicyInputs, codes: list[int], numbers: list[float]) -> tuple[Tensor, Tensor]:
    """(grad [N], sums [9] fp64)."""
    inputs = PolicyInputs(*(t if t is None else t.detach().contiguous() for t in inputs))
    grad = torch.empty_like(inputs.logp)
    if backend_for("policy", inputs.logp.device) == "triton":
        from fastalign.kernels.policy import policy

        with torch.cuda.device_of(grad):  # Triton launches on the current device
            return grad, policy(inputs, codes, numbers, grad)
    none = inputs.logp.new_empty(0)
    sums = torch.empty(len(SUMS), dtype=torch.float64)
    module, _ = load_native()
    assert module is not None
    tokens = (none if t is None else t for t in inputs[:-1])
    module.policy(*tokens, inputs.cu_targets.cpu(), codes, numbers, grad, sums)
    return grad, sums


def _scaled(grad: Tensor, g: Tensor) -> Tensor:
    return unscaled(grad) if g.device.type == "cpu" and g.item() == 1.0 else grad * g


class _Policy(torch.autograd.Function):
    """(logp, entropy | None, ...) → (scalar, sums); a plain Function costs half of what the dispatcher's op costs."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, entropy: Tensor | None, inputs: PolicyInputs, codes: list[int], numbers: list[float]
    ) -> tuple[Tensor, Tensor]:
        grad, sums = _launch(inputs, codes, numbers)
        ctx.entropy_coef = numbers[7]
        ctx.save_for_backward(logp, entropy, grad, inputs.weights)
        ctx.mark_non_differentiable(sums)
        return sums[0].to(logp.dtype, copy=True), sums

    @staticmethod
    def backward(ctx: Any, g: Tensor, _sums: Tensor) -> Any:
        logp, entropy, grad, weights = ctx.saved_tensors
        d_entropy = None
        if entropy is not None and ctx.needs_input_grad[1]:
            d_entropy = once("policy_loss", weights * (g * -ctx.entropy_coef), logp, entropy)
        inputs = (logp,) if entropy is None else (logp, entropy)
        return once("policy_loss", _scaled(grad, g), *inputs), d_entropy, None, None, None


def _traced(logp: Tensor, entropy: Tensor | None, inputs: PolicyInputs, codes: list[int], numbers: list[float]) -> tuple[Tensor, Tensor]:
    """The same for torch.compile and torch.func: the op runs on detached inputs, a term of value 0 carries its gradient."""
    scalar, grad, sums = policy_op(*(t if t is None else t.detach() for t in inputs), codes, numbers)
    scalar = scalar + _nothing(logp, grad)
    if entropy is not None and numbers[7]:
        scalar = scalar + _nothing(entropy, -numbers[7] * inputs.weights)
    return scalar, sums


def _nothing(x: Tensor, slope: Tensor) -> Tensor:
    """0, of which d/dx is the slope. Infinite x are left out, their loss is of no use; so is what has no slope, NaN or not."""
    return (slope * torch.where(x.isinf() | (slope == 0), torch.zeros_like(x), x - x.detach())).sum()


@torch.library.custom_op("fastalign::policy", mutates_args=())
def policy_op(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    entropy: Tensor | None,
    cu_targets: Tensor,
    codes: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """(scalar, dscalar/dlogp [N], sums [9] fp64); not differentiable by itself."""
    inputs = PolicyInputs(logp, old_logp, advantages, weights, ref_logp, sampler_logp, entropy, cu_targets)
    grad, sums = _launch(inputs, codes, numbers)
    return sums[0].to(logp.dtype, copy=True), grad, sums


@policy_op.register_fake
def _(logp, *_rest):  # type: ignore[no-untyped-def]
    return logp.new_empty(()), torch.empty_like(logp), logp.new_empty(len(SUMS), dtype=torch.float64)
