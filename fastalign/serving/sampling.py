"""From a request's fields to the engine's parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.generation.params import MIN_TEMPERATURE, LogitsProcessor, SamplingParams
from fastalign.serving.errors import ApiError
from fastalign.serving.protocol import GenerationRequest


@dataclass(frozen=True)
class Penalties:
    """A logits processor: OpenAI's logit_bias, and its penalties for tokens that the completion has already.

    logits - frequency * count - presence * (count > 0) + bias.

    Args:
        prompt_tokens: how many of the ids are the prompt's, which are not counted.
        presence, frequency: subtracted once, and once a time.
        bias: added, by token id.
    """

    prompt_tokens: int
    presence: float
    frequency: float
    bias: dict[int, float]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        drawn, counts = ids[0, self.prompt_tokens :].unique(return_counts=True)
        scores[0, drawn] -= self.frequency * counts.to(scores.dtype) + self.presence
        if self.bias:
            tokens = torch.tensor(list(self.bias), device=scores.device)
            scores[0, tokens] += torch.tensor(list(self.bias.values()), dtype=scores.dtype, device=scores.device)
        return scores


def _temperature(given: float | None) -> float:
    """1 by default; what clients send in place of 0 is 0."""
    return 1.0 if given is None else 0.0 if given < MIN_TEMPERATURE else given


def sampling_params(
    request: GenerationRequest, *, prompt_tokens: int, max_tokens: int, vocab_size: int, logprobs: bool, top_logprobs: int
) -> SamplingParams:
    """The parameters of one prompt.

    Args:
        request: with the fields that both endpoints share; null is OpenAI's default.
        prompt_tokens: of the prompt.
        max_tokens: >= 1.
        vocab_size: ids that logit_bias may name.
        logprobs, top_logprobs: what is to be reported.

    Raises:
        ApiError: a combination that makes no sense.
    """
    if (request.min_tokens or 0) > max_tokens:
        raise ApiError(f"min_tokens: expected at most max_tokens ({max_tokens}), got {request.min_tokens}", param="min_tokens")
    for token in request.stop_token_ids or ():
        if token >= vocab_size:
            raise ApiError(f"stop_token_ids: expected token ids below {vocab_size}, got {token}", param="stop_token_ids")
    return SamplingParams(
        n=request.n or 1,
        temperature=_temperature(request.temperature),
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(request.top_k or 0, 0),  # -1 is how some clients say "off"
        min_p=request.min_p or 0.0,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        stop=request.stop or (),
        stop_token_ids=request.stop_token_ids or (),
        ignore_eos=bool(request.ignore_eos),
        seed=None if request.seed is None else request.seed % 2**64,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        timeout=request.timeout,
        logits_processors=_processors(request, prompt_tokens, vocab_size),
    )


def _processors(request: GenerationRequest, prompt_tokens: int, vocab_size: int) -> tuple[LogitsProcessor, ...]:
    presence, frequency = request.presence_penalty or 0.0, request.frequency_penalty or 0.0
    bias = {}
    for name, value in (request.logit_bias or {}).items():
        if not name.isascii() or not name.isdigit() or int(name) >= vocab_size:
            raise ApiError(f"logit_bias: expected token ids below {vocab_size} as keys, got {name!r}", param="logit_bias")
        bias[int(name)] = value
    return (Penalties(prompt_tokens, presence, frequency, bias),) if presence or frequency or bias else ()
