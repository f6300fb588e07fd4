"""Attention over a token tree and over a paged cache in plain torch: the specification of ops/attention.py.

Sums, soft-max and products are taken in fp32 (fp64 for fp64 inputs) and rounded once at the end. The tree is computed
one root at a time with a dense mask, so memory is the square of the largest tree.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_positions(cu_seqlens: Tensor, parent: Tensor) -> list[int]:
    """The position of each segment's first token: the length of everything it continues."""
    bounds, parents = cu_seqlens.tolist(), parent.tolist()
    start: list[int] = []
    for p in parents:
        start.append(0 if p < 0 else start[p] + bounds[p + 1] - bounds[p])
    return start


def tree_masks(cu_seqlens: Tensor, parent: Tensor, window: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """The dense mask of every tree: [(rows [n] int64, visible [n, n] bool)], one entry a root that has tokens."""
    bounds, parents = cu_seqlens.tolist(), parent.tolist()
    start = segment_positions(cu_seqlens, parent)
    root: list[int] = []
    for s, p in enumerate(parents):
        root.append(s if p < 0 else root[p])
    ancestor = torch.eye(len(parents), dtype=torch.bool)
    for s, p in enumerate(parents):
        if p >= 0:
            ancestor[s] |= ancestor[p]
    masks = []
    for r in sorted(set(root)):
        members = [s for s in range(len(parents)) if root[s] == r and bounds[s + 1] > bounds[s]]
        if not members:
            continue
        rows = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in members])
        segment = torch.cat([torch.full((bounds[s + 1] - bounds[s],), s) for s in members])
        position = torch.cat([start[s] + torch.arange(bounds[s + 1] - bounds[s]) for s in members])
        visible = ancestor[segment][:, segment] & (position[None, :] <= position[:, None])
        if window is not None:
            visible &= position[None, :] > position[:, None] - window
        masks.append((rows, visible))
    return masks


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """softmax(cap(scale q kᵀ)) v for q [n, Hq, D], k and v [m, Hkv, D], visible [n, m] → (out [n, Hq, D], lse [n, Hq])."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    qh, kh, vh = (t.to(compute).transpose(0, 1) for t in (q, k, v))
    kh, vh = kh.repeat_interleave(group, 0), vh.repeat_interleave(group, 0)
    scores = (qh @ kh.transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    out = (torch.softmax(scores, -1) @ vh).transpose(0, 1).to(q.dtype)
    return out, torch.logsumexp(scores, -1).transpose(0, 1)


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parent: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Differentiable through plain autograd; rows past cu_seqlens[-1] are zero and take no gradient."""
    out = torch.zeros_like(q)
    for rows, visible in tree_masks(cu_seqlens, parent, window):
        rows, visible = rows.to(q.device), visible.to(q.device)
        part, _ = attend(q[rows], k[rows], v[rows], visible, scale, softcap)
        out = out.index_copy(0, rows, part)
    return out


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Writes k, v [T, Hkv, D] to slot `block * block_size + offset` of the caches [blocks, Hkv, block_size, D]; -1 is skipped."""
    keep = (slots >= 0).nonzero()[:, 0]
    block_size = k_cache.shape[2]
    block, offset = slots[keep] // block_size, slots[keep] % block_size
    k_cache[block, :, offset] = k[keep].to(k_cache.dtype)
    v_cache[block, :, offset] = v[keep].to(v_cache.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Each sequence's new queries against the keys its block table names; rows past cu_seqlens[-1] are zero."""
    out = torch.zeros_like(q)
    bounds, contexts = cu_seqlens.tolist(), context_lens.tolist()
    block_size = k_cache.shape[2]
    for s, context in enumerate(contexts):
        begin, end = bounds[s], bounds[s + 1]
        if begin == end:
            continue
        blocks = block_tables[s, : -(-context // block_size)].long()
        keys = k_cache[blocks].transpose(1, 2).flatten(0, 1)[:context]
        values = v_cache[blocks].transpose(1, 2).flatten(0, 1)[:context]
        at = torch.arange(context - (end - begin), context, device=q.device)[:, None]
        key_at = torch.arange(context, device=q.device)[None, :]
        visible = key_at <= at
        if window is not None:
            visible = visible & (key_at > at - window)
        out[begin:end], _ = attend(q[begin:end], keys, values, visible, scale, softcap)
    return out
