"""Row kernels over logits that exist: log-prob of the target, entropy, and their gradient in place.

Training and sampling both come through here, so the sampler's log-prob is the trainer's, to the bit. A row's result
depends on that row alone: not on the number of rows, the threads or the chunk it came in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import backend_reading, load_native, load_triton

READS = dict.fromkeys(("native", "triton"), (torch.float32, torch.bfloat16))


def logp_rows(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, logit_softcap: float | None = None, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Log-probs of the targets under softmax(softcap * tanh(logits / softcap) / temperature).

    Args:
        logits: [N, V] fp32 or bf16, rows contiguous; -inf is allowed (probability 0).
        targets: [N] int64 in [0, V).
        temperature: divides the logits; > 0.
        logit_softcap: None or > 0, applied before the temperature.
        entropy: also return the entropy of each row.

    Returns:
        logp [N] fp32 nats, lse [N] fp32 (log-sum-exp), entropy [N] fp32 nats or None, correct [N] bool (the target is the
        first arg-max). Sums are fp32 within a block, fp64 across; a NaN logit makes its row NaN.

    Raises:
        ValueError: shapes, dtypes, temperature or softcap are wrong, or a CPU target lies outside the vocabulary.
    """
    inv_temperature, softcap = _scales("logp_rows", logits, targets, temperature, logit_softcap)
    backend = _backend(logits)
    if backend == "reference":
        return _reference_logp(logits, targets, inv_temperature, softcap, entropy)
    num_rows, device = logits.shape[0], logits.device
    logp, lse, row_entropy = (torch.empty(n, dtype=torch.float32, device=device) for n in (num_rows, num_rows, num_rows if entropy else 0))
    correct = torch.empty(num_rows, dtype=torch.bool, device=device)
    _call(backend, "logp_rows", logits, targets.contiguous(), inv_temperature, softcap, logp, lse, row_entropy, correct)
    return logp, lse, row_entropy if entropy else None, correct


def grad_rows_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Turn logits into their gradient, in place.

    dlogits = (g_logp * (onehot - p) - g_entropy * p * (log p + H)) / temperature * dsoftcap. Computed in fp32, stored in the
    dtype of the result. A row whose gradients are both zero becomes zeros, whatever its logits.

    Args:
        logits: [N, V] fp32 or bf16; overwritten.
        targets, lse, entropy: as given to and returned by `logp_rows`; entropy may be None when g_entropy is.
        g_logp: [N] fp32, dL/dlogp.
        g_entropy: [N] fp32, dL/dentropy, or None.
        temperature, logit_softcap: as in `logp_rows`.
        out: where the gradient goes, [N, V] in the dtype of the logits or, for fp32 logits, bf16; on the CPU it may be the
            first half of the logits' own rows. None: the logits.

    Returns:
        `out`.

    Raises:
        ValueError: as `logp_rows`, or g_entropy without entropy.
    """
    inv_temperature, softcap = _scales("grad_rows_", logits, targets, temperature, logit_softcap)
    if g_entropy is not None and entropy is None:
        raise ValueError("grad_rows_: g_entropy needs the rows' entropy: call logp_rows(..., entropy=True)")
    out = logits if out is None else out
    backend = _backend(logits)
    if backend == "reference" or out.dtype not in (logits.dtype, torch.bfloat16):
        return out.copy_(_reference_grad(logits, targets, lse, entropy, g_logp, g_entropy, inv_temperature, softcap))
    none = torch.empty(0, dtype=torch.float32, device=logits.device)
    row_entropy = none if entropy is None else entropy.contiguous()
    upstream = none if g_entropy is None else g_entropy.contiguous()
    arguments = (targets.contiguous(), lse.contiguous(), row_entropy, g_logp.contiguous(), upstream, inv_temperature, softcap)
    if backend == "native":
        _call(backend, "grad_rows", logits, *arguments, out)
        return out
    _call(backend, "grad_rows", logits, *arguments)
    return logits if out is logits else out.copy_(logits.to(out.dtype))  # through a temporary: out may be the logits' own memory


def check_scales(what: str, temperature: float, logit_softcap: float | None) -> None:
    """Raises ValueError unless both are positive and finite, or there is no soft-cap."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{what}: temperature must be > 0 and finite, got {temperature}; for greedy decoding take the arg-max")
    if logit_softcap is not None and not 0.0 < logit_softcap < math.inf:
        raise ValueError(f"{what}: logit_softcap must be > 0 and finite, or None for no cap, got {logit_softcap}")


def _scales(what: str, logits: Tensor, targets: Tensor, temperature: float, logit_softcap: float | None) -> tuple[float, float]:
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        shapes = f"logits {list(logits.shape)} and targets {list(targets.shape)}"
        raise ValueError(f"{what}: expected logits [N, V] and targets [N], got {shapes}")
    check_scales(what, temperature, logit_softcap)
    return 1.0 / temperature, logit_softcap or 0.0


def _backend(logits: Tensor) -> str:
    return backend_reading("linear_logp", logits.device, READS, logits.dtype)


def _call(backend: str, name: str, logits: Tensor, targets: Tensor, *arguments: object) -> None:
    module = load_native()[0] if backend == "native" else load_triton("linear_logp")
    if backend == "triton":
        _check_targets(targets, logits.shape[1])
    if not logits.is_cuda:
        getattr(module, name)(logits, targets, *arguments)
        return
    with torch.cuda.device(logits.device):
        if backend == "native":
            getattr(module, name + "_cuda")(logits, targets, *arguments, torch.cuda.current_stream().cuda_stream)
        else:
            getattr(module, name)(logits, targets, *arguments)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _soften(logits: Tensor, inv_temperature: float, softcap: float) -> Tensor:
    z = _wide(logits)
    capped = torch.where(z == -torch.inf, z, torch.tanh(z / softcap) * softcap) if softcap else z  # -inf stays, as probability 0
    return capped * inv_temperature


def _check_targets(targets: Tensor, vocab: int) -> None:
    if targets.device.type != "cpu":
        return
    bad = ((targets < 0) | (targets >= vocab)).nonzero()
    if len(bad):
        row = int(bad[0])
        got = f"got {int(targets[row])} at row {row}"
        raise ValueError(f"logp_rows: targets must be in [0, vocab size {vocab}), {got}; is the tokenizer larger than the head?")


def _reference_logp(
    logits: Tensor, targets: Tensor, inv_temperature: float, softcap: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The specification: fp32, or fp64 for fp64 logits; one extra [N, V] buffer or two."""
    _check_targets(targets, logits.shape[1])
    z = _soften(logits, inv_temperature, softcap)
    lse = torch.logsumexp(z, 1)
    logp_all = torch.log_softmax(z, 1)
    logp = logp_all.gather(1, targets[:, None]).squeeze(1)
    correct = (logits.argmax(1) == targets) & ~logp.isnan()
    row_entropy = torch.special.entr(logp_all.exp()).sum(1) if entropy else None
    return logp, lse, row_entropy, correct


def _reference_grad(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    inv_temperature: float,
    softcap: float,
) -> Tensor:
    _check_targets(targets, logits.shape[1])
    logp = _soften(logits, inv_temperature, softcap) - lse[:, None]
    p = logp.exp()
    grad = -g_logp[:, None] * p
    if g_entropy is not None and entropy is not None:
        grad -= g_entropy[:, None] * p * (logp.clamp(min=-100.0) + entropy[:, None])
    grad.scatter_add_(1, targets[:, None], g_logp[:, None].to(grad.dtype))
    grad *= inv_temperature
    if softcap:
        grad *= 1 - torch.tanh(_wide(logits) / softcap) ** 2
    dead = g_logp == 0 if g_entropy is None else (g_logp == 0) & (g_entropy == 0)
    return grad.masked_fill_(dead[:, None], 0.0)
