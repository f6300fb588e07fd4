"""Backward scans over packed sequences: generalized advantage estimation and discounted returns.

Both are affine recurrences y_t = shift_t + scale_t * y_{t+1} inside each sequence. The CPU kernel walks each sequence backwards
once, the CUDA kernel scans all tokens at once; the reference composes the maps by doubling, in log2(longest) vectorized steps
on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import backend_for, load_native
from .offsets import as_int32

_NONE = torch.empty(0, dtype=torch.float32)  # stands for an optional tensor in a native call


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438, Eq. 16) over packed sequences.

    advantage_t = delta_t + gamma * lam * advantage_{t+1}, delta_t = reward_t + gamma * value_{t+1} - value_t, where t + 1 is the
    next token of the sequence that is not a hole.

    Args:
        rewards: [T] fp32 or fp64.
        values: [T], same dtype.
        cu_seqlens: [S+1] int32 offsets from 0 to T; empty sequences are allowed. Offsets in CUDA memory are not checked (that would
            wait for the device): wrong ones do no harm but give NaN to tokens that no sequence holds.
        gamma: discount a token.
        lam: one number, or [S] one a sequence.
        mask: [T] bool, False for a hole (an environment's token): advantage and value go through it unchanged, its reward is not
            read, and its own entry of the result repeats the advantage that comes after it.
        bootstrap: [S] value after the last token, for sequences that were cut; 0 when None.

    Returns:
        advantages [T] and returns [T] = advantages + values, in the dtype of the rewards; no gradient flows through them.

    Raises:
        ValueError: shapes, dtypes, devices or offsets are wrong.
    """
    num_tokens, num_sequences = _check("gae", rewards, cu_seqlens, gamma=gamma, **({} if isinstance(lam, Tensor) else {"lam": lam}))
    _expect("gae: values", values, rewards, rewards.dtype, num_tokens)
    if mask is not None:
        _expect("gae: mask", mask, rewards, torch.bool, num_tokens)
    if bootstrap is not None:
        _expect("gae: bootstrap", bootstrap, rewards, rewards.dtype, num_sequences)
    if isinstance(lam, Tensor):
        _expect("gae: lam", lam, rewards, lam.dtype, num_sequences)
    if backend_for("scan", rewards.device) != "native":
        lams = torch.as_tensor(lam, dtype=torch.float64, device=rewards.device).expand(num_sequences)
        return _reference_gae(rewards, values, as_int32("gae: cu_seqlens", cu_seqlens.cpu(), num_tokens), gamma, lams, mask, bootstrap)
    contiguous = torch.contiguous_format
    advantages, returns = torch.empty_like(rewards, memory_format=contiguous), torch.empty_like(rewards, memory_format=contiguous)
    masked = _NONE if mask is None else mask.contiguous()
    ends = _NONE if bootstrap is None else bootstrap.contiguous()
    lams, constant = (lam.to(torch.float64).contiguous(), 0.0) if isinstance(lam, Tensor) else (_NONE, float(lam))
    options = (_beside("gae", rewards, cu_seqlens), masked, ends, lams, constant, gamma)
    _call("gae", rewards.contiguous(), values.contiguous(), *options, advantages, returns)
    return advantages, returns


@torch.no_grad()
def discounted_returns(rewards: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0) -> Tensor:
    """return_t = reward_t + gamma * return_{t+1} over packed sequences.

    Args:
        rewards: [T] fp32 or fp64.
        cu_seqlens: [S+1] int32 offsets from 0 to T; empty sequences are allowed. Offsets in CUDA memory are not checked (that would
            wait for the device): wrong ones do no harm but give NaN to tokens that no sequence holds.
        gamma: discount a token.

    Returns:
        [T], in the dtype of the rewards; no gradient flows through it.

    Raises:
        ValueError: shapes, dtypes, devices or offsets are wrong.
    """
    num_tokens, _ = _check("discounted_returns", rewards, cu_seqlens, gamma=gamma)
    if backend_for("scan", rewards.device) != "native":
        scale = torch.full_like(rewards, gamma, dtype=torch.float64)
        return _reference_scan(scale, rewards.double(), as_int32("discounted_returns: cu_seqlens", cu_seqlens.cpu(), num_tokens)).to(
            rewards.dtype
        )
    returns = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    _call("discounted_returns", rewards.contiguous(), _beside("discounted_returns", rewards, cu_seqlens), gamma, returns)
    return returns


def _call(name: str, rewards: Tensor, *arguments: object) -> None:
    module, _ = load_native()
    assert module is not None
    if rewards.is_cuda:
        workspace = rewards.new_empty(module.scan_workspace(len(rewards)), dtype=torch.float64)
        with torch.cuda.device(rewards.device):
            getattr(module, name + "_cuda")(rewards, *arguments, workspace, torch.cuda.current_stream().cuda_stream)
    else:
        getattr(module, name)(rewards, *arguments)


def _beside(what: str, rewards: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The offsets as int32 where the rewards are, checked when they are on the CPU; a copy to a GPU is queued, nothing waits for it."""
    if rewards.is_cuda or cu_seqlens.dtype != torch.int32:  # the native kernel checks int32 on the CPU itself
        cu_seqlens = as_int32(f"{what}: cu_seqlens", cu_seqlens, len(rewards))
    return cu_seqlens.to(rewards.device, non_blocking=rewards.is_cuda).contiguous()


def _expect(what: str, tensor: Tensor, rewards: Tensor, dtype: torch.dtype, size: int) -> None:
    if tensor.dtype != dtype or tensor.shape != (size,):
        raise ValueError(f"{what}: expected {dtype} [{size}], got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != rewards.device:
        raise ValueError(f"{what}: expected a tensor on {rewards.device}, where the rewards are, got one on {tensor.device}")


def _check(what: str, rewards: Tensor, cu_seqlens: Tensor, **numbers: float) -> tuple[int, int]:
    """The number of tokens and of sequences."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{what}: {name} must be a finite number, got {value}")
    if rewards.dim() != 1 or rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{what}: rewards: expected float32 or float64 [T], got {rewards.dtype} {list(rewards.shape)}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{what}: cu_seqlens: expected offsets [S+1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.is_floating_point():
        raise ValueError(f"{what}: cu_seqlens: expected integer offsets, got {cu_seqlens.dtype}")
    return len(rewards), len(cu_seqlens) - 1


def _reference_gae(
    rewards: Tensor, values: Tensor, cu: Tensor, gamma: float, lams: Tensor, mask: Tensor | None, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    device, num_tokens = rewards.device, len(rewards)
    sequence, ends = _owners(cu, device)
    valid = torch.ones(num_tokens, dtype=torch.bool, device=device) if mask is None else mask
    tokens = torch.arange(num_tokens, device=device)
    here_or_after = torch.where(valid, tokens, num_tokens).flip(0).cummin(0).values.flip(0) if num_tokens else tokens
    after = torch.cat((here_or_after[1:], here_or_after.new_full((min(num_tokens, 1),), num_tokens)))
    tail = torch.zeros(len(cu) - 1, dtype=torch.float64, device=device) if bootstrap is None else bootstrap.double()
    last = max(num_tokens - 1, 0)
    next_value = torch.where(after < ends, values.double()[after.clamp(max=last)], tail[sequence])
    delta = rewards.double() + gamma * next_value - values.double()
    scale, shift = torch.where(valid, gamma * lams[sequence], 1.0), torch.where(valid, delta, 0.0)
    advantages = _reference_scan(scale, shift, cu)
    return advantages.to(rewards.dtype), (advantages + values.double()).to(rewards.dtype)


def _owners(cu: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each token's sequence, and where that sequence ends."""
    lengths = (cu[1:] - cu[:-1]).long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return sequence.to(device), cu.long()[1:][sequence].to(device)


def _reference_scan(scale: Tensor, shift: Tensor, cu: Tensor) -> Tensor:
    """y_t = shift_t + scale_t * y_{t+1} in each sequence: after k steps a token's map spans 2^k tokens."""
    _, ends = _owners(cu, shift.device)
    tokens = torch.arange(len(shift), device=shift.device)
    longest = int((cu[1:] - cu[:-1]).max()) if len(cu) > 1 else 0
    step = 1
    while step < longest:
        inside = tokens + step < ends
        other = (tokens + step).clamp(max=len(shift) - 1)
        shift = torch.where(inside, shift + scale * shift[other], shift)
        scale = torch.where(inside, scale * scale[other], scale)
        step *= 2
    return shift
