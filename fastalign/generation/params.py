"""What is asked of the engine and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LogitsProcessor = Callable[["Tensor", "Tensor"], "Tensor"]
TIMEOUT = "timeout"  # the stop_reason of a sample that ran past its request's time


class RequestFailedError(RuntimeError):
    """One request could not be completed; the engine goes on."""


class NotFiniteError(RequestFailedError, FloatingPointError):
    """A row of logits holds NaN or +inf, or is all -inf."""


MIN_TEMPERATURE = 1e-4


@dataclass(frozen=True)
class SamplingParams:
    """How the completions of one prompt are drawn.

    The distribution is made in this order: logits processors, temperature, top-k, top-p (of what top-k left), min-p. Tokens
    that tie with the last one kept are kept too.

    Args:
        n: completions of the prompt; the prompt is forwarded once for all of them.
        temperature: softmax temperature, at least 1e-4; 0 takes the most probable token.
        top_p: keep the smallest set of most probable tokens with this probability; 1: off.
        top_k: keep the k most probable tokens; 0: off.
        min_p: keep tokens at least this fraction of the most probable one; 0: off.
        max_tokens: most tokens of a completion, stop token included.
        min_tokens: no stop token is drawn, and no stop string ends the completion, before this many tokens.
        stop: text that ends a completion; `.text` ends before it, `.token_ids` and the log-probs include its tokens.
        stop_token_ids: token ids that end a completion, besides the model's end-of-sequence tokens.
        ignore_eos: the model's end-of-sequence tokens do not stop.
        seed: the random key is (seed, request, sample, position); None draws fresh.
        logprobs: return `.logprobs`, `.raw_logprobs` and `.kept_mass`.
        logits_processors: called in turn as transformers calls its LogitsProcessor, once a token: (the sequence so far [1, L]
            int64, its logits [1, V] fp32, a copy) → logits [1, V]. Slow: each sequence goes through Python.
        timeout: seconds from its arrival after which a request ends with what it has ("abort"); None: any time.
        top_logprobs: report this many of the most probable tokens with every token.

    Raises:
        ValueError: an argument out of its range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: bool = True
    logits_processors: Sequence[LogitsProcessor] = ()
    timeout: float | None = None
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors or ()))
        for name in ("n", "top_k", "max_tokens", "min_tokens", "top_logprobs", "seed"):
            value = getattr(self, name)
            self._expect(value is None or hasattr(value, "__index__"), name, "a whole number")
        self._expect(self.n >= 1, "n", ">= 1")
        self._expect(0 <= self.temperature < math.inf, "temperature", "finite and >= 0")
        small = 0 < self.temperature < MIN_TEMPERATURE  # logits over it have no digits left for their differences
        self._expect(not small, "temperature", f"0, which takes the most probable token, or at least {MIN_TEMPERATURE:g}")
        self._expect(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        self._expect(0 <= self.top_k < 2**31, "top_k", "in [0, 2**31) (0: off)")
        self._expect(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        self._expect(1 <= self.max_tokens < 2**31, "max_tokens", "in [1, 2**31)")
        self._expect(0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"in [0, max_tokens={self.max_tokens}]")
        self._expect(all(self.stop), "stop", "non-empty strings")
        self._expect(self.seed is None or 0 <= self.seed < 2**64, "seed", "in [0, 2**64) or None")
        self._expect(all(map(callable, self.logits_processors)), "logits_processors", "functions of (ids, logits)")
        self._expect(self.timeout is None or 0 < self.timeout < math.inf, "timeout", "a finite number of seconds > 0, or None")
        self._expect(0 <= self.top_logprobs < 2**31, "top_logprobs", "in [0, 2**31) (0: none)")

    def _expect(self, holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise ValueError(f"SamplingParams: {name} must be {wanted}, got {getattr(self, name)!r}")

    @property
    def truncates(self) -> bool:
        """Whether the sampled distribution can lack tokens that the model gives mass to."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.min_tokens > 0)


@dataclass
class CompletionOutput:
    """One completion.

    Attributes:
        index: which of the prompt's n samples this is.
        token_ids: the stop token, or the tokens of the stop string, included.
        text: without the stop token or stop string; empty when the engine has no tokenizer.
        logprobs: nats, of the distribution that was sampled; None when not asked for.
        raw_logprobs: nats, of the model at temperature 1 with no truncation.
        kept_mass: the probability that truncation left, a token; None when nothing was truncated.
        weight_versions: the engine's weight version at each token.
        finish_reason: "stop", "length", "abort" (by the caller or its time) or "error"; "" while it runs.
        stop_reason: the token id or the string that stopped it; "timeout" where its time did.
        top_logprobs: for each token the most probable (token id, raw log-prob), best first; None when not asked for.
        error: what went wrong, with "error".
    """

    index: int
    token_ids: list[int]
    text: str = ""
    logprobs: list[float] | None = None
    raw_logprobs: list[float] | None = None
    kept_mass: list[float] | None = None
    weight_versions: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    stop_reason: int | str | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    error: str | None = None


@dataclass
class RequestOutput:
    """A prompt and its completions, `outputs[j].index == j`."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass
class Stats:
    """What the engine has done since it was made (or since `reset`); counts.

    Attributes:
        steps: forward passes.
        prompt_tokens: prompt tokens forwarded for the first time: a group's prompt counts once.
        recomputed_tokens: tokens forwarded again after a preemption or an update of the weights.
        cached_tokens: tokens whose keys and values were found in the prefix cache.
        decoded_tokens: tokens drawn.
        preemptions: sequences that had to give their blocks back.
        copied_blocks: blocks copied on write after a fork.
    """

    steps: int = 0
    prompt_tokens: int = 0
    recomputed_tokens: int = 0
    cached_tokens: int = 0
    decoded_tokens: int = 0
    preemptions: int = 0
    copied_blocks: int = 0

    def reset(self) -> None:
        """Sets every count to zero."""
        self.__init__()  # type: ignore[misc]
