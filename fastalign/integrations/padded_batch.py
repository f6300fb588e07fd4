"""A padded batch as a token tree: no padding, equal prompts once, and no token after the last scored one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastalign.ops.attention import TreeLayout


@dataclass(frozen=True)
class Tree:
    """What the backbone reads, T tokens, and where the scored tokens are predicted.

    Attributes:
        input_ids: [T] int64.
        position_ids: [T] int64, counted from the first token that is not padding.
        layout: who attends to whom.
        rows: [N] int64; the hidden row that predicts each scored token, in the order of the padded mask.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: TreeLayout
    rows: Tensor


@dataclass
class _Builder:
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    cu_seqlens: list[int] = field(default_factory=lambda: [0])
    parent: list[int] = field(default_factory=list)

    def add(self, ids: list[int], parent: int, position: int) -> int:
        """Appends a segment; returns its first row."""
        first = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.cu_seqlens.append(len(self.ids))
        self.parent.append(parent)
        return first


def as_tree(input_ids: Tensor, attention_mask: Tensor | None, scored: Tensor) -> Tree | None:
    """Packs the sequences of a padded batch; those whose tokens before the first scored one are equal share them.

    Args:
        input_ids: [B, T]; attention_mask: [B, T], 0 on padding, which may lie on both sides of a sequence; None: no padding.
        scored: [B, T-1] bool; whether token t+1 is scored.

    Returns:
        The tree on the device of input_ids; None when nothing is scored.

    Raises:
        ValueError: padding inside a sequence, or a scored token with nothing before it.
    """
    ids, columns = input_ids.tolist(), [row.nonzero().squeeze(1).add(1).tolist() for row in scored.cpu()]
    real = [[1] * len(row) for row in ids] if attention_mask is None else attention_mask.tolist()
    members: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for b, found in enumerate(columns):
        if not found:
            continue
        start = real[b].index(1) if 1 in real[b] else len(real[b])
        if start >= found[0] or not all(real[b][start : found[-1]]):
            raise ValueError(f"as_tree: row {b} has padding inside its sequence, or scores a token with nothing before it")
        members.setdefault(tuple(ids[b][start : found[0]]), []).append((b, start))
    if not members:
        return None
    builder, rows = _Builder(), [[] for _ in columns]  # type: ignore[var-annotated]
    for prompt, sequences in members.items():
        alone = len(sequences) == 1
        root = len(builder.parent)
        first = 0 if alone else builder.add(list(prompt), -1, 0)
        for b, start in sequences:
            tail = ids[b][columns[b][0] : columns[b][-1]]  # the last scored token predicts nothing that is scored
            if alone:
                own = builder.add([*prompt, *tail], -1, 0) + len(prompt)
                first = own - len(prompt)
            else:
                own = builder.add(tail, root, len(prompt)) if tail else 0
            before = [column - 1 - start for column in columns[b]]  # the place of the predicting token in its sequence
            rows[b] = [first + p if p < len(prompt) else own + p - len(prompt) for p in before]
    return _tree(builder, [row for found in rows for row in found], input_ids.device)


def _tree(builder: _Builder, rows: list[int], device: torch.device) -> Tree:
    flat = [torch.tensor(values, dtype=torch.int64, device=device) for values in (builder.ids, builder.positions, rows)]
    offsets = [torch.tensor(values, dtype=torch.int32) for values in (builder.cu_seqlens, builder.parent)]
    return Tree(flat[0], flat[1], TreeLayout(*offsets), flat[2])
