"""One failing or hanging sample costs that sample's reward and nothing else."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .callers import Caller, CallFailed

logger = logging.getLogger("fastalign")

MAX_HUNG = 8
"""Samples of one batch that may each take their full time; with more it is the function that hangs, not the samples."""

_SMALLEST_SHARD = 8
_PROMPT_CHARACTERS = 200


@dataclass
class Hangs:
    """Samples that ran past their time, over all the calls that share this count, and how many may."""

    most: int = MAX_HUNG
    places: list[int] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return len(self.places) >= self.most


@dataclass
class _Batch:
    arguments: dict[str, list[Any]]
    prompts: list[Any]
    timeout: float
    values: list[float]
    places: Sequence[int]
    hangs: Hangs | None


class IsolatedReward:
    """Calls one reward with a whole batch, and finds the guilty samples when that fails.

    After an error or a crash the batch is halved until only the bad samples are left; after a time-out each sample is called by itself.
    A list of the wrong length costs all samples their reward. What a sample fails with is logged with its prompt, and it scores NaN.

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
        values = self.score_part(arguments, prompts, timeout, range(len(prompts)))
        self.look(values)
        return values

    def score_part(
        self, arguments: dict[str, list[Any]], prompts: list[Any], timeout: float, places: Sequence[int], hangs: Hangs | None = None
    ) -> list[float]:
        """`score` of some samples of a batch.

        Args:
            places: [B] where in the batch they are, for the log.
            hangs: the count that the parts of the batch share; None: each call has its own.
        """
        count = len(prompts)
        batch = _Batch(arguments, prompts, timeout, [math.nan] * count, places, hangs)
        shards = max(1, min(self.caller.shards, count // _SMALLEST_SHARD))
        parts = [list(range(i, count, shards)) for i in range(shards)]
        if shards == 1:
            self._halving(batch, parts[0])
        else:
            with ThreadPoolExecutor(shards) as pool:
                list(pool.map(lambda part: self._halving(batch, part), parts))
        return batch.values

    def look(self, values: list[float]) -> None:
        """Says, once, that no sample of a batch has a reward."""
        if values and not self._warned and all(map(math.isnan, values)):
            self._warned = True
            message = "reward %r: none of the %d samples of a batch has a reward; are its columns the right ones?"
            logger.warning(message, self.name, len(values))

    def _halving(self, batch: _Batch, indices: list[int]) -> None:
        if batch.hangs is not None and batch.hangs.over:
            self._one_by_one(batch, indices)
            return
        stack = [indices] if indices else []
        while stack:
            part = stack.pop()
            limit = batch.timeout if len(part) == 1 else max(batch.timeout, 2 * self._seconds_per_sample * len(part))
            try:
                self._call(batch, part, limit)
            except CallFailed as failure:
                if failure.of_all and len(part) > 1:
                    logger.warning("reward %r: %d samples have no reward: %s", self.name, len(part), failure)
                elif len(part) == 1:
                    if failure.hung and batch.hangs is not None:
                        batch.hangs.places.append(batch.places[part[0]])
                    self._lose(batch, part[0], str(failure))
                elif failure.hung:
                    self._one_by_one(batch, part)
                else:
                    if part is indices:
                        logger.warning(
                            "reward %r: a call with %d samples failed, and is repeated in halves to find those at fault: %s; a function"
                            " that compares completions sees fewer of them there",
                            *(self.name, len(part), failure),
                        )
                    stack += [part[len(part) // 2 :], part[: len(part) // 2]]

    def _one_by_one(self, batch: _Batch, part: list[int]) -> None:
        began, hangs, hung = time.monotonic(), batch.hangs or Hangs(), False
        for i in part:
            if hangs.over:
                hung = True
                self._lose(batch, i, f"not called: {len(hangs.places)} samples of its batch ran past {batch.timeout:g} s before it")
                continue
            try:
                self._call(batch, [i], batch.timeout)
            except CallFailed as failure:
                if failure.hung:
                    hung = True
                    hangs.places.append(batch.places[i])
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
        logger.warning("reward %r: sample %d has no reward: %s; prompt: %s", self.name, batch.places[i], reason, short)
