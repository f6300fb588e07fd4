"""Paged attention on a GPU: the CUDA kernel for decode and short chunks, variable-length attention over gathered keys for the rest.

The plan of a step (who reads which split of keys, whose prefix is shared) is made on the host once and serves every layer.

A CUDA graph replays launches with the grids and the addresses that it was recorded with. What changes from step to step is therefore read
from device memory: slots, block tables, and the plan's numbers, how many items there are among them. With `PagedLayout.fixed` the plan
keeps its device memory, its grids and partial results have room for any step within the bounds, and `refill` writes the next step's
numbers there. The plan itself stays on the host, where lengths and tables are known anyway; it costs one copy a step and window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..staging import Staged, to_device
from . import attention_reference as reference
from .attention_routes import Segments, route_of, varlen_attention

if TYPE_CHECKING:
    from .attention import PagedLayout

MAX_FRESH = 8  # a sequence with more new tokens gathers its keys
SPLIT = 128  # keys of a split: kSplit in csrc/cuda/attention.h
PLAN_HEADER = 4  # numbers before the tokens': how many tokens, and how many items of each size


@dataclass(frozen=True)
class FixedStep:
    """What the decode steps of one CUDA graph have in common.

    Attributes:
        tables: [S, max_blocks] int32 on the device, the layout's block_tables there.
        cells: splits of SPLIT keys, over all sequences, that a step may have.
    """

    tables: Tensor
    cells: int


def cells_of(context_lens: np.ndarray) -> int:
    """Splits of keys that sequences with these contexts have, windows left aside."""
    return int((-(-context_lens // SPLIT)).sum())


@dataclass(frozen=True)
class KernelPlan:
    """What the CUDA kernel reads: see PagedAttention in csrc/cuda/attention.h."""

    numbers: Tensor
    tables: Tensor
    tokens: int
    cells: int
    items: tuple[int, ...]
    refill: Callable[[], object] | None = None  # writes the numbers of the layout's present contents


@dataclass(frozen=True)
class GatherPlan:
    """Sequences that gather their keys: rows of q, blocks and offsets of the keys in the cache, segments."""

    rows: Tensor
    blocks: Tensor
    offsets: Tensor
    segments: Segments


def paged_attention(
    module: ModuleType | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PagedLayout,
    layer: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`ops.attention.paged_attention`; `module` has the CUDA kernels, or is None where there are none for this call."""
    k_cache, v_cache = layout.k_cache[layer], layout.v_cache[layer]
    rows = layout.slots.shape[0]
    if module is None:
        reference.store_kv(k[:rows], v[:rows], k_cache, v_cache, layout.slots)
    else:
        with torch.cuda.device_of(q):
            module.store_kv_cuda(k, v, k_cache, v_cache, layout.slots, _stream(q))
    key = (module is not None, q.shape[1], k.shape[1], window)
    if key not in layout.plans:
        layout.plans[key] = _plan(module, q, layout, k_cache, window)
    kernel, gather = layout.plans[key]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if kernel is not None and module is not None:
        partial_out = torch.empty(kernel.cells, *q.shape[1:], dtype=torch.float32, device=q.device)
        partial_sum = torch.empty(kernel.cells, q.shape[1], 2, dtype=torch.float32, device=q.device)
        plan = (kernel.tables, kernel.numbers, kernel.tokens, kernel.items)
        results = (partial_out, partial_sum, out, _stream(q))
        with torch.cuda.device_of(q):
            module.paged_attention_cuda(q, k_cache, v_cache, *plan, scale, window or 0, softcap or 0.0, *results)
    if gather is not None:
        keys, values = (cache[gather.blocks, :, gather.offsets] for cache in (k_cache, v_cache))
        fresh = q.index_select(0, gather.rows)
        route = route_of(q, window, softcap)
        part = varlen_attention(route, fresh, keys, values, gather.segments, scale=scale, window=window, softcap=softcap)
        out.index_copy_(0, gather.rows, part)
    return out


def refill(layout: PagedLayout) -> None:
    """Brings the plans of a fixed layout up to date with its tensors, in place.

    Raises:
        ValueError: when a step is outside the bounds of `layout.fixed`.
    """
    for kernel, _ in layout.plans.values():
        assert kernel is not None, "a fixed layout gathers no keys"
        assert kernel.refill is not None, "a fixed layout's plans are made to be refilled"
        kernel.refill()


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _plan(
    module: ModuleType | None, q: Tensor, layout: PagedLayout, k_cache: Tensor, window: int | None
) -> tuple[KernelPlan | None, GatherPlan | None]:
    if layout.fixed is not None:
        return _fixed_plan(module, q, layout, layout.fixed, k_cache, window), None
    kernel, longest = None, 0
    if module is not None:
        longest, group = MAX_FRESH, q.shape[1] // k_cache.shape[1]
        steps = (layout.cu_seqlens, layout.context_lens, layout.block_tables)
        shape = (k_cache.shape[2], k_cache.shape[0])
        numbers, tokens, cells, items = module.paged_plan(*steps, *shape, group, window or 0, longest)
        if tokens:
            on_device, tables = to_device(q.device, np.frombuffer(bytearray(numbers), np.int32), layout.block_tables.contiguous())
            kernel = KernelPlan(on_device, tables, tokens, cells, items)
    return kernel, _gather_plan(layout, k_cache.shape[2], window, longest, q.device)


def _fixed_plan(
    module: ModuleType | None, q: Tensor, layout: PagedLayout, fixed: FixedStep, k_cache: Tensor, window: int | None
) -> KernelPlan:
    if module is None:
        call = f"{q.dtype}, head size {q.shape[2]}"
        raise RuntimeError(f"paged_attention: a step of fixed shape needs the CUDA kernel, which does not run this call ({call})")
    steps = (layout.cu_seqlens, layout.context_lens, layout.block_tables)
    group, sequences = q.shape[1] // k_cache.shape[1], layout.context_lens.shape[0]
    shape = (k_cache.shape[2], k_cache.shape[0])
    most_items = fixed.cells * -(-group // 32)
    numbers = Staged(PLAN_HEADER + 4 * (sequences + most_items), dtype=torch.int32, device=q.device)

    def fill() -> tuple[int, int, tuple[int, ...]]:
        content, *launches = module.paged_plan(*steps, *shape, group, window or 0, 1, sequences, fixed.cells)
        values = np.frombuffer(content, np.int32)
        numbers.host[: len(values)] = torch.from_numpy(values.copy())
        numbers.push(len(values))
        return tuple(launches)  # type: ignore[return-value]

    tokens, cells, items = fill()
    return KernelPlan(numbers.device, fixed.tables, tokens, cells, items, fill)


def _gather_plan(layout: PagedLayout, block_size: int, window: int | None, longest: int, device: torch.device) -> GatherPlan | None:
    """Of the sequences with more than `longest` new tokens."""
    bounds, contexts = layout.cu_seqlens.tolist(), layout.context_lens.tolist()
    rows, blocks, offsets, counts_q, counts_k = [], [], [], [], []
    for s, context in enumerate(contexts):
        fresh = bounds[s + 1] - bounds[s]
        if fresh <= longest:
            continue
        first = 0 if window is None else max(0, context - fresh - window + 1)
        keys = torch.arange(first, context)
        rows.append(torch.arange(bounds[s], bounds[s + 1]))
        blocks.append(layout.block_tables[s].long()[keys // block_size])
        offsets.append(keys % block_size)
        counts_q.append(fresh)
        counts_k.append(context - first)
    if not rows:
        return None
    at = to_device(device, *(torch.cat(part) for part in (rows, blocks, offsets)))
    return GatherPlan(at[0], at[1], at[2], Segments.of(counts_q, counts_k, device))
