"""Prompts as given become groups that the scheduler can place; everything that can be wrong with them is said here."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fastalign.generation.groups import MAX_SAMPLES, Group
from fastalign.generation.outputs import completion_output, drawn_ids, new_outputs, request_output
from fastalign.generation.params import CompletionOutput, RequestOutput, SamplingParams
from fastalign.generation.rows import Rows
from fastalign.generation.stops import StopTable, special_id
from fastalign.models.backbone import causal_lm, head_of, positions_of

PromptLike = str | Sequence[int]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt to complete, as it was given.

    Attributes:
        index: its place in the call.
        ids: int64 token ids.
        params: how to sample.
        key: the request part of the random key.
        text: the prompt as given, when it was text.
    """

    index: int
    ids: NDArray[np.int64]
    params: SamplingParams
    key: int
    text: str | None = None


class Request:
    """A prompt that the engine completes, with its n samples; what `Engine.add_request` gives.

    Attributes:
        id: unique in its engine, ascending in the order of arrival.
        prompt: the text as given, or None. prompt_token_ids: what is completed.
        params: how it samples.
    """

    def __init__(self, group: Group, text: str | None, rows: Rows, tokenizer: Any) -> None:
        self.prompt, self._group, self._rows, self._tokenizer = text, group, rows, tokenizer

    @property
    def id(self) -> int:
        return self._group.index

    @property
    def params(self) -> SamplingParams:
        return self._group.params

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._group.prompt.tolist()

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return self._group.done

    @property
    def error(self) -> Exception | None:
        """What ended it, where something went wrong."""
        return self._group.error

    def output(self) -> RequestOutput:
        """What there is so far; a sample that runs has the finish_reason ""."""
        return request_output(self._group, self.prompt, self._tokenizer, self._rows)

    def new_tokens(self) -> list[list[int]]:
        """For each sample, the ids drawn since the last call."""
        fresh: list[list[int]] = []
        for member in self._group.members:
            ids = drawn_ids(member, self._rows)[member.streamed :].tolist()
            member.streamed += len(ids)
            fresh.append(ids)
        return fresh + [[] for _ in range(self.params.n - len(fresh))]

    def new_ends(self) -> list[CompletionOutput]:
        """The samples that have ended since the last call, whole; not to be mixed with `new_outputs`, which tells ends, too."""
        fresh = [member for member in self._group.members if member.finish_reason and not member.told]
        for member in fresh:
            member.told = True
        return [completion_output(member, self._tokenizer, self._rows) for member in fresh]

    def recorded(self, sample: int) -> NDArray[np.int64] | None:
        """[L] of prompt and completion, less the last token: where the forward pass was kept (`Engine.recording`); None: nowhere."""
        return self._group.members[sample].record.recorded

    def sample_to_extend(self, sample: int | None) -> tuple[list[int], int]:
        """([L] ids of prompt and completion, sample part of the random key) of a sample that has ended.

        Raises:
            ValueError: it has not, or it is not said which of several is meant.
        """
        group, members = self._group, self._group.members
        if sample is None and self.params.n != 1:
            raise ValueError(f"extend: request {self.id} has n={self.params.n} samples; say which one with sample=0, 1, …")
        at = sample or 0
        if not 0 <= at < self.params.n:
            raise ValueError(f"extend: request {self.id} has n={self.params.n} samples, so sample must be below, got {sample}")
        if at >= len(members) or not members[at].finish_reason:
            raise ValueError(f"extend: request {self.id} is still running; step until its sample {at} has finished, or abort it")
        return [*group.prompt.tolist(), *members[at].record.tokens.tolist()], group.first_sample + at

    def new_outputs(self) -> list[CompletionOutput]:
        """What the samples gained since the last call of this or of `new_tokens`, log-probs and ends included, without text.

        A sample that gained nothing is left out. For a caller that passes on what each step gave: it costs the new tokens alone.
        """
        return new_outputs(self._group, self._rows)


@dataclass(frozen=True)
class Limits:
    """What the model allows.

    Attributes:
        vocab_size: rows of the head. num_embeddings: token ids that a prompt may hold.
        max_length: tokens of a sequence, or None.
        eos: end-of-sequence token ids.
    """

    vocab_size: int
    num_embeddings: int
    max_length: int | None
    eos: frozenset[int]

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any) -> Limits:
        base = causal_lm(model)
        config = base.config.get_text_config()
        vocab_size = head_of(model).weight.shape[0]
        named = (getattr(base.generation_config, "eos_token_id", None), config.eos_token_id, getattr(tokenizer, "eos_token_id", None))
        eos = {int(i) for ids in named if ids is not None for i in (ids if isinstance(ids, Sequence) else [ids])}
        longest = positions_of(base)
        embeddings = base.get_input_embeddings().weight.shape[0]
        return cls(vocab_size, embeddings, longest, frozenset(i for i in eos if 0 <= i < vocab_size))


def read_requests(
    prompts: str | Sequence[Any], params: SamplingParams | Sequence[SamplingParams], tokenizer: Any, keys: Sequence[int] | None = None
) -> list[Prompt]:
    """Prompts of any accepted form, read.

    Raises:
        ValueError: text without a tokenizer, or not one SamplingParams (or key) a prompt.
        TypeError: a prompt that is neither text nor token ids.
    """
    several = [prompts] if isinstance(prompts, str) or _is_ids(prompts) else list(prompts)
    each = [params] * len(several) if isinstance(params, SamplingParams) else list(params)
    keys = range(len(several)) if keys is None else keys
    for name, values in (("SamplingParams", each), ("request id", keys)):
        if len(values) != len(several):
            raise ValueError(f"generate: expected one {name} a prompt, got {len(values)} for {len(several)} prompts")
    return [_request(i, *parts, tokenizer) for i, parts in enumerate(zip(several, each, keys, strict=True))]


def _is_ids(prompt: Any) -> bool:
    first = prompt[0] if len(prompt) else None
    return isinstance(first, int | np.integer) or (hasattr(prompt, "ndim") and prompt.ndim == 1)


def _request(index: int, prompt: Any, params: SamplingParams, key: int, tokenizer: Any) -> Prompt:
    if tokenizer is None and (isinstance(prompt, str) or params.stop):
        what = "a text prompt" if isinstance(prompt, str) else "stop strings"
        raise ValueError(f"generate: request {index} has {what}, which need a tokenizer: Engine(model, tokenizer)")
    text = prompt if isinstance(prompt, str) else None
    ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
    try:
        array = np.array(ids, dtype=object if not len(ids) else None)
        array = array.astype(np.int64, casting="same_kind") if len(ids) else np.empty(0, np.int64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"generate: prompt {index} must be text or a list of token ids, got {type(prompt).__name__}") from error
    if array.size > array.shape[-1]:
        raise TypeError(f"generate: prompt {index} must be one list of token ids, got an array of shape {array.shape}")
    return Prompt(index, array.reshape(-1), params, int(key), text)


def groups_of(
    prompts: Sequence[Prompt], limits: Limits, stops: StopTable, tokenizer: Any, *, first: int, priorities: Sequence[int]
) -> list[Group]:
    """Checks the prompts against the model and makes the scheduler's groups, numbered from `first`."""
    fresh = secrets.randbits(64)
    groups: list[Group] = []
    for prompt, priority in zip(prompts, priorities, strict=True):
        _check(prompt, limits)
        in_int64(prompt.key, "request_id")
        in_int64(priority, "priority")
        params, length = prompt.params, len(prompt.ids)
        limit = min(length + params.max_tokens, limits.max_length or length + params.max_tokens)
        stop_set = stops.add(stop_ids(params, limits, tokenizer))
        seed = fresh if params.seed is None else params.seed
        wants = params.logprobs or params.top_logprobs > 0
        parts = (first + len(groups), prompt.ids, params, seed, prompt.key, limit, stop_set)
        groups.append(Group(*parts, priority=priority, logprobs=wants, place=prompt.index))
    return groups


def in_int64(number: int, name: str) -> int:
    """The number, which a row of the engine keeps in 64 bits. Raises ValueError where it does not fit."""
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"generate: {name} must be in [-2**63, 2**63), got {number}")
    return number


def stop_ids(params: SamplingParams, limits: Limits, tokenizer: Any) -> Iterable[int]:
    """The token ids that end a completion; a stop string that is one special token counts as its id."""
    special = {number for text in params.stop if (number := special_id(tokenizer, text)) is not None}
    ids = {*params.stop_token_ids, *special, *(() if params.ignore_eos else limits.eos)}
    bad = [i for i in ids if not 0 <= i < limits.vocab_size]
    if bad:
        raise ValueError(f"generate: stop_token_ids must be in [0, vocabulary size {limits.vocab_size}), got {bad[0]}")
    if params.min_tokens and len(ids) == limits.vocab_size:
        raise ValueError(
            f"generate: min_tokens {params.min_tokens}: every token of the vocabulary ends the completion, so that none may come before; "
            "leave out min_tokens, or some of stop_token_ids"
        )
    return ids


def _check(request: Prompt, limits: Limits) -> None:
    ids, index = request.ids, request.index
    if not len(ids):
        raise ValueError(f"generate: prompt {index} is empty; give it at least one token (the beginning-of-sequence token, say)")
    if limits.max_length is not None and len(ids) >= limits.max_length:
        raise ValueError(
            f"generate: prompt {index} has {len(ids)} tokens, expected at most {limits.max_length - 1}: the model's longest sequence"
            f" is {limits.max_length} (its positions) and a completion needs one; shorten the prompt"
        )
    bad = np.flatnonzero((ids < 0) | (ids >= limits.num_embeddings))
    if len(bad):
        raise ValueError(
            f"generate: prompt {index} must hold token ids in [0, vocabulary size {limits.num_embeddings}), got {ids[bad[0]]}"
            f" at position {bad[0]}; is the tokenizer larger than the model?"
        )
    if request.params.n > MAX_SAMPLES:
        raise ValueError(f"generate: n must be at most {MAX_SAMPLES}, got {request.params.n} for prompt {index}")
