"""Samples of several turns: the engine writes, environments answer, and every sample goes on as soon as it can."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data import Prompt
from ..generation import Engine, SamplingParams
from ..generation.engine import OnGroup
from ..generation.requests import Limits, Request
from ..rollout import Rollout
from .calls import Calls, Failure
from .conversation import Conversation, turn_text
from .observations import Observer
from .protocol import Kind

logger = logging.getLogger("fastalign")

_PROMPT_CHARACTERS = 200
_MIX = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: spreads the parts of a seed


class MultiTurn:
    """Completes prompts in conversation with an environment; a `Sampler` as recipes take it.

    A turn ends at the end-of-sequence token or at a stop text of the environment. What it answers is appended as token ids: what was
    sampled is never tokenized again, and the next turn finds all full blocks of the one before in the engine's prefix cache. The
    answers' tokens are marked as not scored. A sample ends when the environment is done, after `max_turns`, or when
    `params.max_tokens` leave no room: they count everything behind the prompt, answers too.

    Samples do not wait for each other. A sample's random keys are (seed, request, sample, position), so that what it draws does
    not depend on how fast environments answer.

    Args:
        kind: the environment.
        max_turns: most turns of a sample.
        timeout: seconds that one call of the environment may take.
        weight: of the environment's own reward.

    Attributes:
        weights: the rewards that it fills in itself, with their weights.
    """

    def __init__(self, kind: Kind, *, max_turns: int = 8, timeout: float = 10.0, weight: float = 1.0) -> None:
        if max_turns < 1 or not timeout > 0:
            raise ValueError(f"MultiTurn: expected at least one turn and a time limit > 0 s, got {max_turns} and {timeout}")
        self.kind, self.max_turns, self.timeout = kind, max_turns, timeout
        self.weights = {kind.reward: weight} if kind.gives_reward else {}

    def __call__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        request_ids: Sequence[int] | None = None,
        progress: Callable[[int], object] = lambda _: None,
        on_group: OnGroup | None = None,
    ) -> Rollout:
        """Samples each prompt `params.n` times; arguments as of `Engine.rollout`.

        A sample whose environment raises or answers too late ends with "abort" and without a reward, and is named in the log.

        Raises:
            ValueError, FloatingPointError, RuntimeError: as `Engine.rollout`.
        """
        if engine.tokenizer is None:
            raise ValueError("MultiTurn: turns are text, which needs a tokenizer: Engine(model, tokenizer)")
        keys = list(range(len(prompts)) if request_ids is None else request_ids)
        return _Round(self, engine, prompts, params, keys, _Watch(progress, on_group)).run()


@dataclass(frozen=True)
class _Watch:
    """Who is told of samples and of groups that have ended."""

    progress: Callable[[int], object]
    on_group: OnGroup | None


class _Round:
    """One call of a sampler."""

    def __init__(
        self, sampler: MultiTurn, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, keys: list[int], watch: _Watch
    ) -> None:
        self.kind, self.max_turns, self.engine, self.watch = sampler.kind, sampler.max_turns, engine, watch
        self.params = replace(params, stop=(*params.stop, *self.kind.stop), logprobs=True)
        self.calls = Calls(sampler.timeout, immediate=self.kind.immediate)
        self.observer = Observer(engine.tokenizer, self.kind.role)
        self.longest = Limits.of(engine.model, engine.tokenizer).max_length
        self.groups = [
            [Conversation(prompt, key, j, None, keeps_mass=params.truncates) for j in range(params.n)]
            for prompt, key in zip(prompts, keys, strict=True)
        ]
        self.places = {one: p for p, group in enumerate(self.groups) for one in group}
        self.open = [params.n] * len(self.groups)  # samples of each prompt that have not ended
        self.running: dict[int, tuple[Request, list[Conversation]]] = {}  # by the request's id

    def run(self) -> Rollout:
        for group in self.groups:
            for one in group:
                self.calls.submit(one, self._begin, one=one)
        while len(self.calls):
            for one, outcome in self.calls.take(wait=True):
                self._begun(one, outcome)
        starts = [self._start(group) for group in self.groups]
        try:
            while self.running or len(self.calls):
                for one, outcome in self.calls.take(wait=not self.running):
                    self._hear(one, outcome)
                self._step()
        finally:
            for request, _ in list(self.running.values()):
                self.engine.abort(request)
        samples = [[one.sample for one in group] for group in self.groups]
        return Rollout(starts, samples, [dict(group[0].prompt.columns) for group in self.groups])

    # --- the environment -----------------------------------------------------------------------------------------------

    def _begin(self, one: Conversation) -> str | None:
        """In the environment's thread."""
        one.environment = self.kind.make()
        seed = ((self.params.seed or 0) * _MIX + one.key * 1_000_003 + one.place) % 2**63
        known = {"prompt": one.prompt.prompt, "seed": seed, **one.prompt.columns}
        wanted = self.kind.columns
        return one.environment.reset(**{name: value for name, value in known.items() if wanted is None or name in wanted})

    def _begun(self, one: Conversation, outcome: Any) -> None:
        one.start = one.prompt.ids
        if not isinstance(outcome, Failure) and outcome is not None:
            try:
                one.start = self.observer.first(one.prompt, _text(outcome))
            except (TypeError, ValueError) as error:
                outcome = Failure(str(error))
        if not isinstance(outcome, Failure) and self.longest is not None and len(one.start) >= self.longest:
            outcome = Failure(f"its first observation makes a prompt of {len(one.start)} tokens, the model takes {self.longest}")
        if isinstance(outcome, Failure):
            self._fail(one, outcome)

    def _hear(self, one: Conversation, outcome: Any) -> None:
        """What the environment says to a turn."""
        if isinstance(outcome, Failure):
            return self._fail(one, outcome)
        try:
            observation, reward, done = outcome
            given = 0.0 if reward is None else float(reward)
            if not math.isfinite(given):
                raise ValueError("its reward is not finite")
            one.reward += given
            text = "" if observation is None else _text(observation)
        except (TypeError, ValueError) as error:
            return self._fail(one, Failure(f"expected (observation, reward, done) of its step, got {str(outcome)[:80]!r}: {error}"))
        assert one.last is not None
        if done:
            return self._end(one, one.last.finish_reason)
        ids = self.observer.next(one.prompt, text, one.sample.ids[-1]) if one.sample.turns < self.max_turns else []
        room = self._room(one) - len(ids)
        if one.sample.turns >= self.max_turns or room < 1:
            return self._end(one, "length")
        self._extend(one, ids, room)

    def _room(self, one: Conversation) -> int:
        """Tokens that may follow."""
        limit = self.params.max_tokens if self.longest is None else min(self.params.max_tokens, self.longest - len(one.start))
        return limit - (len(one.sample.ids) - one.lead)

    def _fail(self, one: Conversation, failure: Failure) -> None:
        one.failed = True
        prompt = repr(one.prompt.prompt)
        short = prompt if len(prompt) <= _PROMPT_CHARACTERS else prompt[:_PROMPT_CHARACTERS] + "…"
        logger.warning("environment %r: a sample is broken off: %s; prompt: %s", self.kind.name, failure.reason, short)
        self._end(one, "abort")

    def _end(self, one: Conversation, finish_reason: str) -> None:
        one.end(finish_reason, self.engine.tokenizer, self.kind.stop)
        if self.kind.gives_reward:
            one.sample.rewards[self.kind.reward] = one.given()
        self.watch.progress(1)
        place = self.places[one]
        self.open[place] -= 1
        if not self.open[place] and self.watch.on_group is not None:
            self.watch.on_group(place, [other.sample for other in self.groups[place]])

    # --- the engine ------------------------------------------------------------------------------------------------------

    def _start(self, group: list[Conversation]) -> list[int]:
        """Queues the first turn of a prompt's samples; the ids that all of them begin with."""
        alive = [one for one in group if not one.failed]
        prompt = _shared([one.start for one in alive]) if alive else group[0].prompt.ids
        for one in alive:
            one.hear_environment(one.start[len(prompt) :])
            one.lead = len(one.sample.ids)
        if alive and all(one.start == prompt for one in alive) and len(alive) == len(group):
            self._submit(prompt, alive, self.params)  # forwarded once
        else:
            for one in alive:
                self._submit(one.start, [one], replace(self.params, n=1))
        return prompt

    def _submit(self, ids: list[int], members: list[Conversation], params: SamplingParams) -> None:
        request = self.engine.add_request(ids, params, request_id=members[0].key, sample=members[0].place)
        for at, one in enumerate(members):
            one.request, one.at = request, at
        self.running[request.id] = request, members

    def _extend(self, one: Conversation, ids: list[int], room: int) -> None:
        """Queues a sample's next turn, behind an observation."""
        one.hear_environment(ids)
        params = replace(self.params, n=1, max_tokens=room, min_tokens=min(self.params.min_tokens, room))
        assert one.request is not None
        one.request, one.at = self.engine.extend(one.request, ids, params, sample=one.at), 0
        self.running[one.request.id] = one.request, [one]

    def _step(self) -> None:
        """One forward pass; the turns that end in it go to their environments."""
        for request in self.engine.step() if self.running else ():
            if request.id not in self.running:
                continue
            if request.error is not None:
                raise request.error
            members = self.running[request.id][1]
            for out in request.new_ends():
                one = members[out.index]
                one.hear_model(out)
                one.sample.recorded = request.recorded(out.index)  # of the turns before, too: they are its prompt
                self.calls.submit(one, one.environment.step, text=turn_text(out, self.kind.stop, self.engine.tokenizer))
            if request.finished:
                del self.running[request.id]


def _shared(sequences: list[list[int]]) -> list[int]:
    """The longest beginning that all of them have."""
    low, high = min(sequences), max(sequences)  # whatever these two share lies in all
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))]


def _text(observation: Any) -> str:
    if not isinstance(observation, str):
        raise TypeError(f"expected an observation as text, got {type(observation).__name__}")
    return observation
