"""A decoder layer of a generation step by native calls: one where the products are our own, else one an op."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.attention import PagedLayout, paged_attention
from fastalign.ops.backend import native_for
from fastalign.ops.gemm import Packed, Product
from fastalign.ops.rms_norm import normalized
from fastalign.ops.rope import rotated
from fastalign.ops.swiglu import gated

_NONE = torch.empty(0)  # stands for no bias in a native call


class Plan(NamedTuple):
    """What a layer's own forward asks of the attention.

    kinds: the classes of the layer's parts; an adapter may put others in their places.
    """

    kinds: tuple[type, ...]
    dtype: torch.dtype
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None


class Ready(NamedTuple):
    """A layer that can be run now.

    layer: of the cache; kept: the products of q, k, v, o, gate, up, down; norms: before the attention, before the MLP, of the heads.
    """

    plan: Plan
    layer: int
    kept: list[Packed]
    biases: list[Tensor | None]
    norms: list[Tensor]
    eps: list[float]


def run(parts: Ready, x: Tensor, layout: PagedLayout, rotation: tuple[Tensor, Tensor]) -> Tensor | None:
    """The layer's forward of x [1, T, H] for a step of generation; None where the native ops do not take such tensors."""
    cos, sin = rotation
    biases = [bias for bias in parts.biases if bias is not None]
    module = native_for("rms_norm", x, cos, sin, *parts.norms, *biases)
    if module is None or x.dim() != 3 or x.shape[0] != 1 or cos.shape[-1] != parts.plan.head_dim:
        return None
    step = _Step(module, parts, x.contiguous(), layout, cos.contiguous(), sin.contiguous())
    return (_in_one_call if all(one.ours for one in parts.kept) else _one_by_one)(step)


class _Step(NamedTuple):
    """x [1, T, H], cos and sin [1, T, D]: without gaps."""

    module: ModuleType
    parts: Ready
    x: Tensor
    layout: PagedLayout
    cos: Tensor
    sin: Tensor


def _in_one_call(step: _Step) -> Tensor:
    """Where all the products are our own."""
    parts, plan, layout, out = step.parts, step.parts.plan, step.layout, torch.empty(step.x.shape, dtype=step.x.dtype)
    step.module.decoder_layer(
        step.x,
        [one.form for one in parts.kept],
        [_NONE if bias is None else bias for bias in parts.biases],
        [one.out for one in parts.kept],
        parts.norms,
        parts.eps,
        step.cos,
        step.sin,
        layout.k_cache[parts.layer],
        layout.v_cache[parts.layer],
        layout.slots,
        layout.cu_seqlens,
        layout.context_lens,
        layout.block_tables,
        plan.scale,
        plan.window or 0,
        plan.softcap or 0.0,
        out,
    )
    return out


def _one_by_one(step: _Step) -> Tensor:
    """Where oneDNN multiplies."""
    module, parts, plan, x = step.module, step.parts, step.parts.plan, step.x
    shape, norms, eps = (1, x.shape[1], -1, plan.head_dim), parts.norms, parts.eps
    q, k, v, o, gate, up, down = [partial(_times, one.product, bias) for one, bias in zip(parts.kept, parts.biases, strict=True)]
    inner = normalized(module, x, norms[0], eps[0])
    queries, keys, values = q(inner).view(shape), k(inner).view(shape), v(inner).view(shape)
    if len(norms) > 2:
        queries, keys = normalized(module, queries, norms[2], eps[2]), normalized(module, keys, norms[3], eps[3])
    queries, keys = (rotated(module, heads.transpose(1, 2), step.cos, step.sin)[0].transpose(0, 1) for heads in (queries, keys))
    seen = paged_attention(queries, keys, values[0], step.layout, parts.layer, scale=plan.scale, window=plan.window, softcap=plan.softcap)
    x = x + o(seen.view(1, shape[1], -1))
    inner = normalized(module, x, norms[1], eps[1])
    return x + down(gated(module, gate(inner), up(inner)))


def _times(product: Product | None, bias: Tensor | None, x: Tensor) -> Tensor:
    assert product is not None  # `kept` leaves the others out
    return product(x, bias)
