"""Variable-length attention: segments of queries, each with keys of its own, by the fastest route that can run the call.

A segment's queries see its keys causally from the end: the last query sees the last key (bottom-right alignment). Routes, in order:

1. "flash-attn": `flash_attn_varlen_func` of the optional package (extra `flash-attn`), with windows and soft-caps;
2. "torch varlen": `torch.nn.attention.varlen.varlen_attn`, windows from torch 2.11 on, no soft-cap;
3. "sdpa by segment": one SDPA with a mask a segment (a dense soft-max with a soft-cap), any device and dtype; slower, and says so.

The first two read bf16 and fp16 and head sizes that are multiples of 8 up to 256, on sm_80 and later.

What is bitwise on a GPU, and what is not:

- The route depends on the device, dtype, head size, window and soft-cap of a call, never on the batch: prefill and the trainer's forward of
  one model take the same one, unless autocast gives them different dtypes.
- 1 and 2 are asked not to split keys among blocks (`num_splits=1`, where the installed version has it), and then document the same bits for
  a sequence in any batch. Without it the number of splits may follow the batch where each sequence brings one query.
- Decode on fp32 and bf16 caches is a kernel of ours (csrc/cuda/attention.cu) with splits of 128 keys counted from the start: its bits
  do not depend on the batch, block size, shared prefixes or CUDA graphs, but they are not those of 1 or 2, which sum in another order.
  Other dtypes and head sizes decode on these routes.
- Linears and norms around the attention are torch's, and a matrix product may choose its kernel by the row count.

So the sampler's and the trainer's log-probs of a model agree on a GPU to rounding, not to the bit; `sampling/sampling_logp_difference`
reports by how much in every step. On the CPU one kernel serves all (ops/attention.py), and they agree to the bit.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..staging import to_device
from .attention_reference import attend

ROUTES = ("flash-attn", "torch varlen", "sdpa by segment")


@dataclass(frozen=True)
class Segments:
    """Which keys each run of queries sees.

    Attributes:
        bounds_q, bounds_k: [N+1] offsets of each segment's queries, and of its keys once they are gathered.
        cu_q, cu_k: the same, int32 on the device.
        keys: [K] int64 rows of k and v to gather, on the device; None: the first K rows as they are.
    """

    bounds_q: tuple[int, ...]
    bounds_k: tuple[int, ...]
    cu_q: Tensor
    cu_k: Tensor
    keys: Tensor | None = None

    @staticmethod
    def of(counts_q: list[int], counts_k: list[int], device: torch.device, keys: Tensor | None = None) -> Segments:
        """From the number of queries and keys of each segment."""
        bounds = [torch.tensor([0, *counts]).cumsum(0) for counts in (counts_q, counts_k)]
        q, k = (tuple(b.tolist()) for b in bounds)
        cu_q, cu_k, *rows = to_device(device, *(b.int() for b in bounds), *([] if keys is None else [keys]))
        return Segments(q, k, cu_q, cu_k, *rows)

    @functools.cached_property
    def max_q(self) -> int:
        """The most queries of a segment."""
        return max((b - a for a, b in zip(self.bounds_q, self.bounds_q[1:], strict=False)), default=0)

    @functools.cached_property
    def max_k(self) -> int:
        """The most keys of a segment."""
        return max((b - a for a, b in zip(self.bounds_k, self.bounds_k[1:], strict=False)), default=0)


def varlen_attention(
    route: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Queries [Tq, Hq, D] of the segments against their gathered keys and values [K, Hkv, D] → [Tq, Hq, D]."""
    if len(segments.bounds_q) == 1:
        return q * 1  # no rows, but a place in the graph
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    run = {"flash-attn": _flash, "torch varlen": _torch_varlen, "sdpa by segment": _by_segment}[route]
    return run(q, k, v, segments, scale, window, softcap)


def route_of(q: Tensor, window: int | None, softcap: float | None) -> str:
    """The fastest of ROUTES that can run the call; announces once that a call runs on the slow one."""
    fused = (
        q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    ) and _is_ampere(q.device)
    flash = _flash_function()
    if fused and flash is not None and (softcap is None or "softcap" in _parameters(flash)):
        return ROUTES[0]
    if (
        fused
        and softcap is None
        and _varlen_function() is not None
        and (window is None or "window_size" in _parameters(_varlen_function()))
    ):
        return ROUTES[1]
    _announce_slow(q.device.type, str(q.dtype).removeprefix("torch."), q.shape[2], softcap is not None)
    return ROUTES[2]


def available_routes() -> str:
    """The routes of this installation, fastest first, for `fastalign env`."""
    functions = zip(ROUTES, (_flash_function(), _varlen_function(), _by_segment), strict=True)
    return ", ".join(name for name, function in functions if function is not None)


def _flash(q: Tensor, k: Tensor, v: Tensor, s: Segments, scale: float, window: int | None, softcap: float | None) -> Tensor:
    options: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
    if "num_splits" in _parameters(_flash_function()):
        options["num_splits"] = 1
    return _flash_function()(  # type: ignore[misc]
        q,
        k,
        v,
        s.cu_q,
        s.cu_k,
        s.max_q,
        s.max_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **options,
    )


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, s: Segments, scale: float, window: int | None, _softcap: float | None) -> Tensor:
    function = _varlen_function()
    known = _parameters(function)
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:  # torch 2.10
        options["is_causal"] = True
    if "scale" in known:
        options["scale"] = scale
    elif scale != q.shape[2] ** -0.5:
        q = q * (scale * q.shape[2] ** 0.5)
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if "num_splits" in known and _takes_one_split(function, q.device):
        options["num_splits"] = 1
    return function(q, k, v, s.cu_q, s.cu_k, s.max_q, s.max_k, **options)  # type: ignore[misc]


def _by_segment(q: Tensor, k: Tensor, v: Tensor, s: Segments, scale: float, window: int | None, softcap: float | None) -> Tensor:
    group, parts = q.shape[1] // k.shape[1], []
    for i in range(len(s.bounds_q) - 1):
        part, keys, values = q[s.bounds_q[i] : s.bounds_q[i + 1]], *(x[s.bounds_k[i] : s.bounds_k[i + 1]] for x in (k, v))
        rows, columns = part.shape[0], keys.shape[0]
        at = torch.arange(columns - rows, columns, device=q.device)[:, None]
        key_at = torch.arange(columns, device=q.device)
        visible = (key_at <= at) if window is None else (key_at <= at) & (key_at > at - window)
        if softcap is not None:
            parts.append(attend(part, keys, values, visible, scale, softcap)[0])
            continue
        heads = (part.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(group, 0) for x in (keys, values)))
        causal = window is None and rows == columns
        batched = (x[None] for x in heads)
        out = F.scaled_dot_product_attention(*batched, attn_mask=None if causal else visible, is_causal=causal, scale=scale)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 8


@functools.cache
def _flash_function() -> Callable[..., Tensor] | None:
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError, OSError) as error:
        warnings.warn(f"fastalign: flash-attn is installed but cannot be used ({error}); attention takes another route.", stacklevel=2)
        return None


@functools.cache
def _varlen_function() -> Callable[..., Tensor] | None:
    try:
        return importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None


@functools.cache
def _takes_one_split(function: Callable[..., Tensor], device: torch.device) -> bool:
    """Whether varlen_attn runs with `num_splits=1`: a build may know the word and refuse it (ROCm does). Says so once."""
    x = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
    bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
    try:
        function(x, x, x, bounds, bounds, 1, 1, scale=1.0, window_size=(-1, 0), num_splits=1)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        warnings.warn(f"fastalign: varlen_attn refuses num_splits=1 ({error}); a sequence's bits may depend on its batch.", stacklevel=2)
        return False
    return True


def _parameters(function: Callable[..., Tensor] | None) -> frozenset[str]:
    assert function is not None
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def _announce_slow(device: str, dtype: str, head_dim: int, softcap: bool) -> None:
    call = f"{dtype}, head size {head_dim}{', soft-cap' if softcap else ''}"
    advice = "; install flash-attn for soft-caps" if softcap else ""
    warnings.warn(f"fastalign: attention over segments runs one SDPA a segment on {device} ({call}){advice}.", stacklevel=4)
