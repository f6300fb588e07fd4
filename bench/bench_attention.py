"""Attention over a token tree against per-sequence SDPA on the expanded sequences, and paged decode against gather + SDPA.

    python bench/bench_attention.py [--rounds 5] [--dtype float32 bfloat16] [--clock wall|cpu] [--threads N]

Floors: of the tree, its visible (query, key) pairs at the rate of this machine's GEMM, 4 D operations a pair and head forward and
10 D backward; of decode, the keys and values read once (a shared prefix once a group) at the rate of a plain sum.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import Result, header, interleaved, peak_mib
from fastalign.ops.attention import PagedLayout, TreeLayout, paged_attention, tree_attention
from fastalign.ops.attention_reference import tree_masks
from fastalign.ops.backend import backend_for

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 8, 4, 64, 16


def gemm_rate(clock: Callable[[], float]) -> float:
    """fp32 FLOP/s of a 1024-cubed matrix product."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / (interleaved({"gemm": lambda: a @ a}, 5, clock)["gemm"] * 1e-3)


def read_rate(clock: Callable[[], float]) -> float:
    """Bytes a second of a sum over 64 MiB."""
    x = torch.randn(2**24)
    return 2**26 / (interleaved({"sum": lambda: x.sum()}, 5, clock)["sum"] * 1e-3)


def random_heads(rows: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v for the packed layout."""
    return [torch.randn(rows, heads, HEAD_DIM).to(dtype).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]


def bench_tree(groups: int, prompt: int, children: int, tokens: int, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """`groups` prompts, each with `children` completions."""
    lengths = [prompt, *[tokens] * children] * groups
    parent = [p for g in range(groups) for p in [-1, *[g * (children + 1)] * children]]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    layout = TreeLayout(cu_seqlens, torch.tensor(parent, dtype=torch.int32))
    packed, grad = random_heads(sum(lengths), dtype), torch.randn(sum(lengths), HEADS, HEAD_DIM).to(dtype)
    count, length = groups * children, prompt + tokens
    expanded = [torch.randn(count, h, length, HEAD_DIM).to(dtype).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS)]
    expanded_grad = torch.randn(count, HEADS, length, HEAD_DIM).to(dtype)

    def tree(backward: bool) -> None:
        out = tree_attention(*packed, layout, scale=HEAD_DIM**-0.5)
        if backward:
            torch.autograd.grad(out, packed, grad)

    def sdpa(backward: bool) -> None:
        out = F.scaled_dot_product_attention(*expanded, is_causal=True, enable_gqa=True)
        if backward:
            torch.autograd.grad(out, expanded, expanded_grad)

    pairs = sum(int(visible.sum()) for _, visible in tree_masks(cu_seqlens, layout.parent)) * HEADS * HEAD_DIM
    shape = f"{groups}x({prompt}+{children}x{tokens})"
    for name, backward, per_pair in (("forward", False, 4), ("forward+backward", True, 14)):
        ms = interleaved({"tree": partial(tree, backward), "sdpa": partial(sdpa, backward)}, options.rounds, options.clock)
        floor = pairs * per_pair / options.gemm_rate * 1e3
        for side, run, backend in (("tree", tree, backend_for("attention")), ("sdpa", sdpa, "torch")):
            peak, flop = peak_mib(partial(run, backward)), float(pairs * per_pair) if side == "tree" else 0.0
            line = Result(f"{side} {name}", shape, str(dtype)[6:], backend, ms[side], flop, peak, ms["sdpa"], floor)
            print(line.line(), flush=True)


def bench_decode(sequences: int, prefix: int, own: int, group: int, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """One new token for each of `sequences`, of which `group` adjacent ones share the blocks of their prefix."""
    blocks = (prefix + own) // BLOCK
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    first = torch.arange(sequences) // group * group
    tables[:, : prefix // BLOCK] = tables[first, : prefix // BLOCK]
    caches = [torch.randn(sequences * blocks, KV_HEADS, BLOCK, HEAD_DIM).to(dtype) for _ in "kv"]
    q, k, v = (x.detach() for x in random_heads(sequences, dtype))
    layout = PagedLayout(
        cu_seqlens=torch.arange(sequences + 1, dtype=torch.int32),
        context_lens=torch.full((sequences,), prefix + own, dtype=torch.int32),
        block_tables=tables,
        slots=tables[:, -1].long() * BLOCK + BLOCK - 1,
        k_cache=[caches[0]],
        v_cache=[caches[1]],
    )

    def gather() -> None:
        keys, values = (c[tables.long()].transpose(1, 2).flatten(2, 3) for c in caches)
        F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

    cases = {"paged": lambda: paged_attention(q, k, v, layout, 0, scale=HEAD_DIM**-0.5), "gather": gather}
    ms = interleaved(cases, options.rounds * 4, options.clock)
    keys_read = sequences // group * prefix + sequences * own
    floor = 2 * keys_read * KV_HEADS * HEAD_DIM * q.element_size() / options.read_rate * 1e3
    shape = f"{sequences}x({prefix}/{group}+{own})"
    for side, backend in (("paged", backend_for("attention")), ("gather", "torch")):
        print(Result(f"decode {side}", shape, str(dtype)[6:], backend, ms[side], torch_ms=ms["gather"], floor_ms=floor).line(), flush=True)


def main() -> None:
    """Prints one line a case and side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--rounds", type=int, default=0, help="interleaved rounds (default 5, quick 2)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    options.clock = time.process_time if options.clock == "cpu" else time.perf_counter
    options.gemm_rate, options.read_rate = gemm_rate(options.clock), read_rate(options.clock)
    print(f"{options.threads} threads, GEMM {options.gemm_rate / 1e9:.0f} GFLOP/s, read {options.read_rate / 1e9:.1f} GB/s")
    print(header())
    for dtype in (getattr(torch, name) for name in options.dtype):
        bench_tree(8, 256, 8, 64, dtype, options)
        bench_tree(4, 64, 8, 256, dtype, options)
        bench_tree(8, 512, 1, 1, dtype, options)
        bench_decode(64, 256, 64, 8, dtype, options)
        bench_decode(64, 0, 320, 1, dtype, options)
        bench_decode(16, 1024, 256, 16, dtype, options)


if __name__ == "__main__":
    main()
