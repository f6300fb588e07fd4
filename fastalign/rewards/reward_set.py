"""RewardSet: the rewards of a run, by name, with their weights."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from .early import EarlyScoring, part_of
from .isolation import IsolatedReward

Prompt = str | list[dict[str, Any]]

_GIVEN = ("prompts", "completions", "completion_ids")


@dataclass
class Reward:
    """One reward of the set.

    Attributes:
        name: its name in metrics and logs.
        isolated: calls it so that a bad sample costs only itself.
        any_column: it needs one of these columns; empty: its signature says what it needs.
    """

    name: str
    isolated: IsolatedReward
    any_column: tuple[str, ...] = ()

    @functools.cached_property
    def signature(self) -> dict[str, Any]:
        return self.isolated.caller.signature()

    @property
    def per_sample(self) -> bool:
        """Whether a sample's reward is said to depend on that sample alone, so that it may be called with any part of a batch."""
        return bool(self.signature.get("per_sample"))

    def check(self, columns: Sequence[str]) -> None:
        """Raises ValueError when the data lacks a column that the reward needs."""
        for name in self.signature["required"]:
            if name not in _GIVEN and name not in columns:
                near = difflib.get_close_matches(name, columns, n=1) or list(columns)[:1]
                remedy = f"; rename with --dataset_map {near[0]}={name}" if near else ""
                raise ValueError(f"reward {self.name!r}: expected a column {name!r}, got columns {list(columns)}{remedy}")
        if self.any_column and not set(self.any_column) & set(columns):
            raise ValueError(
                f"reward {self.name!r}: expected the reference answer in one of the columns {list(self.any_column)}, "
                f"got columns {list(columns)}; rename with --dataset_map theirs={self.any_column[0]}"
            )


class RewardSet:
    """Scores completions with every reward at once, each isolated from the others. Close it, or use it as a context.

    Args:
        rewards: with unique names.
        weights: one a reward.
        timeout: seconds that one sample may take in one reward.
        combination: how a sample's rewards become one number, a row of `COMBINATIONS`.
        shaping: names of rewards that are added to the number that the others come to, and are none where the others are none.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float],
        timeout: float = 10.0,
        combination: str = "sum",
        shaping: Collection[str] = (),
    ) -> None:
        self._rewards, self.combination, self.shaping = list(rewards), combination, frozenset(shaping)
        self.weights: dict[str, float] = {r.name: float(w) for r, w in zip(rewards, weights, strict=True)}
        self.timeout = timeout

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises ValueError, naming the nearest column, when a reward needs one that the data has not."""
        for reward in self._rewards:
            reward.check(columns)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: dict[str, list[Any]] | None = None,
        timeout: float | None = None,
        *,
        early: EarlyScoring | None = None,
    ) -> dict[str, list[float]]:
        """The rewards of B samples.

        Args:
            prompts: [B] texts or conversations.
            completions: [B] texts; where the prompt is a conversation the functions get [{"role": "assistant", "content": text}].
            completion_ids: [B] token ids.
            columns: every other column of the data, [B] each.
            timeout: overrides the set's, in seconds.
            early: what was begun with parts of this batch (`begin`): those results are waited for, the rest is called now.

        Returns:
            One list [B] a reward; NaN where a sample has no reward (None, NaN, an error, a time-out).

        Raises:
            ValueError: for lists of different lengths, or a column that a reward needs and the data has not.
        """
        batch = self.batch(prompts, completions, completion_ids, columns)
        self.check_columns(list(columns or {}))
        limit = self.timeout if timeout is None else timeout
        begun = () if early is None else early.finish(batch)
        rest = [reward for reward in self._rewards if reward.name not in begun]
        with ThreadPoolExecutor(max(1, len(rest) - 1)) as pool:
            jobs = {r.name: pool.submit(_score, r, batch, limit) for r in rest[1:]}
            found = {r.name: _score(r, batch, limit) for r in rest[:1]}  # one alone needs no thread
            found |= {name: job.result() for name, job in jobs.items()}
        found |= {name: early.values(name, len(prompts)) for name in begun if early is not None}
        return {name: found[name] for name in self.names}

    def begin(self, timeout: float | None = None) -> EarlyScoring:
        """Scoring of a batch whose parts come one by one: rewards that judge each sample alone begin with the first part.

        Close it, or use it as a context; `score` with it gives what `score` without it gives.
        """
        return EarlyScoring(self, [reward for reward in self._rewards if reward.per_sample], self.timeout if timeout is None else timeout)

    def batch(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> dict[str, list[Any]]:
        """What functions are called with, by name; arguments and errors as of `score`."""
        batch: dict[str, list[Any]] = {"prompts": list(prompts), "completions": _conversational(prompts, completions)}
        if completion_ids is not None:
            batch["completion_ids"] = [list(ids) for ids in completion_ids]
        batch.update({name: values for name, values in (columns or {}).items() if name not in _GIVEN})
        for name, values in batch.items():
            if len(values) != len(prompts):
                raise ValueError(f"RewardSet.score: expected {len(prompts)} {name}, one a prompt, got {len(values)}")
        return batch

    def combine(self, scores: dict[str, list[float]]) -> list[float]:
        """[B] weighted sums of the rewards that exist; NaN where a sample has none."""
        rows = zip(*(scores[name] for name in self.weights), strict=True)
        return [_weighted(row, list(self.weights.values())) for row in rows]

    def close(self) -> None:
        """Ends the worker processes."""
        for reward in self._rewards:
            reward.isolated.caller.close()

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _weighted(row: Sequence[float], weights: Sequence[float]) -> float:
    found = [w * value for w, value in zip(weights, row, strict=True) if not math.isnan(value)]
    return sum(found) if found else math.nan


def _conversational(prompts: Sequence[Prompt], completions: Sequence[Any]) -> list[Any]:
    if len(prompts) != len(completions):
        raise ValueError(f"RewardSet.score: expected {len(prompts)} completions, one a prompt, got {len(completions)}")
    return [
        [{"role": "assistant", "content": c}] if isinstance(p, list) and isinstance(c, str) else c
        for p, c in zip(prompts, completions, strict=True)
    ]


def _score(reward: Reward, batch: dict[str, list[Any]], timeout: float) -> list[float]:
    return reward.isolated.score(part_of(batch, reward.signature), batch["prompts"], timeout)
