"""One sample while it is a conversation: its ids, which of them the model wrote, and what the environment has given for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..data import Prompt
from ..generation import CompletionOutput
from ..generation.requests import Request
from ..generation.stops import decode, special_id
from ..rollout import Sample


@dataclass(eq=False)
class Conversation:
    """A sample in the making.

    Attributes:
        prompt: what it begins with. key: the request part of its random key; place: which of the prompt's samples it is.
        environment: its own.
        start: [L] ids before the first turn: the prompt's, and a first observation's.
        request, at: the turn that runs, as that sample of that request.
        sample: what there is of it; its first `lead` ids are of a first observation that differs within the prompt's samples.
        reward: what the environment has given.
        last: the last turn.
        keeps_mass: `kept_mass` is recorded, because truncation can leave tokens out.
        failed: the environment failed.
    """

    prompt: Prompt
    key: int
    place: int
    environment: Any
    start: list[int] = field(default_factory=list)
    request: Request | None = None
    at: int = 0
    sample: Sample = field(default_factory=lambda: Sample([], [], [], weight_versions=[], scored=[], turns=0))
    lead: int = 0
    reward: float = 0.0
    last: CompletionOutput | None = None
    keeps_mass: bool = False
    failed: bool = False

    def hear_model(self, out: CompletionOutput) -> None:
        """Appends a turn."""
        self._append(out.token_ids, out.logprobs or [], out.raw_logprobs or [], out.weight_versions, out.kept_mass, scored=True)
        self.sample.turns, self.last = self.sample.turns + 1, out

    def hear_environment(self, ids: list[int]) -> None:
        """Appends an observation. Its log-probs are placeholders: nothing reads them."""
        version = self.sample.weight_versions[-1] if self.sample.weight_versions else 0
        zeros, kept = [0.0] * len(ids), [1.0] * len(ids) if self.keeps_mass else None
        self._append(ids, zeros, zeros, [version] * len(ids), kept, scored=False)

    def _append(
        self, ids: list[int], logp: list[float], raw: list[float], versions: list[int], kept: list[float] | None, *, scored: bool
    ) -> None:
        sample = self.sample
        assert sample.weight_versions is not None
        assert sample.scored is not None
        sample.ids += ids
        sample.logprobs += logp
        sample.raw_logprobs += raw
        sample.weight_versions += versions
        sample.scored += [scored] * len(ids)
        if kept is not None:
            sample.kept_mass = (sample.kept_mass or []) + kept

    def end(self, finish_reason: str, tokenizer: Any, stops: tuple[str, ...]) -> None:
        """Ends it where it is. Its text is all of it, without an end-of-sequence token or a stop string that is not the environment's."""
        sample, last = self.sample, self.last
        sample.finish_reason = finish_reason
        stop = last.stop_reason if last is not None and finish_reason == "stop" else None
        sample.text = decode(tokenizer, sample.ids[:-1] if isinstance(stop, int) else sample.ids)
        if isinstance(stop, str) and stop not in stops and stop in sample.text:
            sample.text = sample.text[: sample.text.rindex(stop)]

    def given(self) -> float:
        """The environment's reward; NaN where it failed."""
        return math.nan if self.failed else self.reward


def turn_text(out: CompletionOutput, stops: tuple[str, ...], tokenizer: Any) -> str:
    """What the model wrote in a turn, with the environment's stop text that ended it."""
    if isinstance(out.stop_reason, str):
        return out.text + (out.stop_reason if out.stop_reason in stops else "")
    if isinstance(out.stop_reason, int):  # a stop text that is one special token ends a turn as its id
        return out.text + next((stop for stop in stops if special_id(tokenizer, stop) == out.stop_reason), "")
    return out.text
