"""The live sequences as columns of preallocated arrays, so that a step costs a few array operations however many there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .params import LogitsProcessor, SamplingParams
from .recorder import Recorder

Array = NDArray[np.generic]


@dataclass(eq=False)
class Record:
    """What was drawn for one completion so far; arrays of one length.

    Attributes:
        tokens: int64.
        logprobs, raw_logprobs, kept_mass: fp32.
        versions: int32, the weight version at each token.
        recorded: int64, of every token that was forwarded, prompt included: its row of a recording; None without one.
    """

    tokens: Array
    logprobs: Array
    raw_logprobs: Array
    kept_mass: Array
    versions: Array
    recorded: NDArray[np.int64] | None = None

    @classmethod
    def empty(cls) -> Record:
        floats = np.empty(0, np.float32)
        return cls(np.empty(0, np.int64), floats, floats, floats, np.empty(0, np.int32))


@dataclass(frozen=True, eq=False)
class RowSpec:
    """What a row is filled from: the constants of its sequence.

    Attributes:
        params: of its request.
        seed, request, sample: the random key.
        limit: tokens, prompt included, at which the sequence ends.
        stop_set: row of the engine's stop table.
        order: sort key: request arrival, then sample.
        draws: samples drawn when its known tokens have been forwarded (n for a prompt that will fork).
        priority: sort key before `order`.
        logprobs: whether log-probs are wanted.
    """

    params: SamplingParams
    seed: int
    request: int
    sample: int
    limit: int
    stop_set: int
    order: int
    draws: int
    priority: int = 0
    logprobs: bool = True


class Rows:
    """R rows, each one live sequence of at most W tokens, C of them completion.

    Attributes, all [R] unless said otherwise:
        tokens: [R, W] int64, prompt and completion.
        logprobs, raw_logprobs, kept_mass: [R, C] fp32, versions: [R, C] int32; column 0 is the first completion token.
        length: tokens known; expected: with those that are drawn and not read yet (`run.InFlight`), else the same.
        computed: tokens whose keys and values are in the cache (0 <= computed < expected).
        tenant: how many sequences have left the row, so that what was drawn for one of them is not taken for the next.
        high_water: tokens forwarded at least once; forwarding below it is recomputation.
        table: [R, max_blocks] int32; num_blocks: entries in use.
        limit, min_length: total tokens at which a sequence ends, and before which it does not stop.
        draws: samples drawn when all known tokens have been forwarded.
        scans: whether stop strings are looked for; wants: whether log-probs are; top: alternatives to report.
        processors: the logits processors of each row's request; processed: whether there are any.
        recorder: knows where forward passes were kept; None: nowhere. earlier: where those before a preemption were.
    """

    recorder: Recorder | None = None

    length: NDArray[np.int64]
    expected: NDArray[np.int64]
    tenant: NDArray[np.int64]
    computed: NDArray[np.int64]
    high_water: NDArray[np.int64]
    num_blocks: NDArray[np.int64]
    prompt_length: NDArray[np.int64]
    limit: NDArray[np.int64]
    min_length: NDArray[np.int64]
    stop_set: NDArray[np.int64]
    request: NDArray[np.int64]
    sample: NDArray[np.int64]
    order: NDArray[np.int64]
    draws: NDArray[np.int64]
    priority: NDArray[np.int64]
    top: NDArray[np.int64]
    top_k: NDArray[np.int64]
    SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "request", "limit", "stop_set", "min_length", "prompt_length")
    CONSTANTS = (*SAMPLING, "scans", "wants", "processed", "top", "priority")
    PER_TOKEN = ("logprobs", "raw_logprobs", "kept_mass", "versions")

    def __init__(self, num_rows: int, width: int, completion_width: int, max_blocks: int) -> None:
        self.num_rows = num_rows
        self.tokens = np.zeros((num_rows, width), np.int64)
        self.logprobs = np.zeros((num_rows, completion_width), np.float32)
        self.raw_logprobs = np.zeros((num_rows, completion_width), np.float32)
        self.kept_mass = np.ones((num_rows, completion_width), np.float32)
        self.versions = np.zeros((num_rows, completion_width), np.int32)
        self.table = np.zeros((num_rows, max_blocks), np.int32)
        ints = ("length", "expected", "tenant", "computed", "num_blocks", "sample", "order", "draws", "high_water", "priority", "top")
        for name in (*ints, "request", "limit", "stop_set", "min_length", "prompt_length", "top_k"):
            setattr(self, name, np.zeros(num_rows, np.int64))
        self.temperature = np.zeros(num_rows)  # fp64: 1 / temperature must round as the trainer's does
        self.top_p, self.min_p = np.zeros(num_rows, np.float32), np.zeros(num_rows, np.float32)
        self.seed = np.zeros(num_rows, np.uint64)
        self.scans, self.wants, self.processed = (np.zeros(num_rows, bool) for _ in range(3))
        self.processors: list[tuple[LogitsProcessor, ...]] = [()] * num_rows
        self.earlier: list[NDArray[np.int64] | None] = [None] * num_rows

    def reserve(self, width: int, completion_width: int, max_blocks: int) -> None:
        """Widens the rows where they are narrower."""

        wanted = {"tokens": width, "table": max_blocks, **dict.fromkeys(self.PER_TOKEN, completion_width)}
        for name, columns in wanted.items():
            now = getattr(self, name)
            if columns > now.shape[1]:
                more = max(columns - now.shape[1], now.shape[1] // 2)
                setattr(self, name, np.pad(now, ((0, 0), (0, more))))

    def fill(self, row: int, prompt: Array, record: Record, spec: RowSpec) -> None:
        """Puts a sequence into `row`: its prompt, what was drawn already, and its constants."""
        start, drawn = len(prompt), len(record.tokens)
        self.tokens[row, :start] = prompt
        self.tokens[row, start : start + drawn] = record.tokens
        for name in self.PER_TOKEN:
            getattr(self, name)[row, :drawn] = getattr(record, name)
        self.length[row] = self.expected[row] = start + drawn
        self.prompt_length[row], self.earlier[row] = start, record.recorded
        params = spec.params
        self.temperature[row], self.top_p[row], self.top_k[row], self.min_p[row] = (
            params.temperature,
            params.top_p,
            params.top_k,
            params.min_p,
        )
        self.seed[row], self.request[row], self.sample[row] = spec.seed, spec.request, spec.sample
        self.limit[row], self.stop_set[row], self.min_length[row] = spec.limit, spec.stop_set, start + params.min_tokens
        self.order[row], self.draws[row], self.priority[row] = spec.order, spec.draws, spec.priority
        self.scans[row], self.wants[row], self.top[row] = bool(params.stop), spec.logprobs, params.top_logprobs
        self.processors[row], self.processed[row] = tuple(params.logits_processors), bool(params.logits_processors)

    def copy_prompt(self, source: int, target: int) -> None:
        """Makes `target` another sample of the sequence in `source`, with the same blocks and no completion yet."""
        length = self.length[source]
        self.tokens[target, :length] = self.tokens[source, :length]
        self.table[target, : self.num_blocks[source]] = self.table[source, : self.num_blocks[source]]
        for name in (*self.CONSTANTS, "length", "expected", "computed", "num_blocks", "high_water"):
            column = getattr(self, name)
            column[target] = column[source]
        self.processors[target], self.earlier[target] = self.processors[source], self.earlier[source]
        self.draws[target] = 1

    def record(self, row: int) -> Record:
        """A copy of what was drawn in `row`."""
        start, end = self.prompt_length[row], self.length[row]
        drawn = end - start
        return Record(
            self.tokens[row, start:end].copy(),
            self.logprobs[row, :drawn].copy(),
            self.raw_logprobs[row, :drawn].copy(),
            self.kept_mass[row, :drawn].copy(),
            self.versions[row, :drawn].copy(),
            None if self.recorder is None else self._recorded(row, self.recorder),
        )

    def _recorded(self, row: int, recorder: Recorder) -> NDArray[np.int64]:
        """Where the forward pass of each computed token was kept: the first time, if it was more than once, which has the logits."""
        found, before = recorder.of(self.blocks(row), int(self.computed[row])), self.earlier[row]
        if before is None:
            return found
        longer, shorter = (before, found) if len(before) > len(found) else (found, before)
        out = longer.copy()
        both = slice(0, len(shorter))
        out[both] = np.where(before[both] >= 0, before[both], found[both])
        return out

    def pending(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that each of `rows` has to forward: none where the last one is being drawn."""
        return np.where(self.expected[rows] < self.limit[rows], self.expected[rows] - self.computed[rows], 0)

    def blocks(self, row: int) -> NDArray[np.int32]:
        """The blocks that `row` holds, a view."""
        return self.table[row, : self.num_blocks[row]]
