"""Decode steps as CUDA graphs: the launches of a whole forward pass are recorded once and replayed as one.

A graph is recorded for a bucket, (sequences, blocks a table row, splits of keys), on the first step that falls into it, and reads
what a step is from device memory that keeps its place: ids, positions, slots, tables, and the attention's plan. Rows that fill a bucket up
have no slot and no sequence: they store nothing, read no block, and their output is cut off, so no block has to be set aside for them.

Parameters are updated in place, so graphs outlive an optimizer's step; `verify` notices weights that have moved and adapters that were
switched. What cannot be recorded runs as before: prompts and mixed steps, and a model whose forward waits for the device or whose
attention has no CUDA kernel, which is said once.

A replay does the arithmetic of the same forward at the bucket's row count. On the CPU, where tests run it step by step, rows do not
depend on their number and the results are bitwise those without graphs. On a GPU a matrix product may choose its kernel by the row
count: a bucket that is full is expected to give the bits of the plain forward, one that is filled up differs from it by rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.generation.plan import Plan
from fastalign.generation.rows import Rows
from fastalign.generation.runner import KVCache
from fastalign.models.backbone import causal_lm, paged_hidden_states
from fastalign.ops.attention import PagedLayout
from fastalign.ops.attention_paged import FixedStep, cells_of, refill
from fastalign.staging import Staged

Replay = Callable[[], Tensor]
MAX_GRAPHS = 128  # the one that was used longest ago is dropped
NO_SLOT = -1
_ABANDONED: list[object] = []


class CudaRecorder:
    """Records steps as CUDA graphs that share one pool of memory, so a replay's result is valid until the next replay.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, step: Replay) -> Replay:
        """Runs the step once, outside of a graph, which loads and plans what is loaded and planned once; then records it."""
        device = self._stream.device
        before = torch.cuda.current_stream(device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.synchronize(device)
        graph, failed = torch.cuda.CUDAGraph(), None
        with torch.cuda.stream(self._stream):  # torch.cuda.graph leaves the thread on its stream where ending a recording raises
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out = step()
            except BaseException as error:
                failed = error
            try:
                graph.capture_end()
            except RuntimeError as error:
                failed = failed or error
                self._abandon(graph)
        if failed is not None:
            raise failed
        before.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def renew(self) -> None:
        """Once every graph is gone: torch takes a pool that nobody uses for a new one only after all its memory was freed."""
        self._pool = torch.cuda.graph_pool_handle()

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends what a recording that could not be ended has begun in torch's allocator, which does not itself up to torch 2.11: memory
        that is freed would not be given out again in this process."""
        _ABANDONED.append(graph)  # the allocator may ask it
        pool, index = self._pool, self._stream.device.index
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)


def record_nothing(step: Replay) -> Replay:
    """Stands in for a recorder where there is no GPU: the step is run again on its fixed buffers."""
    step()
    return step


class DecodeGraphs:
    """The graphs of one model and one cache, which holds them (`KVCache.graphs`).

    Args:
        model: the live model.
        block_size: of the cache.
        record: makes a replay of a step; None: CUDA graphs on the model's device.

    Attributes:
        recorded, replayed: how many graphs were recorded, and steps replayed.
        reason: why nothing is recorded any more; empty while it is.
    """

    def __init__(self, model: nn.Module, block_size: int, *, record: Callable[[Replay], Replay] | None = None) -> None:
        self.model, self.block_size = model, block_size
        self.recorded = self.replayed = 0
        self.reason = ""
        self._record = record or CudaRecorder(next(causal_lm(model).parameters()).device)
        self._graphs: dict[Hashable, tuple[FixedBuffers, Replay]] = {}
        self._seen = state_of(model)

    def verify(self) -> None:
        """Forgets every graph when weights have moved or adapters were switched since they were recorded; call it after such changes."""
        seen = state_of(self.model)
        if seen != self._seen:
            self.forget()
            self._seen = seen

    def forget(self) -> None:
        """Drops every graph: what they read has moved."""
        self._graphs.clear()
        if isinstance(self._record, CudaRecorder):
            self._record.renew()

    def forward(self, plan: Plan, rows: Rows, cache: KVCache, put: Callable[[Tensor], object] = lambda ids: None) -> Tensor | None:
        """The last hidden rows [S, H] of a step in which every sequence decodes; None: run it without a graph.

        The block copies of the plan have been made. The result is overwritten by the next call.

        Args:
            put: writes the ids, one a sequence, that `rows` do not have yet.
        """
        if self.reason or not len(plan.rows) or (plan.counts != 1).any():
            return None
        contexts = plan.starts + 1
        width = -(-int(contexts.max()) // self.block_size)
        key = (sequence_bucket(len(plan.rows)), _power_of_two(width), _power_of_two(cells_of(contexts)))
        step = (rows.tokens[plan.rows, plan.starts], plan.starts, rows.table[plan.rows, :width])
        graph = self._graphs.pop(key, None)
        if graph is None:
            graph = self._recorded(key, step, cache)
        else:
            graph[0].fill(*step)
        if graph is None:
            return None
        put(graph[0].ids)
        self._graphs[key] = graph  # behind all others: the first is the one used longest ago
        self.replayed += 1
        return graph[1]()[: len(plan.rows)]

    def _recorded(self, key: tuple[int, int, int], step: tuple[np.ndarray, ...], cache: KVCache) -> tuple[FixedBuffers, Replay] | None:
        if len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        try:
            buffers = FixedBuffers(cache, self.block_size, *key)
            buffers.fill(*step)
            replay = self._record(lambda: paged_hidden_states(self.model, buffers.ids, buffers.positions, buffers.layout))
        except (RuntimeError, ValueError, TypeError) as error:  # what a forward raises that waits for the device, or has no kernel
            self._graphs.clear()
            self.reason = _first_cause(error)
            family = causal_lm(self.model).config.model_type
            warnings.warn(f"fastalign: {family} decodes without CUDA graphs: {self.reason}", stacklevel=2)
            return None
        self.recorded += 1
        return buffers, replay


class FixedBuffers:
    """What a recorded step reads, at addresses that do not change.

    Args:
        cache, block_size: the KV cache.
        sequences, width, cells: room for so many sequences, blocks a table row, and splits of keys in all.
    """

    def __init__(self, cache: KVCache, block_size: int, sequences: int, width: int, cells: int) -> None:
        device = cache.data.device
        self.block_size = block_size
        self._inputs = Staged(3, sequences, dtype=torch.int64, device=device)
        self._tables = Staged(sequences, width, dtype=torch.int32, device=device)
        self.ids, self.positions, slots = self._inputs.device.unbind()
        self.layout = PagedLayout(
            cu_seqlens=torch.zeros(sequences + 1, dtype=torch.int32),
            context_lens=torch.zeros(sequences, dtype=torch.int32),
            block_tables=self._tables.host,
            slots=slots,
            k_cache=cache.keys,
            v_cache=cache.values,
            fixed=FixedStep(self._tables.device, cells),
        )

    def fill(self, ids: np.ndarray, positions: np.ndarray, tables: np.ndarray) -> None:
        """Makes this the step: ids and positions [S] int64, tables [S, blocks] int32; the rows behind are padding."""
        count, width = tables.shape
        blocks = tables[np.arange(count), positions // self.block_size].astype(np.int64)
        inputs = self._inputs.host.numpy()
        inputs[:, count:] = [[0], [0], [NO_SLOT]]
        inputs[:, :count] = ids, positions, blocks * self.block_size + positions % self.block_size
        self._tables.host.numpy()[:count, :width] = tables
        self.layout.cu_seqlens.numpy()[:] = np.minimum(np.arange(len(inputs[0]) + 1), count)
        contexts = self.layout.context_lens.numpy()
        contexts[:count], contexts[count:] = positions + 1, 0
        self._inputs.push()
        self._tables.push()
        refill(self.layout)


def sequence_bucket(count: int) -> int:
    """Rows of the graph that runs `count` sequences: 1, 2, 4, 8, then the multiples of 16."""
    return _power_of_two(count) if count <= 16 else -(-count // 16) * 16


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def state_of(model: nn.Module) -> list[object]:
    """What a graph has baked in: where each weight lies, and the adapters in use with their scales."""
    return list(_state(model))


def _state(model: nn.Module) -> Iterator[object]:
    for tensors in (model.parameters(), model.buffers()):
        yield from ((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors)
    for name, module in model.named_modules():
        off = getattr(module, "disable_adapters", None)
        if isinstance(off, bool):  # a PEFT layer
            scaling = getattr(module, "scaling", None)
            scales = dict(scaling) if isinstance(scaling, dict) else scaling
            yield name, off, getattr(module, "merged", None), str(getattr(module, "active_adapters", None)), scales


def _first_cause(error: BaseException) -> str:
    """The error at the start of the chain: ending a failed recording raises another one on top."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]
