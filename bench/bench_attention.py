"""Attention over a packed token tree against SDPA, forward and backward, and paged decode against gather + SDPA.

    python bench/bench_attention.py [--quick] [--rounds 5] [--dtype float32] [--clock cpu] [--threads N]

Packed sequences: "torch" is SDPA over all tokens with a dense block-diagonal causal mask (what a packed batch costs without a kernel of
its own), "torch a sequence" is causal SDPA over [sequences, length], which only equal lengths allow. Trees: "torch" is causal SDPA over
the expanded sequences, each with its own copy of the prompt. Decode: "torch" gathers keys and values from the cache's blocks.

Floors: of a tree, one GEMM of as many operations as its visible (query, key) pairs need, 4 D a pair and head forward and 10 D backward
(on the CPU in fp32 for bf16 too: products are summed in fp32); of decode, one read of the keys and values, a shared prefix once a group.

What the CPU kernel costs above its floor is the soft-max, the packing of keys and queries, and the masked halves of the diagonal tiles.
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import run_file
from fastalign.ops.attention import PagedLayout, TreeLayout, paged_attention, tree_attention
from fastalign.ops.attention_reference import tree_masks

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 8, 4, 64, 16
PASSES = {"forward": 4, "forward+backward": 14}  # operations a pair, head and d


def random_heads(*shape, device, dtype, kv_heads=KV_HEADS):
    """q, k, v; `shape` has "heads" where the heads go."""
    sizes = [[heads if x == "heads" else x for x in shape] for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]


def attend(run, tensors, grad, backward):
    out = run(*tensors)
    if backward:
        torch.autograd.grad(out, tensors, grad)


def gemm_of(flop, device, dtype):
    """One matrix product of as many operations."""
    dtype = torch.float32 if device == "cpu" else dtype
    width = 1024
    left = torch.randn(max(1, int(flop) // (2 * width * width)), width, device=device).to(dtype)
    right = torch.randn(width, width, device=device).to(dtype)
    return lambda: left @ right


def layout_of(lengths, parent):
    return TreeLayout(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), torch.tensor(parent, dtype=torch.int32))


def visible_pairs(layout):
    return sum(int(visible.sum()) for _, visible in tree_masks(layout.cu_seqlens, layout.parent))


@pytest.mark.parametrize("kind", PASSES)
def bench_packed(versus, device, quick, dtype, kind):
    count, length, backward = (4, 256, kind != "forward") if quick else (8, 512, kind != "forward")
    layout, rows = layout_of([length] * count, [-1] * count), count * length
    scale = HEAD_DIM**-0.5
    mask = torch.block_diag(*[torch.ones(length, length).tril()] * count).bool().to(device)
    kinds = {"device": device, "dtype": dtype, "kv_heads": HEADS}  # SDPA has no fused kernel for groups of heads everywhere
    packed, dense = random_heads(rows, "heads", HEAD_DIM, **kinds), random_heads(1, "heads", rows, HEAD_DIM, **kinds)
    each = random_heads(count, "heads", length, HEAD_DIM, **kinds)
    grads = [torch.randn(x[0].shape, device=device).to(dtype) for x in (packed, dense, each)]
    flop = float(PASSES[kind] * visible_pairs(layout) * HEADS * HEAD_DIM)
    with_mask, causal = partial(F.scaled_dot_product_attention, attn_mask=mask), partial(F.scaled_dot_product_attention, is_causal=True)
    sides = {
        "fastalign": lambda: attend(lambda *x: tree_attention(*x, layout, scale=scale), packed, grads[0], backward),
        "torch": lambda: attend(with_mask, dense, grads[1], backward),
        "torch a sequence": lambda: attend(causal, each, grads[2], backward),
        "floor": gemm_of(flop, device, dtype),
    }
    versus(f"packed {kind}", f"{count}x{length}", dtype, sides, flop=flop)


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("groups, prompt, children, tokens", [(8, 256, 8, 64), (4, 64, 8, 256), (8, 512, 1, 1)])
def bench_tree(versus, device, quick, dtype, groups, prompt, children, tokens, kind):
    groups = groups // 4 if quick else groups
    backward, length = kind != "forward", prompt + tokens
    layout = layout_of([prompt, *[tokens] * children] * groups, [p for g in range(groups) for p in [-1, *[g * (children + 1)] * children]])
    rows = int(layout.cu_seqlens[-1])
    packed = random_heads(rows, "heads", HEAD_DIM, device=device, dtype=dtype)
    expanded = random_heads(groups * children, "heads", length, HEAD_DIM, device=device, dtype=dtype)
    grads = [torch.randn(x[0].shape, device=device).to(dtype) for x in (packed, expanded)]
    flop = float(PASSES[kind] * visible_pairs(layout) * HEADS * HEAD_DIM)
    causal = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    sides = {
        "fastalign": lambda: attend(lambda *x: tree_attention(*x, layout, scale=HEAD_DIM**-0.5), packed, grads[0], backward),
        "torch": lambda: attend(causal, expanded, grads[1], backward),
        "floor": gemm_of(flop, device, dtype),
    }
    versus(f"tree {kind}", f"{groups}x({prompt}+{children}x{tokens})", dtype, sides, flop=flop)


@pytest.mark.parametrize("sequences, prefix, own, group", [(64, 256, 64, 8), (64, 0, 320, 1), (16, 1024, 256, 16)])
def bench_decode(versus, device, quick, dtype, sequences, prefix, own, group):
    """One new token a sequence; `group` adjacent sequences share the blocks of their prefix."""
    prefix, own = (prefix // 4, own // 4) if quick else (prefix, own)
    blocks = (prefix + own) // BLOCK
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    first = torch.arange(sequences) // group * group
    tables[:, : prefix // BLOCK] = tables[first, : prefix // BLOCK]
    caches = [torch.randn(sequences * blocks, KV_HEADS, BLOCK, HEAD_DIM, device=device).to(dtype) for _ in "kv"]
    q, k, v = (x.detach() for x in random_heads(sequences, "heads", HEAD_DIM, device=device, dtype=dtype))
    layout = PagedLayout(
        cu_seqlens=torch.arange(sequences + 1, dtype=torch.int32),
        context_lens=torch.full((sequences,), prefix + own, dtype=torch.int32),
        block_tables=tables,
        slots=(tables[:, -1].long() * BLOCK + BLOCK - 1).to(device),
        k_cache=[caches[0]],
        v_cache=[caches[1]],
    )
    index = tables.long().to(device)

    def gather():
        keys, values = (cache[index].transpose(1, 2).flatten(2, 3) for cache in caches)
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

    numbers = 2 * (sequences // group * prefix + sequences * own) * KV_HEADS * HEAD_DIM
    read = torch.randn(numbers, device=device).to(dtype)
    sides = {
        "fastalign": lambda: paged_attention(q, k, v, layout, 0, scale=HEAD_DIM**-0.5),
        "torch": gather,
        "floor": lambda: read.view(torch.int32).sum(dtype=torch.int32) if device == "cpu" else read.sum(),
    }
    versus("decode", f"{sequences}x({prefix}/{group}+{own})", dtype, sides, bytes=float(numbers * q.element_size()), memory=False)


if __name__ == "__main__":
    run_file(__file__)
