"""Drawing tokens: counter-based uniforms, and truncated inverse-CDF sampling in vocabulary order.

A draw is a function of its key (seed, request, sample, position) and of its row of logits alone, so it does not depend on
what else is in the batch, on when the request came, or on how often it was preempted.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fastalign.ops.backend import backend_for, backend_reading, load_native, load_triton

READS = dict.fromkeys(("native", "triton"), (torch.float32, torch.bfloat16))
MASK = 0xFFFFFFFF
ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC'11).

    Args:
        counter, key: 32-bit words in int64 tensors of one shape.

    Returns:
        Four random 32-bit words, likewise.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products; the sign bit is data
        c0, c1, c2, c3 = (high >> 32 & MASK) ^ c1 ^ k0, high & MASK, (low >> 32 & MASK) ^ c3 ^ k1, low & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def uniform(seed: Tensor, request: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """One uniform a key.

    Args:
        seed, request: [N] int64, all 64 bits used.
        sample, position: [N] int64, the low 32 bits used.

    Returns:
        [N] fp64 in [0, 1), multiples of 2**-53.
    """
    backend = backend_for("sample", seed.device)
    if backend != "reference":
        out = torch.empty(seed.shape, dtype=torch.float64, device=seed.device)
        _call(backend, "philox_uniform", *(key.contiguous() for key in (seed, request, sample, position)), out)
        return out
    words = philox((position & MASK, sample & MASK, request & MASK, request >> 32 & MASK), (seed & MASK, seed >> 32 & MASK))
    return (words[0] << 21 | words[1] >> 11).double() * 2.0**-53


def sample(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    *,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one token a row from softmax(softcap * tanh(logits / softcap) / temperature), truncated.

    The order is temperature, top-k, top-p of what top-k left, min-p; tokens equal to the last one kept are kept too.

    Args:
        logits: [N, V] fp32 or bf16, rows contiguous; -inf: never drawn.
        uniforms: [N] fp64 in [0, 1).
        temperature: [N] fp32; 0: the most probable token, the first of equals.
        top_k: [N] int64; 0: off.
        top_p: [N] fp32; 1: off.
        min_p: [N] fp32; 0: off.
        logit_softcap: None or > 0, applied before the temperature.

    Returns:
        (tokens [N] int64, kept [N] fp32): the token, and the probability that truncation left (1 where nothing was cut).
        The token is -1 where the row holds NaN or +inf, or nothing but -inf.

    Raises:
        ValueError: on shapes or dtypes that do not fit together.
    """
    _check(logits, uniforms, temperature, top_k, top_p, min_p)
    backend = backend_reading("sample", logits.device, READS, logits.dtype)
    if backend == "reference":
        return sample_reference(logits, uniforms, temperature, top_k, top_p, min_p, logit_softcap)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    kept = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    columns = (column.contiguous() for column in (uniforms, temperature, top_k, top_p, min_p))  # an expanded one has gaps
    _call(backend, "sample", logits, *columns, logit_softcap or 0.0, tokens, kept)
    return tokens, kept


def _call(backend: str, name: str, first: Tensor, *arguments: object) -> None:
    module = load_native()[0] if backend == "native" else load_triton("sample")
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        getattr(module, name)(first, *arguments)


def sample_reference(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample` in plain torch, fp64: the specification."""
    x = logits.double()
    greedy = x.argmax(1)
    x = x if logit_softcap is None else torch.where(x == -torch.inf, x, torch.tanh(x / logit_softcap) * logit_softcap)
    heat = torch.where(temperature > 0, temperature, 1.0).double()
    weight = torch.exp((x - x.amax(1, keepdim=True)) / heat[:, None])
    total = weight.sum(1)
    if bool(((top_k > 0) | (top_p < 1) | (min_p > 0)).any()):
        weight = torch.where(weight >= _threshold(weight, top_k, top_p, min_p)[:, None], weight, 0.0)
    cdf = weight.cumsum(1)
    drawn = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]
    last = weight.shape[1] - 1 - (weight > 0).flip(1).int().argmax(1)
    tokens = torch.where(temperature > 0, torch.minimum(drawn, last), greedy)
    kept = torch.where(temperature > 0, weight.sum(1) / total, 1.0).float()
    sound = torch.isfinite(total)
    return torch.where(sound, tokens, -1), torch.where(sound, kept, torch.nan)


def _threshold(weight: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[N] the smallest weight that is kept; weights are relative to the most probable token's, 1."""
    ordered = weight.sort(1, descending=True).values
    vocab = weight.shape[1]
    k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)
    at_k = ordered.gather(1, k[:, None] - 1)
    mass = torch.where(ordered >= at_k, ordered, 0.0).cumsum(1)
    enough = mass >= top_p.double()[:, None] * mass[:, -1:]
    at_p = ordered.gather(1, enough.int().argmax(1)[:, None])
    at_p = torch.where(top_p[:, None] < 1, at_p, 0.0)
    return torch.maximum(torch.maximum(at_k, at_p)[:, 0], min_p.double())


def _check(logits: Tensor, uniforms: Tensor, *columns: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"sample: logits must be floating-point [N, V], got {logits.dtype} {list(logits.shape)}")
    for name, column in zip(("uniforms", "temperature", "top_k", "top_p", "min_p"), (uniforms, *columns), strict=True):
        if column.shape != logits.shape[:1]:
            raise ValueError(f"sample: {name} must be [{logits.shape[0]}], one a row of logits, got {list(column.shape)}")
