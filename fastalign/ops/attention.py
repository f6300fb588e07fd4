"""Attention that reads a token tree (training, scoring) and attention that reads a paged cache (generation).

Both run one kernel core with a fixed order of reduction: keys are taken in blocks of 64 logical positions counted from
the start of the sequence, each (query, head) row keeps its own online softmax, and no row's arithmetic depends on how
rows are tiled or batched or on the cache's block size. So the tree forward, prefill and decode agree to the bit.

That is the CPU. On CUDA trees and prefill are variable-length attention (ops/attention_varlen.py) and decode is a kernel of its own
(csrc/cuda/attention.cu), whose bits do not depend on the batch but are not those of the tree; attention_routes.py says what is bitwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalign.ops import attention_paged, attention_varlen
from fastalign.ops import attention_reference as reference
from fastalign.ops.backend import announce, backend_for, constant_when_compiled, forced_backend, native
from fastalign.ops.once import once

READS = (torch.float32, torch.bfloat16)  # of the kernels


@dataclass(frozen=True)
class TreeLayout:
    """A packed token tree, for training and scoring.

    A token attends to every token of the segments its own continues, and causally to its own segment.

    Attributes:
        cu_seqlens: [S+1] int32 on the CPU; segment s is rows cu_seqlens[s]:cu_seqlens[s+1].
        parent: [S] int32 on the CPU; the segment that s continues, -1 for a root; parents come first.
    """

    cu_seqlens: Tensor
    parent: Tensor

    def __post_init__(self) -> None:
        for name, value, size in (("cu_seqlens", self.cu_seqlens, self.parent.numel() + 1), ("parent", self.parent, self.parent.numel())):
            if value.dtype != torch.int32 or value.device.type != "cpu" or value.shape != (size,):
                found = f"{value.dtype} {list(value.shape)} on {value.device}"
                raise ValueError(f"TreeLayout: {name} must be torch.int32 [{size}] on the CPU, got {found}")


@dataclass(frozen=True)
class PagedLayout:
    """One step of generation: S live sequences, each with its new tokens of this step (a prefill chunk or one token).

    Lengths and tables live on the CPU, where a step is planned; slots and caches on the device.

    Attributes:
        cu_seqlens: [S+1] int32; the new tokens of sequence s are rows cu_seqlens[s]:cu_seqlens[s+1].
        context_lens: [S] int32; keys visible once this step's tokens are stored, the new tokens included.
        block_tables: [S, max_blocks] int32; the cache blocks that hold the sequence, in order.
        slots: [T] int64; block * block_size + offset where each new token is stored; -1: a padding row, nothing stored.
        k_cache: one [num_blocks, kv_heads, block_size, head_dim] a layer.
        v_cache: likewise.
        fixed: bounds of every step that this layout will describe, when its tensors are rewritten in place from step to step (a CUDA
            graph); None: it describes one step.
        plans: what a GPU backend works out once a step, for every layer.
    """

    cu_seqlens: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slots: Tensor
    k_cache: list[Tensor] = field(repr=False)
    v_cache: list[Tensor] = field(repr=False)
    fixed: attention_paged.FixedStep | None = None
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Causal attention over a packed token tree, differentiable in q, k and v.

    Args:
        q: [T, Hq, D] fp32, bf16, fp16 or fp64.
        k: [T, Hkv, D]; Hq is a multiple of Hkv.
        v: [T, Hkv, D].
        layout: the tree. T may exceed its cu_seqlens[-1]: trailing rows are padding, with zero output and gradient.
        scale: multiplies q kᵀ.
        window: a query at position p (counted from its root) sees keys at positions > p - window.
        softcap: scores become softcap * tanh(scores / softcap), before masking.

    Returns:
        [T, Hq, D] in q's dtype; sums in fp32 (fp64 for fp64), rounded once.

    Raises:
        ValueError: on shapes, dtypes or a layout that do not fit together.
    """
    _check_heads("tree_attention", q, k, v, window, softcap)
    if not torch.compiler.is_compiling() and int(layout.cu_seqlens[-1]) > q.shape[0]:
        raise ValueError(f"tree_attention: the layout holds {int(layout.cu_seqlens[-1])} tokens, q has only {q.shape[0]} rows")
    if _runs_varlen(q):
        return attention_varlen.tree_attention(q, k, v, layout.cu_seqlens, layout.parent, scale=scale, window=window, softcap=softcap)
    if not _runs_native(q):
        return reference.tree_attention(q, k, v, layout.cu_seqlens, layout.parent, scale=scale, window=window, softcap=softcap)
    arguments = (q, k, v, layout.cu_seqlens, layout.parent, float(scale), window or 0, softcap or 0.0)
    if torch.compiler.is_compiling():
        return _tree_op(*arguments)[0]
    return _TreeAttention.apply(*arguments)  # an autograd.Function costs half of what the dispatcher's op costs


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PagedLayout,
    layer: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Stores the new keys and values in the cache, then attends to everything each sequence has stored. No gradient.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D]; rows past cu_seqlens[-1] are padding and come back as zero.
        layout: the step; its caches of `layer` are written.
        layer: which layer's cache.
        scale, window, softcap: as in `tree_attention`.

    Returns:
        [T, Hq, D], bitwise equal to `tree_attention` over the whole sequences on the native backend.

    Raises:
        ValueError: on shapes or dtypes that do not fit together.
    """
    _check_heads("paged_attention", q, k, v, window, softcap)
    k_cache, v_cache = layout.k_cache[layer], layout.v_cache[layer]
    if k_cache.dtype != k.dtype or k_cache.shape[1] != k.shape[1] or k_cache.shape[3] != k.shape[2]:
        raise ValueError(
            f"paged_attention: the cache must be {k.dtype} [blocks, {k.shape[1]}, block_size, {k.shape[2]}], "
            f"got {k_cache.dtype} {list(k_cache.shape)}"
        )
    q, k, v = (_dense_heads(x.detach()) for x in (q, k, v))
    if _runs_native(q):
        out = torch.empty(q.shape, dtype=q.dtype)
        steps = (layout.slots, layout.cu_seqlens, layout.context_lens, layout.block_tables)
        _module().paged_attention(q, k, v, k_cache, v_cache, *steps, float(scale), window or 0, softcap or 0.0, out)
        return out
    if _runs_varlen(q):
        module = _module() if _has_cuda_kernel(q) else None
        return attention_paged.paged_attention(module, q, k, v, layout, layer, scale=scale, window=window, softcap=softcap)
    rows = layout.slots.shape[0]
    reference.store_kv(k[:rows], v[:rows], k_cache, v_cache, layout.slots)
    return reference.paged_attention(
        q, k_cache, v_cache, layout.cu_seqlens, layout.context_lens, layout.block_tables, scale=scale, window=window, softcap=softcap
    )


@constant_when_compiled
def _has_native() -> bool:
    return backend_for("attention", "cpu") == "native"


def _runs_native(q: Tensor) -> bool:
    if q.device.type != "cpu" or not _has_native():
        return False
    if q.dtype in READS:
        return True
    if q.dtype != torch.float64 and not torch.compiler.is_compiling():  # fp64 is the reference's own
        announce(f"attention: the native kernel on cpu does not read {q.dtype}; cast to float32 or bfloat16 for it")
    return False


def _runs_varlen(q: Tensor) -> bool:
    return q.device.type != "cpu" and forced_backend() in (None, "native")


def _has_cuda_kernel(q: Tensor) -> bool:
    fits = q.is_cuda and q.dtype in READS and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return fits and backend_for("attention", "cuda") == "native"


def _module() -> ModuleType:
    module = native()
    assert module is not None
    return module


def _dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


def _tree_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parent: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    out[int(cu_seqlens[-1]) :].zero_()  # padding; the kernel writes every other row
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    _module().tree_attention_forward(q, k, v, cu_seqlens, parent, scale, window, softcap, out, lse)
    return out, lse


def _tree_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    parent: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    dq = torch.zeros(q.shape, dtype=torch.float32)
    dk, dv = torch.empty(k.shape, dtype=k.dtype), torch.empty(v.shape, dtype=v.dtype)
    for x in (dk, dv):
        x[int(cu_seqlens[-1]) :].zero_()
    _module().tree_attention_backward(
        q, k, v, cu_seqlens, parent, scale, window, softcap, out.contiguous(), grad.to(q.dtype).contiguous(), lse, dq, dk, dv
    )
    return dq.to(q.dtype), dk, dv


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parent: Tensor, *options: Any) -> Tensor:
        out, lse = _tree_forward(q, k, v, cu_seqlens, parent, *options)
        ctx.save_for_backward(out, lse, q, k, v, cu_seqlens, parent)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: a checkpoint recomputes them for one reading
        gradients = _tree_backward(grad, *saved, *ctx.options)
        return (*(once("tree_attention", g, *saved[2:5]) for g in gradients), None, None, None, None, None)


_tree_op = torch.library.custom_op("fastalign::tree_attention", _tree_forward, mutates_args=())
_tree_backward_op = torch.library.custom_op("fastalign::tree_attention_backward", _tree_backward, mutates_args=())


@_tree_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_layout: Tensor | float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@_tree_backward_op.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_layout: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, parent, *ctx.options = inputs
    ctx.save_for_backward(*output, q, k, v, cu_seqlens, parent)


def _differentiate(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    return (*_tree_backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None)


_tree_op.register_autograd(_differentiate, setup_context=_save)


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"{op}: expected q [T, Hq, D] and k, v [T, Hkv, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: the query heads must be a multiple of the key heads, got {q.shape[1]} and {k.shape[1]}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"{op}: q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them or use autocast outside")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window must be >= 1 or None, got {window}")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be > 0 and finite, or None for no cap, got {softcap}")
