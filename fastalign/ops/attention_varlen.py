"""Attention of a token tree on a GPU: variable-length attention with separate offsets of queries and keys.

Each segment's queries attend to the keys of its path from the root, gathered side by side (a tree of roots alone is read as it is).
A prefix's gradient is the sum over its readers, in fp32 (fp64 for fp64); on CUDA its order is fixed only under
`torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .attention_routes import Segments, route_of, varlen_attention
from .once import once


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parent: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """`ops.attention.tree_attention` on any device; differentiable once."""
    if torch.compiler.is_compiling():
        return _traced(q, k, v, cu_seqlens, parent, float(scale), window or 0, softcap or 0.0)
    return _tree(q, k, v, cu_seqlens, parent, scale, window, softcap)


def tree_segments(cu_seqlens: Tensor, parent: Tensor) -> list[tuple[int, int, int]]:
    """(first row, last row + 1, the segment it continues or -1) of the tree's segments that hold tokens, in order of their rows.

    An empty segment is its parent; an only child whose rows follow its parent's is one segment with it.
    """
    bounds, parents = cu_seqlens.tolist(), parent.tolist()
    if bounds[0] != 0 or bounds != sorted(bounds):
        raise ValueError(f"tree_attention: cu_seqlens: expected offsets that start at 0 and do not fall, got {bounds[:8]}")
    holder: list[int] = []  # the segment with tokens that s ends in, -1: none
    children = [0] * len(parents)
    for s, p in enumerate(parents):
        if p >= s or p < -1:
            raise ValueError(f"tree_attention: parent: segment {s} must continue an earlier one or -1, got {p}")
        above = holder[p] if p >= 0 else -1
        own = bounds[s + 1] > bounds[s]
        holder.append(s if own else above)
        if own and above >= 0:
            children[above] += 1
    found: list[tuple[int, int, int]] = []
    place = [-1] * len(parents)
    for s, p in enumerate(parents):
        above = holder[p] if p >= 0 else -1
        if holder[s] != s:
            continue
        up = place[above] if above >= 0 else -1
        if up >= 0 and children[above] == 1 and found[up][1] == bounds[s]:
            found[up] = (found[up][0], bounds[s + 1], found[up][2])
            place[s] = up
        else:
            place[s] = len(found)
            found.append((bounds[s], bounds[s + 1], up))
    return found


@functools.lru_cache(maxsize=8)  # by content: every layer and the recomputation under compile ask for the same tree
def _tree_plan(cu_seqlens: bytes, parent: bytes, device: torch.device) -> Segments:
    rows = [torch.frombuffer(bytearray(x), dtype=torch.int32) if x else torch.empty(0, dtype=torch.int32) for x in (cu_seqlens, parent)]
    paths: list[list[tuple[int, int]]] = []
    for begin, end, up in tree_segments(*rows):
        paths.append([*(paths[up] if up >= 0 else []), (begin, end)])
    counts_q = [path[-1][1] - path[-1][0] for path in paths]
    counts_k = [sum(end - begin for begin, end in path) for path in paths]
    if counts_q == counts_k:
        return Segments.of(counts_q, counts_k, device)
    keys = torch.cat([torch.arange(begin, end) for path in paths for begin, end in path])
    return Segments.of(counts_q, counts_k, device, keys)


def _tree(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parent: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    route = route_of(q, window, softcap)
    segments = _tree_plan(cu_seqlens.numpy().tobytes(), parent.numpy().tobytes(), q.device)
    rows, total = segments.bounds_q[-1], q.shape[0]
    q, k, v = _OnceDifferentiable.apply(q, k, v)
    keys, values = (x[:rows] if segments.keys is None else _Gather.apply(x, segments.keys) for x in (k, v))
    out = varlen_attention(route, q[:rows], keys, values, segments, scale=scale, window=window, softcap=softcap)
    return out if rows == total else torch.cat([out, out.new_zeros(total - rows, *out.shape[1:])])


class _Gather(torch.autograd.Function):
    """x[index]; the gradient of a row that several readers share is summed in fp32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = grad if grad.dtype == torch.float64 else grad.float()
        return wide.new_zeros(ctx.rows, *grad.shape[1:]).index_add(0, index, wide).to(grad.dtype), None


class _OnceDifferentiable(torch.autograd.Function):
    """q, k and v as they are; a second derivative, which the fused kernels do not have, raises."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(q, k, v)
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        return tuple(once("tree_attention", grad, *saved) for grad in grads)


@torch.library.custom_op("fastalign::tree_attention_varlen", mutates_args=())
def _traced(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parent: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """What torch.compile sees: one op whose backward runs the forward again."""
    return _tree(q, k, v, cu_seqlens, parent, scale, window or None, softcap or None).contiguous()


@_traced.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_layout: Tensor | float) -> Tensor:
    return q.new_empty(q.shape)


def _autograd_in_an_op() -> AbstractContextManager[Any]:
    """The body of a custom op is below autograd; inside this it records again."""
    core = torch._C
    excluded = core._dispatch_tls_local_exclude_set()
    for key in (core.DispatchKey.AutogradFunctionality, core.DispatchKey.AutogradOther):
        excluded = excluded - core.DispatchKeySet(key)
    return core._ForceDispatchKeyGuard(core._dispatch_tls_local_include_set(), excluded)


@torch.library.custom_op("fastalign::tree_attention_varlen_backward", mutates_args=())
def _traced_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parent: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad(), _autograd_in_an_op():
        out = _tree(leaves[0], leaves[1], leaves[2], cu_seqlens, parent, scale, window or None, softcap or None)
        dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_traced_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_layout: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_traced_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window, ctx.softcap), None, None, None, None, None)


_traced.register_autograd(_differentiate, setup_context=_save)
