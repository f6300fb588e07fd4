"""Tree attention, forward and gradients; plain torch is eager attention under a dense mask in the inputs' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.accuracy import At, Case, Values, accuracy
from fastalign.ops import attention_reference
from fastalign.ops.attention import TreeLayout, tree_attention


@accuracy("attention")
def attention_tree(at: At) -> Case:
    lengths, parent = ([30, 9, 20], [-1, 0, 0]) if at.quick else ([300, 64, 90, 64, 1], [-1, 0, 0, 2, 0])
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    layout = TreeLayout(cu_seqlens, torch.tensor(parent, dtype=torch.int32))
    rows, heads, kv_heads, width = sum(lengths), 4, 2, 64
    q, k, v = (at.randn(rows, h, width).requires_grad_() for h in (heads, kv_heads, kv_heads))
    upstream = at.randn(rows, heads, width)
    ((order, visible),) = attention_reference.tree_masks(layout.cu_seqlens, layout.parent)
    order, visible = order.to(at.device), visible.to(at.device)

    def gradients(out: Tensor, leaves: tuple[Tensor, ...]) -> Values:
        found = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
        return {"out": out.detach(), **dict(zip(("d_q", "d_k", "d_v"), found, strict=True))}

    def eager(*leaves: Tensor) -> Values:
        query, key, value = (t[order].transpose(0, 1) for t in leaves)
        key, value = (t.repeat_interleave(heads // kv_heads, 0) for t in (key, value))
        scores = (query @ key.transpose(1, 2) * width**-0.5).masked_fill(~visible, -torch.inf)
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.softmax(scores, -1, dtype=wide).to(query.dtype) @ value
        return gradients(torch.zeros_like(leaves[0]).index_copy(0, order, out.transpose(0, 1)), leaves)

    return Case(
        lambda: gradients(tree_attention(q, k, v, layout, scale=width**-0.5), (q, k, v)),
        eager(q, k, v),
        eager(*(t.detach().double().requires_grad_() for t in (q, k, v))),
    )
