"""How completions are sampled: in one turn, or in several with an environment. Recipes take either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

from ..data import Prompt
from ..environments import MultiTurn, load_environment
from ..environments.specifications import check_columns
from ..generation import Engine, SamplingParams
from ..generation.engine import OnGroup
from ..rollout import Rollout
from .online_arguments import EnvironmentArguments

Progress = Callable[[int], object]


class Sampler(Protocol):
    """Samples of prompts.

    Attributes:
        weights: the rewards that it fills in itself, with their weights.
    """

    weights: dict[str, float]

    def __call__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        request_ids: Sequence[int] | None = None,
        progress: Progress = ...,
        on_group: OnGroup | None = None,
    ) -> Rollout:
        """Samples each prompt `params.n` times; arguments as of `Engine.rollout`."""


class SingleTurn:
    """The prompt, then a completion."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}

    def __call__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        request_ids: Sequence[int] | None = None,
        progress: Progress = lambda _: None,
        on_group: OnGroup | None = None,
    ) -> Rollout:
        rollout = engine.rollout(
            [p.ids for p in prompts], params, request_ids=request_ids, progress=progress, logprobs=params.logprobs, on_group=on_group
        )
        rollout.columns = [p.columns for p in prompts]
        return rollout


single_turn = SingleTurn()
_load = lru_cache(load_environment)  # a user's file is run once


def sampler_of(args: EnvironmentArguments, *data: Sequence[Prompt]) -> Sampler:
    """The sampler that the flags name.

    Args:
        args: of the command.
        data: prompts whose columns must be enough for the environment.

    Raises:
        ValueError: an environment that does not load, lacks a column, or options out of range.
    """
    if not args.environment:
        return single_turn
    kind = _load(args.environment)
    for prompts in filter(None, data):
        check_columns(kind, sorted({name for prompt in prompts for name in prompt.columns}))
    return MultiTurn(kind, max_turns=args.max_turns, timeout=args.environment_timeout, weight=args.environment_weight)
