"""Packed: tokens in a tree of segments, with no padding and no token forwarded twice.

A prompt and its G completions are one root with G children; a preference pair is one root with two; a conversation
is one segment with a mask. The layout is what the attention reads; rows and targets are what the loss reads.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapreplace

import torch
from torch import Tensor

from .staging import to_device


@dataclass(frozen=True)
class Segment:
    """A run of tokens that continues its parent.

    Args:
        ids: the token ids.
        scored: which of them are predicted by the loss: all, none, or one flag a token.
        children: the segments that go on from here.
        weight: the loss weight of the scored tokens, one number or one a token.
    """

    ids: Sequence[int]
    scored: bool | Sequence[bool] = False
    children: tuple[Segment, ...] = ()
    weight: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        for name, value in (("scored", self.scored), ("weight", self.weight)):
            if isinstance(value, Sequence) and len(value) != len(self.ids):
                raise ValueError(f"Segment: {name} must have one entry a token, expected {len(self.ids)}, got {len(value)}")

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole tree below and including this segment: what a forward pass computes."""
        return len(self.ids) + sum(child.num_tokens for child in self.children)


def conversation(ids: Sequence[int], scored: bool | Sequence[bool] = True, weight: float | Sequence[float] = 1.0) -> Segment:
    """One sequence with its mask, as supervised training reads it."""
    return Segment(ids, scored, (), weight)


def group(prompt: Sequence[int], completions: Iterable[Sequence[int]], masks: Iterable[Sequence[bool]] | None = None) -> Segment:
    """A prompt forwarded once and its completions, all scored unless `masks` say otherwise (environment tokens)."""
    completions = list(completions)
    flags: list[bool | Sequence[bool]] = [True] * len(completions) if masks is None else list(masks)
    if len(flags) != len(completions):
        raise ValueError(f"group: expected one mask a completion, got {len(flags)} masks for {len(completions)} completions")
    return Segment(prompt, False, tuple(Segment(ids, flag) for ids, flag in zip(completions, flags, strict=True)))


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Segment:
    """A preference pair: the prompt once, the chosen completion first."""
    return group(prompt, (chosen, rejected))


@dataclass(frozen=True)
class Packed:
    """A micro-batch as a token tree. T tokens, S segments, N scored tokens, B sequences, P groups (roots).

    Attributes:
        input_ids: [T] int64.
        position_ids: [T] int64; a segment's positions go on from its parent's.
        cu_seqlens: [S+1] int32; segment s is input_ids[cu_seqlens[s]:cu_seqlens[s+1]].
        parent: [S] int32; the segment that s continues, -1 for a root. Parents come first, and a tree is contiguous.
        rows: [N] int64; the hidden row that predicts targets[n]. A prompt's last row serves each of its children.
        targets: [N] int64.
        weights: [N] fp32, or None where every weight is 1.
        cu_targets: [B+1] int32; sequence b owns targets[cu_targets[b]:cu_targets[b+1]]. A sequence is a root-to-leaf
            path; a scored token shared by several leaves belongs to the first of them, so it counts once.
        cu_groups: [P+1] int32; group p owns sequences cu_groups[p]:cu_groups[p+1].
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    parent: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor | None
    cu_targets: Tensor
    cu_groups: Tensor

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_targets(self) -> int:
        return self.targets.numel()

    @property
    def num_sequences(self) -> int:
        return self.cu_targets.numel() - 1

    def to(self, device: torch.device | str) -> Packed:
        """Moves what the model reads; the offsets (cu_*, parent) stay on the CPU, where layouts are built."""
        names = ("input_ids", "position_ids", "rows", "targets", *(() if self.weights is None else ("weights",)))
        return replace(self, **dict(zip(names, to_device(device, *(getattr(self, name) for name in names)), strict=True)))

    def sequence_of_targets(self) -> Tensor:
        """[N] int64: the sequence that owns each scored token."""
        lengths = (self.cu_targets[1:] - self.cu_targets[:-1]).long()
        return torch.repeat_interleave(torch.arange(self.num_sequences), lengths)


@dataclass
class _Builder:
    forward_last: bool = True
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    cu_seqlens: list[int] = field(default_factory=lambda: [0])
    parent: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    cu_targets: list[int] = field(default_factory=lambda: [0])
    cu_groups: list[int] = field(default_factory=lambda: [0])

    def add_tree(self, root: Segment) -> None:
        # depth first with an explicit stack: search trees are deeper than Python's recursion limit
        stack = [(root, -1, 0, -1)]
        while stack:
            segment, parent, position, predictor = stack.pop()
            index = self.add_segment(segment, parent, position, predictor)
            last = len(self.ids) - 1 if segment.ids else predictor  # of a leaf nobody reads it
            if not segment.children:
                self.cu_targets.append(len(self.targets))
            for child in reversed(segment.children):
                stack.append((child, index, position + len(segment.ids), last))
        self.cu_groups.append(len(self.cu_targets) - 1)

    def add_segment(self, segment: Segment, parent: int, position: int, predictor: int) -> int:
        start, count = len(self.ids), len(segment.ids)
        if count and not self.forward_last and not segment.children and (parent >= 0 or count > 1):
            count -= 1
        self.ids.extend(segment.ids[:count])
        self.positions.extend(range(position, position + count))
        self.cu_seqlens.append(start + count)
        self.parent.append(parent)
        if segment.scored is not False:
            self.score(segment, start, predictor)
        return len(self.parent) - 1

    def score(self, segment: Segment, start: int, predictor: int) -> None:
        scored, weight = segment.scored, segment.weight
        for i, token in enumerate(segment.ids):
            row = start + i - 1 if i else predictor
            flag = scored if isinstance(scored, bool) else scored[i]
            if row < 0 or not flag:  # the first token of a root has nothing to predict it
                continue
            self.rows.append(row)
            self.targets.append(token)
            self.weights.append(float(weight if isinstance(weight, int | float) else weight[i]))


def pack(trees: Segment | Iterable[Segment], *, forward_last: bool = True) -> Packed:
    """Packs token trees into one micro-batch.

    Args:
        trees: roots, as `group`, `pair`, `conversation` or `Segment` build them. Empty segments are allowed.
        forward_last: False: the last token of a sequence is predicted and not forwarded, where only predictions are read. Of a sequence
            of one token it stays.

    Returns:
        A `Packed` on the CPU.

    Raises:
        ValueError: when there is no token at all, or a token id is negative.
    """
    builder = _Builder(forward_last)
    for root in [trees] if isinstance(trees, Segment) else trees:
        builder.add_tree(root)
    if not builder.ids:
        raise ValueError("pack: expected at least one token, got none; drop empty records before packing")
    if min(builder.ids) < 0:
        bad = builder.ids.index(min(builder.ids))
        raise ValueError(f"pack: token ids must be >= 0, got {builder.ids[bad]} at position {bad}")
    uniform = all(w == 1.0 for w in builder.weights)
    return Packed(
        input_ids=torch.tensor(builder.ids, dtype=torch.int64),
        position_ids=torch.tensor(builder.positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(builder.cu_seqlens, dtype=torch.int32),
        parent=torch.tensor(builder.parent, dtype=torch.int32),
        rows=torch.tensor(builder.rows, dtype=torch.int64),
        targets=torch.tensor(builder.targets, dtype=torch.int64),
        weights=None if uniform else torch.tensor(builder.weights, dtype=torch.float32),
        cu_targets=torch.tensor(builder.cu_targets, dtype=torch.int32),
        cu_groups=torch.tensor(builder.cu_groups, dtype=torch.int32),
    )


def tokens_of(packed: Packed, sequence: int) -> Tensor:
    """[L] int64: which of the tree's tokens are a root-to-leaf path's, in order."""
    bounds, parent = packed.cu_seqlens.tolist(), packed.parent.tolist()
    segment = sorted(set(range(len(parent))) - set(parent))[sequence]
    chain = []
    while segment >= 0:
        chain.append(torch.arange(bounds[segment], bounds[segment + 1]))
        segment = parent[segment]
    return torch.cat(chain[::-1])


def one_sequence(packed: Packed, sequence: int) -> Packed:
    """A root-to-leaf path alone, with the scored tokens that it owns in the order of `targets`; without weights."""
    index = tokens_of(packed, sequence)
    place = torch.full((packed.num_tokens,), -1)
    place[index] = torch.arange(len(index))
    own = slice(*packed.cu_targets[sequence : sequence + 2].tolist())
    device = packed.input_ids.device
    return Packed(
        input_ids=packed.input_ids[index.to(device)],
        position_ids=packed.position_ids[index.to(device)],
        cu_seqlens=torch.tensor([0, len(index)], dtype=torch.int32),
        parent=torch.tensor([-1], dtype=torch.int32),
        rows=place.to(device)[packed.rows[own]],
        targets=packed.targets[own],
        weights=None,
        cu_targets=torch.tensor([0, own.stop - own.start], dtype=torch.int32),
        cu_groups=torch.tensor([0, 1], dtype=torch.int32),
    )


def sequences(packed: Packed) -> list[list[int]]:
    """Every root-to-leaf path as token ids, in the order of `cu_targets`: the padded world's view of the tree."""
    bounds, parent = packed.cu_seqlens.tolist(), packed.parent.tolist()
    leaves = sorted(set(range(len(parent))) - set(parent))
    paths = []
    for leaf in leaves:
        chain, s = [], leaf
        while s >= 0:
            chain.append(packed.input_ids[bounds[s] : bounds[s + 1]].tolist())
            s = parent[s]
        paths.append([token for part in reversed(chain) for token in part])
    return paths


def split_by_tokens(trees: Sequence[Segment], max_tokens: int) -> list[list[int]]:
    """Cuts trees into few micro-batches of at most `max_tokens` forwarded tokens, and those as alike as they can be.

    How many: those of best-fit decreasing, at most 11/9 of the fewest that can be for many trees (Johnson et al. 1974). Into as many
    the trees then go again, the largest first, each to the smallest micro-batch; where that keeps the budget it is the cut. A batch a
    little over the budget becomes two halves, which take half the memory of a full micro-batch and a small rest.
    O(n log n), but for shifts in a list of at most `max_tokens` numbers.

    Returns lists of indices into `trees`; a tree larger than the budget is a micro-batch of its own.
    """
    if max_tokens < 1:
        raise ValueError(f"split_by_tokens: max_tokens must be >= 1, got {max_tokens}")
    sizes = [tree.num_tokens for tree in trees]
    largest_first = sorted(range(len(trees)), key=lambda i: (-sizes[i], i))
    few = _best_fit(sizes, largest_first, max_tokens)
    alike = _level(sizes, largest_first, len(few))
    keeps = all(len(members) == 1 or sum(sizes[i] for i in members) <= max_tokens for members in alike)
    return [sorted(members) for members in (alike if keeps else few)]


def _level(sizes: Sequence[int], order: Sequence[int], count: int) -> list[list[int]]:
    """In this order each to the smallest of `count` bins (Graham 1969)."""
    bins: list[list[int]] = [[] for _ in range(count)]
    used = [(0, b) for b in range(count)]
    for index in order:
        tokens, smallest = used[0]
        bins[smallest].append(index)
        heapreplace(used, (tokens + sizes[index], smallest))
    return bins


def _best_fit(sizes: Sequence[int], order: Sequence[int], max_tokens: int) -> list[list[int]]:
    """In this order each to the bin where it leaves the least room."""
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # tokens left → the micro-batches with just that room
    rooms: list[int] = []  # its keys, ascending
    for index in order:
        at = bisect_left(rooms, sizes[index])
        if at < len(rooms):
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
            bins[chosen].append(index)
        else:
            room, chosen = max_tokens, len(bins)
            bins.append([index])
        left = room - sizes[index]
        if left > 0:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(chosen)
    return bins
