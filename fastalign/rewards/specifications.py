"""How a specification, a name or a function, becomes a reward."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import worker
from .builtin import BUILTIN, Builtin, WithParameters, has_math_verify
from .callers import Caller, InProcess, InThread, InWorkers, LoadFailed
from .combinations import COMBINATIONS
from .isolation import IsolatedReward
from .reward_set import Reward, RewardSet

logger = logging.getLogger("fastalign")

Specification = str | Callable[..., Any] | Reward


def load_rewards(
    specifications: Sequence[Specification],
    weights: Sequence[float] | None = None,
    timeout: float = 10.0,
    *,
    combination: str = "sum",
    shaping: Sequence[Specification] = (),
) -> RewardSet:
    """The rewards of a run.

    Args:
        specifications: each a built-in name with its parameters, if any (`math`, `overlong:max_length=512,buffer=128`),
            `module:function`, `path.py:function`, a Python function, or a `Reward` as it is. Functions that another process can
            import run in a worker process; lambdas, closures and functions of __main__ run in a thread, which cannot be killed.
        weights: one a reward; None or empty: 1 each.
        timeout: seconds that one sample may take in one reward.
        combination: how a sample's rewards become one number: "sum", "gate" (the first times the sum of the others) or "normalize" (each
            over its group first).
        shaping: more rewards, of weight 1, that are added to what the others come to; a sample without any of the others has none.

    Raises:
        ValueError: for an unknown name (with the nearest), a function that cannot be loaded, or a wrong number of weights.
    """
    if not (specifications or shaping):
        raise ValueError(f"expected at least one reward, got none; built-in are {', '.join(BUILTIN)}")
    weights = list(weights or [1.0] * len(specifications))
    if len(weights) != len(specifications):
        raise ValueError(f"expected one weight a reward, {len(specifications)}, got {len(weights)}: {weights}")
    if not all(math.isfinite(w) for w in weights) or not timeout > 0:
        raise ValueError(f"expected finite reward weights and a timeout > 0 s, got {weights} and {timeout}")
    if combination not in COMBINATIONS:
        raise ValueError(f"reward combination: expected one of {', '.join(COMBINATIONS)}; got {combination!r}")
    if combination == "gate" and len(specifications) < 2:
        raise ValueError("reward combination 'gate': the first reward is the gate of the others, got one reward; name another, or 'sum'")
    rewards: list[Reward] = []
    try:
        every = [*specifications, *shaping]
        for specification in every:
            rewards.append(_reward(specification, {r.name for r in rewards}))
        for reward, specification in zip(rewards, every, strict=True):
            _wait(reward, specification)
    except BaseException:
        for reward in rewards:
            reward.isolated.caller.close()
        raise
    added = [reward.name for reward in rewards[len(specifications) :]]
    return RewardSet(rewards, [*weights, *(1.0 for _ in added)], timeout, combination, added)


def _wait(reward: Reward, specification: Specification) -> None:
    try:
        reward.signature  # noqa: B018  (loads the function)
    except LoadFailed as error:
        wanted = str(specification).rpartition(":")[2]
        near = difflib.get_close_matches(wanted, error.names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {error.names}" if error.names else ""
        raise ValueError(f"reward {specification!r}: {error}{hint}") from error


def _reward(specification: Specification, taken: set[str]) -> Reward:
    if isinstance(specification, Reward):
        return specification if specification.name not in taken else replace(specification, name=_unique(specification.name, taken))
    if callable(specification):
        name = getattr(specification, "__name__", type(specification).__name__)
        return Reward(_unique(name, taken), IsolatedReward(_unique(name, taken), _caller_of(specification, name)))
    head, _, tail = specification.partition(":")
    if head in BUILTIN:
        row = BUILTIN[head]
        name = _unique(head, taken)
        return Reward(name, IsolatedReward(name, _builtin_caller(head, row, tail)), row.any_column)
    place, attribute = place_of(specification)
    target = ("file", os.path.abspath(place), attribute) if place.endswith(".py") else ("module", place, attribute)
    name = _unique(attribute, taken)
    return Reward(name, IsolatedReward(name, InWorkers(target)))


def place_of(specification: str) -> tuple[str, str]:
    """(module or file, attribute) of what names a function; of a built-in reward (name, parameters).

    Raises:
        ValueError: an unknown name, or a file that is not there.
    """
    place, _, attribute = specification.rpartition(":")
    if (head := specification.partition(":"))[0] in BUILTIN:
        return head[0], head[2]
    if not place or not attribute:
        near = difflib.get_close_matches(specification, BUILTIN, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown reward {specification!r}; {hint}built-in are {', '.join(BUILTIN)}; "
            "a function of yours is module:function or path.py:function, a language model that judges is judge:model=FOLDER_OR_URL"
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"reward {specification!r}: no such file {place!r}")
    return place, attribute


def _unique(name: str, taken: set[str]) -> str:
    numbered = (f"{name}_{k}" for k in range(2, len(taken) + 3))
    return name if name not in taken else next(n for n in numbered if n not in taken)


def _caller_of(function: Callable[..., Any], name: str) -> Caller:
    try:
        body = pickle.dumps(function)
        local = getattr(function, "__module__", "__main__") == "__main__" or b"__main__" in body
    except Exception:  # closures, lambdas, bound methods of what cannot be pickled
        local = True
    if not local:
        return InWorkers(("pickle", body))
    logger.info("reward %r: no other process can import it, so it runs in a thread: a hanging sample is skipped, but not killed", name)
    return InThread(function)


def _builtin_caller(name: str, row: Builtin, tail: str) -> Caller:
    function = WithParameters(row.function, _parameters(name, row, tail))
    function([])  # a wrong parameter fails here, not at every sample
    if name == "math" and not has_math_verify():
        logger.warning("reward 'math': math-verify is not installed; answers are compared as exact numbers and normalized text only")
    if not row.isolated:
        return InProcess(function)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    target = ("pickle", pickle.dumps(function))
    return InWorkers(target, shards=min(4, cores), preload=row.preload, known=worker.signature(function))


def _parameters(name: str, row: Builtin, tail: str) -> dict[str, Any]:
    """Parses `parameter=value,parameter=value`; a comma splits only before another parameter, so patterns may hold commas."""
    known = {p.name: p for p in inspect.signature(row.function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    given: dict[str, Any] = {}
    for part in re.split(r",(?=[a-z_]+=)", tail) if tail else []:
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"reward {name!r}: expected parameters {list(known)} as name=value, got {part!r}{hint}")
        given[key] = value if known[key].annotation == "str" else _float(name, key, value)
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(f"reward {name!r}: expected {missing[0]}, as in --reward {name}:{missing[0]}=…")
    return {**{p.name: p.default for p in known.values()}, **given}


def _float(name: str, key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"reward {name!r}: expected a number for {key}, got {value!r}") from None
