"""One forward pass over the paged cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastalign.generation.plan import Plan
from fastalign.generation.recorder import Recorder
from fastalign.generation.rows import Rows
from fastalign.models.backbone import causal_lm, paged_hidden_states
from fastalign.ops.attention import PagedLayout
from fastalign.staging import to_device

if TYPE_CHECKING:
    from fastalign.generation.graphs import DecodeGraphs


class KVCache:
    """Keys and values of every layer in one tensor [2, layers, num_blocks, kv_heads, block_size, head_dim].

    Args:
        model: tells the shapes, the dtype and the device.
        num_blocks, block_size: of the cache.

    Attributes:
        graphs: the CUDA graphs that read this cache; None: steps run without.
    """

    graphs: DecodeGraphs | None = None

    def __init__(self, model: nn.Module, num_blocks: int, block_size: int) -> None:
        layers, heads, head_dim = cache_shape(model)
        weight = next(causal_lm(model).parameters())
        self.num_blocks = num_blocks
        with torch.inference_mode(False):  # it outlives a caller's inference mode, out of which no tensor of it could be written
            self.data = torch.zeros(2, layers, num_blocks, heads, block_size, head_dim, dtype=weight.dtype, device=weight.device)
        self.keys, self.values = list(self.data[0]), list(self.data[1])

    def fits(self, model: nn.Module) -> bool:
        """Whether the model's keys and values are of this dtype and device."""
        weight = next(causal_lm(model).parameters())
        return (weight.dtype, weight.device) == (self.data.dtype, self.data.device)

    def grow(self, num_blocks: int) -> None:
        """Makes room for more blocks behind those that there are."""
        added = num_blocks - self.num_blocks
        if added > 0:
            if self.graphs is not None:
                self.graphs.forget()
            two, layers, _, *block = self.data.shape
            with torch.inference_mode(False):
                self.data = torch.cat([self.data, self.data.new_zeros(two, layers, added, *block)], 2)
            self.keys, self.values, self.num_blocks = list(self.data[0]), list(self.data[1]), num_blocks

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copies whole blocks, in every layer at once."""
        if len(sources):
            to, source = to_device(self.data.device, targets.astype(np.int64), sources.astype(np.int64))
            self.data[:, :, to] = self.data[:, :, source]


@dataclass(frozen=True, eq=False)
class Unread:
    """Tokens that were drawn and are still where the model is.

    Attributes:
        tokens: [D] int64.
        rows: [D] the sequences that they belong to.
    """

    tokens: Tensor
    rows: NDArray[np.int64]

    def put(self, ids: Tensor, rows: NDArray[np.int64], at: NDArray[np.int64]) -> None:
        """Writes the tokens of `rows` to ids[at], both [P]; nothing waits for them."""
        if np.array_equal(rows, self.rows) and np.array_equal(at, np.arange(len(rows))):
            ids[: len(rows)] = self.tokens
            return
        place = np.zeros(1 + max(self.rows.max(initial=0), rows.max(initial=0)), np.int64)
        place[self.rows] = np.arange(len(self.rows))
        index, to = to_device(ids.device, place[rows], at)
        ids[to] = self.tokens[index]


def cache_shape(model: nn.Module) -> tuple[int, int, int]:
    """(layers, key-value heads, head size) of a causal LM."""
    config = causal_lm(model).config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim


def cache_bytes_per_token(model: nn.Module) -> int:
    """Bytes of keys and values that one token takes."""
    layers, heads, head_dim = cache_shape(model)
    return 2 * layers * heads * head_dim * next(causal_lm(model).parameters()).element_size()


class Runner:
    """Runs plans: gathers ids, positions, slots and tables from the rows, and calls the backbone.

    Args:
        model: the live model.
        cache: where keys and values go.
        rows: the sequences.
        block_size: of the cache.
        recorder: notes where the passes are kept; None: they are not.
    """

    def __init__(self, model: nn.Module, cache: KVCache, rows: Rows, block_size: int, recorder: Recorder | None = None) -> None:
        self.model, self.cache, self.rows, self.block_size, self.recorder = model, cache, rows, block_size, recorder
        self.device = cache.data.device

    def forward(self, plan: Plan, unread: Unread | None = None) -> Tensor:
        """The last hidden row of each of the plan's sequences, [S, H].

        Args:
            unread: what was drawn in the step before, if the rows do not have it yet.
        """
        self.cache.copy(*plan.copies)
        rows, counts = plan.rows, plan.counts
        bounds = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=bounds[1:])
        put = self._put(plan, bounds, unread)
        replayed = self.cache.graphs.forward(plan, self.rows, self.cache, put) if self.cache.graphs is not None else None
        if replayed is not None:
            return replayed
        if len(rows) == bounds[-1]:  # every sequence decodes
            of, positions = rows, plan.starts
        else:
            of = np.repeat(rows, counts)
            positions = np.arange(bounds[-1]) + np.repeat(plan.starts - bounds[:-1], counts)
        slots = self.rows.table[of, positions // self.block_size].astype(np.int64) * self.block_size + positions % self.block_size
        ids, places, written = to_device(self.device, self.rows.tokens[of, positions], positions, slots)
        put(ids)
        hidden = paged_hidden_states(self.model, ids, places, self._layout(plan, bounds, written))
        if self.recorder is not None:
            self.recorder.copied(*plan.copies)
            self.recorder.forwarded(slots)
        return hidden if len(rows) == bounds[-1] else hidden[to_device(self.device, bounds[1:].astype(np.int64) - 1)[0]]

    def keep_logits(self, plan: Plan, at: np.ndarray) -> Callable[[slice, Tensor], None] | None:
        """Keeps logits of hidden rows that were selected by `at` from those of the plan just forwarded; None where nobody wants them."""
        recorder = self.recorder
        if recorder is None:
            return None
        last = np.cumsum(plan.counts)[at] - 1
        return lambda span, logits: recorder.drawn_from(last[span], logits)

    def select(self, hidden: Tensor, at: np.ndarray) -> Tensor:
        """The rows `at` of hidden."""
        return hidden if len(at) == len(hidden) else hidden[to_device(self.device, at)[0]]

    def _put(self, plan: Plan, bounds: np.ndarray, unread: Unread | None) -> Callable[[Tensor], None]:
        """What writes the tokens that the rows do not have yet into the ids of a step."""
        late = np.flatnonzero(plan.starts >= self.rows.length[plan.rows])
        if not len(late):
            return lambda ids: None
        assert unread is not None, "a sequence goes on from a token that was never drawn"
        return partial(unread.put, rows=plan.rows[late], at=bounds[late].astype(np.int64))

    def _layout(self, plan: Plan, bounds: np.ndarray, slots: Tensor) -> PagedLayout:
        columns, size = self.rows, self.block_size
        contexts = plan.starts + plan.counts
        width = -(-int(contexts.max()) // size)
        return PagedLayout(
            cu_seqlens=torch.from_numpy(bounds),
            context_lens=torch.from_numpy(contexts.astype(np.int32)),
            block_tables=torch.from_numpy(columns.table[plan.rows, :width]),
            slots=slots,
            k_cache=self.cache.keys,
            v_cache=self.cache.values,
        )
