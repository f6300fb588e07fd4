"""The inputs of the layers' accuracy rows and benches, and each layer as torch computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastalign.ops.rms_norm import rms_norm
from fastalign.ops.rope import rope
from fastalign.ops.swiglu import swiglu

EPS = 1e-6
Randn = Callable[..., Tensor]


@dataclass(frozen=True)
class Layer:
    """An op beside torch's way; the first `num_grads` of `inputs` have a gradient. elements: of the op's result."""

    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    inputs: list[Tensor]
    num_grads: int
    elements: int


def layers(randn: Randn, tokens: int, width: int, inner: int, heads: int, head_dim: int) -> dict[str, Layer]:
    """rms_norm of [tokens, width], swiglu of [tokens, inner], rope of [1, heads, tokens, head_dim]."""
    angle = randn(1, tokens, head_dim).float()
    q = randn(1, tokens, heads, head_dim).transpose(1, 2)
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
    norm = [randn(tokens, width), randn(width)]
    return {
        "rms_norm": Layer(lambda x, w: rms_norm(x, w, eps=EPS), torch_norm, norm, 2, norm[0].numel()),
        "swiglu": Layer(swiglu, lambda gate, up: F.silu(gate) * up, [randn(tokens, inner), randn(tokens, inner)], 2, tokens * inner),
        "rope": Layer(rope, torch_rope, [q, cos, sin], 1, q.numel()),
    }


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As the models of transformers do: in fp32 (fp64 stays), rounded before the weight."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def torch_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the models of transformers do."""
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]


def value_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor], num_grads: int, grad: Tensor) -> list[Tensor]:
    """The value, and the gradients of the first inputs for dL/dvalue = grad."""
    leaves = [t.detach().requires_grad_(i < num_grads) for i, t in enumerate(inputs)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves[:num_grads], grad)]
