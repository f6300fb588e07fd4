"""One failing or hanging sample costs that sample's reward and nothing else."""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .callers import Caller, CallFailed

logger = logging.getLogger("fastalign")

MAX_HUNG = 8
"""Samples of one batch that may each take their full time; with more it is the function that hangs, not the samples."""

_SMALLEST_SHARD = 8
_PROMPT_CHARACTERS = 200


@dataclass
class _Batch:
    arguments: dict[str, list[Any]]
    prompts: list[Any]
    timeout: float
    values: list[float]


class IsolatedReward:
    """Calls one reward with a whole batch, and finds the guilty samples when that fails.

    After an error, a wrong length or a crash the batch is halved until only the bad samples are left; after a time-out
    each sample is called by itself. What a sample fails with is logged with its prompt, and it scores NaN.

    Args:
        name: the reward's name in logs and metrics.
        caller: where it runs.
    """

    def __init__(self, name: str, caller: Caller) -> None:
        self.name = name
        self.caller = caller
        self._warned = False
        self._seconds_per_sample = 0.0  # learnt where a batch needs longer than one sample may take

    def score(self, arguments: dict[str, list[Any]], prompts: list[Any], timeout: float) -> list[float]:
        """[B] rewards, NaN where missing.

        Args:
            arguments: what the function gets by name, [B] each.
            prompts: [B] for the log.
            timeout: seconds that one sample may take. A batch gets as long, or twice what it was seen to need.
        """
        count = len(prompts)
        batch = _Batch(arguments, prompts, timeout, [math.nan] * count)
        shards = max(1, min(self.caller.shards, count // _SMALLEST_SHARD))
        parts = [list(range(i, count, shards)) for i in range(shards)]
        if shards == 1:
            self._halving(batch, parts[0])
        else:
            with ThreadPoolExecutor(shards) as pool:
                list(pool.map(lambda part: self._halving(batch, part), parts))
        if prompts and not self._warned and all(map(math.isnan, batch.values)):
            self._warned = True
            logger.warning("reward %r: none of the %d samples of a batch has a reward; are its columns the right ones?", self.name, count)
        return batch.values

    def _halving(self, batch: _Batch, indices: list[int]) -> None:
        stack = [indices] if indices else []
        while stack:
            part = stack.pop()
            limit = batch.timeout if len(part) == 1 else max(batch.timeout, 2 * self._seconds_per_sample * len(part))
            try:
                self._call(batch, part, limit)
            except CallFailed as failure:
                if len(part) == 1:
                    self._lose(batch, part[0], str(failure))
                elif failure.hung:
                    self._one_by_one(batch, part)
                else:
                    stack += [part[len(part) // 2 :], part[: len(part) // 2]]

    def _one_by_one(self, batch: _Batch, part: list[int]) -> None:
        began, hung = time.monotonic(), 0
        for i in part:
            if hung >= MAX_HUNG:
                self._lose(batch, i, f"not called: {hung} samples of its batch ran past {batch.timeout:g} s before it")
                continue
            try:
                self._call(batch, [i], batch.timeout)
            except CallFailed as failure:
                hung += failure.hung
                self._lose(batch, i, str(failure))
        if not hung:
            self._seconds_per_sample = (time.monotonic() - began) / len(part)
            logger.warning(
                "reward %r: %d samples together ran past %g s, though none of them did alone; such a batch now gets %.0f s",
                *(self.name, len(part), batch.timeout, 2 * self._seconds_per_sample * len(part)),
            )

    def _call(self, batch: _Batch, part: list[int], limit: float) -> None:
        arguments = {name: [column[i] for i in part] for name, column in batch.arguments.items()}
        for i, value in zip(part, self.caller.call(arguments, len(part), limit), strict=True):
            if isinstance(value, dict):
                self._lose(batch, i, value["bad"])
            elif value is not None:
                batch.values[i] = value

    def _lose(self, batch: _Batch, i: int, reason: str) -> None:
        prompt = repr(batch.prompts[i])
        short = prompt if len(prompt) <= _PROMPT_CHARACTERS else prompt[:_PROMPT_CHARACTERS] + "…"
        logger.warning("reward %r: sample %d has no reward: %s; prompt: %s", self.name, i, reason, short)
