"""A decoder layer of a generation step by native calls: one where the products are our own, else one an op."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.models.recorded import Recording, listener
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

    layer: of the cache; linears, kept: q, k, v, o, gate, up, down and their products; norms: before the attention, before the MLP, of the
    heads.
    """

    plan: Plan
    layer: int
    linears: list[Any]
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
    places = _places(parts, step.x)
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
        places,
    )
    return out


def _places(parts: Ready, x: Tensor) -> list[Tensor]:
    """Where the products are to be kept; without a recording nowhere."""
    recording = listener()
    if not isinstance(recording, Recording):
        return []
    layers = zip(parts.linears, parts.kept, strict=True)
    places = [recording.room(linear, (*x.shape[:2], one.out), x.dtype) for linear, one in layers]
    return [_NONE if place is None else place for place in places]


def _one_by_one(step: _Step) -> Tensor:
    """Where oneDNN multiplies."""
    module, parts, plan, x = step.module, step.parts, step.parts.plan, step.x
    shape, norms, eps = (1, x.shape[1], -1, plan.head_dim), parts.norms, parts.eps
    heard = listener()
    recording = heard if isinstance(heard, Recording) else None
    products = zip(parts.linears, parts.kept, parts.biases, strict=True)
    q, k, v, o, gate, up, down = [partial(_times, linear, one.product, bias, recording) for linear, one, bias in products]
    inner = normalized(module, x, norms[0], eps[0])
    queries, keys, values = q(inner).view(shape), k(inner).view(shape), v(inner).view(shape)
    if len(norms) > 2:
        queries, keys = normalized(module, queries, norms[2], eps[2]), normalized(module, keys, norms[3], eps[3])
    queries, keys = (rotated(module, heads.transpose(1, 2), step.cos, step.sin)[0].transpose(0, 1) for heads in (queries, keys))
    seen = paged_attention(queries, keys, values[0], step.layout, parts.layer, scale=plan.scale, window=plan.window, softcap=plan.softcap)
    x = x + o(seen.view(1, shape[1], -1))
    inner = normalized(module, x, norms[1], eps[1])
    return x + down(gated(module, gate(inner), up(inner)))


def _times(linear: Any, product: Product | None, bias: Tensor | None, recording: Recording | None, x: Tensor) -> Tensor:
    assert product is not None  # `kept` leaves the others out
    out = product(x, bias)
    if recording is not None:
        recording.keep(linear, out)
    return out
