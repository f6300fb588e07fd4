"""The engine as a policy of steps: every call draws for all branches of all prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..data import Prompt
from ..generation import CompletionOutput, Engine, SamplingParams
from ..generation.requests import Limits
from ..generation.stops import StopScanner, decode, first_stop, special_id
from ..generation.text import UNFINISHED
from .paths import Path

KEYS = 1 << 32  # draws of one prompt that have keys of their own


@dataclass(frozen=True)
class Stem:
    """A place that a prompt's search goes on from.

    Attributes:
        prompt: whose `index` is the request part of the random key.
        path: unfinished.
        serial: which of its prompt's stems it is: it draws its own numbers, whatever else is in the batch.
    """

    prompt: Prompt
    path: Path = field(default_factory=Path)
    serial: int = 0


class Policy:
    """Draws steps and whole solutions. What a branch begins with is in the engine's cache and is not forwarded again.

    Args:
        engine: with a tokenizer.
        params: how to draw; `max_tokens` is of the whole solution, `stop` ends it, `n` is not read.
        separator: text that ends a step and stays in it; "": none does.
        max_step_tokens: tokens after which a step ends; 0: any number.

    Raises:
        ValueError: an engine without a tokenizer, `min_tokens`, or a budget below 0.
    """

    def __init__(self, engine: Engine, params: SamplingParams, *, separator: str = "\n", max_step_tokens: int = 0) -> None:
        if engine.tokenizer is None:
            raise ValueError("search: steps and scores need text: Engine(model, tokenizer)")
        if params.min_tokens:
            raise ValueError(f"search: min_tokens must be 0, got {params.min_tokens}: a search draws step by step")
        if max_step_tokens < 0:
            raise ValueError(f"search: max_step_tokens must be >= 0 (0: any number), got {max_step_tokens}")
        self.engine, self.tokenizer, self.separator, self.max_step_tokens = engine, engine.tokenizer, separator, max_step_tokens
        self.params = replace(params, logprobs=True)
        self.max_length = Limits.of(engine.model, engine.tokenizer).max_length
        special = special_id(self.tokenizer, separator)
        self._step_ends: set[int | str] = {separator} - {""} | (set() if special is None else {special})

    @property
    def has_steps(self) -> bool:
        """Whether anything ends a step before the solution ends."""
        return bool(self.separator or self.max_step_tokens)

    def step(self, stems: Sequence[Stem], n: int) -> list[list[Path]]:
        """n ways to go on from each stem by one step, equal ones as often as they were drawn."""
        stops = [*self.params.stop, *([self.separator] if self.separator and self.separator not in self.params.stop else [])]
        return self._draw(stems, replace(self.params, n=n, stop=stops), self.max_step_tokens)

    def complete(self, stems: Sequence[Stem], n: int) -> list[list[Path]]:
        """n ways to go on from each stem to the end."""
        return self._draw(stems, replace(self.params, n=n), 0)

    def first_step(self, path: Path, behind: Path) -> Path:
        """`path`, which goes on from `behind`, cut after the first step that it adds."""
        at = len(behind.ends) + 1
        if len(path.ends) <= at:
            return path
        ids = path.ids[: path.ends[at - 1]]
        return Path(ids, path.ends[:at], path.steps[:at], path.logprobs[:at], decode(self.tokenizer, ids))

    def _draw(self, stems: Sequence[Stem], params: SamplingParams, budget: int) -> list[list[Path]]:
        asked = []
        for stem in stems:
            assert not stem.path.finished, "a finished path has no next step"
            left = self.params.max_tokens - len(stem.path.ids)
            asked.append(replace(params, max_tokens=min(budget, left) if budget else left))
        known = [[*stem.prompt.ids, *stem.path.ids] for stem in stems]
        keys = [stem.prompt.index * KEYS + stem.serial for stem in stems]
        outputs = self.engine.generate(known, asked, request_ids=keys, keep_computed=True)
        return [[self._grown(stem, out) for out in output.outputs] for stem, output in zip(stems, outputs, strict=True)]

    def _grown(self, stem: Stem, out: CompletionOutput) -> Path:
        """The stem's path with what was drawn behind it."""
        begun, drawn, logprobs = stem.path, out.token_ids, out.raw_logprobs or []
        ids = (*begun.ids, *drawn)
        closing = isinstance(out.stop_reason, int) and out.stop_reason not in self._step_ends
        text = decode(self.tokenizer, ids[:-1] if closing else ids)
        cut = first_stop(text, self.params.stop) if self.params.stop else None  # also one that began in the step before
        reason = "stop" if cut else self._reason(stem, out, len(ids))
        ends, steps, sums = [], [], []
        before, start = begun.text.rstrip(UNFINISHED), 0
        for end in self._cuts(drawn):
            whole = decode(self.tokenizer, ids[: len(begun.ids) + end - (closing and end == len(drawn))])
            whole = whole[: cut[0]] if cut else whole
            step, before = whole[len(before) :], whole.rstrip(UNFINISHED)
            ends.append(len(begun.ids) + end)
            steps.append(step.removesuffix(self.separator) if self.separator else step)
            sums.append(sum(logprobs[start:end]))
            start = end
        joined = ((*begun.ends, *ends), (*begun.steps, *steps), (*begun.logprobs, *sums))
        return Path(ids, *joined, text[: cut[0]] if cut else text, reason)

    def _reason(self, stem: Stem, out: CompletionOutput, length: int) -> str:
        """Why a path is finished; "": it is not."""
        full = self.max_length is not None and len(stem.prompt.ids) + length >= self.max_length
        if out.finish_reason == "stop" and out.stop_reason not in self._step_ends:
            return "stop"
        if out.finish_reason in ("stop", "length"):
            return "length" if full or length >= self.params.max_tokens else ""
        return out.finish_reason

    def _cuts(self, drawn: Sequence[int]) -> list[int]:
        """Behind which of the drawn tokens a step ends; the last one always ends one."""
        if not drawn:
            return []
        cuts, scanner, start = [], self._scanner(), 0
        for at, token in enumerate(drawn, 1):
            separated = token in self._step_ends or (scanner is not None and scanner.push(token) is not None)
            if separated or at - start == self.max_step_tokens or at == len(drawn):
                cuts.append(at)
                scanner, start = self._scanner(), at
        return cuts

    def _scanner(self) -> StopScanner | None:
        return StopScanner(self.tokenizer, [self.separator]) if self.separator else None
