"""Choices as the two endpoints write them, whole or piece by piece; both from the same deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fastalign.generation.scoring import SequenceScores
from fastalign.generation.stops import decode
from fastalign.generation.streams import StreamDelta
from fastalign.generation.text import GrowingText
from fastalign.serving.service import PromptIds, Service
from fastalign.serving.tokens import TokenNames

LOWEST = -9999.0  # what stands for a log-prob of -inf, which JSON has not got

Top = list[tuple[int, float]]


class Choice(Protocol):
    """One completion of one prompt."""

    def opening(self) -> dict[str, Any] | None:
        """The piece that comes before the first token, if any."""

    def piece(self, delta: StreamDelta) -> dict[str, Any]:
        """What a delta adds, as a chunk's choice."""

    def whole(self, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """All pieces as one choice."""


class CompletionChoice:
    """A choice of /v1/completions. Its text goes on where the prompt's ends: the space that sentencepiece's decoder drops at the beginning
    of a text is given, so that prompt and completion may be put together.

    Args:
        service: tells tokens' names.
        index: of the choice.
        prompt: what is completed.
        echo: whether the prompt is part of the text.
        scores: log-probs of the prompt, to be echoed, too.
        top: alternatives a token to report, or None for no log-probs.
    """

    def __init__(
        self, service: Service, index: int, prompt: PromptIds, *, echo: bool, scores: SequenceScores | None, top: int | None
    ) -> None:
        self.service, self.index, self.prompt, self.echo, self.scores, self.top = service, index, prompt, echo, scores, top
        self._offset_base = len(prompt.text) if echo else 0
        self._growing = GrowingText(service.tokenizer, (), service.special)
        self._begun = False  # a token that has text was seen

    def opening(self) -> dict[str, Any] | None:
        if not self.echo:
            return None
        logprobs = None
        if self.scores is not None:
            names, ids = self.service.names, self.prompt.ids
            offsets = names.offsets(GrowingText(self.service.tokenizer, (), self.service.special), ids, 0)
            tops = self.scores.top_logprobs or [None if value is None else [] for value in self.scores.logprobs]
            logprobs = completion_logprobs(names, ids, self.scores.logprobs, tops, offsets)
        return {"index": self.index, "text": self.prompt.text, "logprobs": logprobs, "finish_reason": None}

    def piece(self, delta: StreamDelta) -> dict[str, Any]:
        logprobs, dropped, ids = None, "", delta.token_ids
        shown = ids[:-1] if isinstance(delta.stop_reason, int) else ids  # a stop token has no text
        first = len(ids) if self._begun else next((i for i, token in enumerate(shown) if token not in self.service.special), len(ids))
        if first < len(shown):
            dropped, self._begun = self._dropped_before(ids[first]), True
        if self.top is not None:
            offsets = self.service.names.offsets(self._growing, ids[: first + 1], self._offset_base)
            offsets += self.service.names.offsets(self._growing, ids[first + 1 :], self._offset_base + len(dropped))
            tops = delta.top_logprobs or [[] for _ in ids]
            logprobs = completion_logprobs(self.service.names, ids, delta.raw_logprobs or [], tops, offsets)
        self._offset_base += len(dropped)
        reasons = {"finish_reason": delta.finish_reason or None, "stop_reason": delta.stop_reason}
        return {"index": self.index, "text": dropped + delta.text, "logprobs": logprobs, **reasons}

    def _dropped_before(self, token: int) -> str:
        """The space that the decoder has before a token behind the prompt, and has not where the token begins a text."""
        before = next((last for last in reversed(self.prompt.ids) if last not in self.service.special), None)
        if before is None:
            return ""
        together, *apart = (decode(self.service.tokenizer, ids) for ids in ([before, token], [before], [token]))
        return " " if together == " ".join(apart) else ""

    def whole(self, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
        logprobs = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
        joined = {name: [value for part in logprobs for value in part[name]] for name in logprobs[0]} if logprobs else None
        return {**pieces[-1], "text": "".join(piece["text"] for piece in pieces), "logprobs": joined}


def completion_logprobs(
    names: TokenNames, ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[Top | None], offsets: list[int]
) -> dict[str, list[Any]]:
    """The `logprobs` of /v1/completions: each token is among its own alternatives; the first of a prompt has none."""
    best: list[dict[str, float] | None] = []
    for token, value, top in zip(ids, logprobs, tops, strict=True):
        if value is None or top is None:
            best.append(None)
            continue
        row: dict[str, float] = {}
        for other, logprob in (*top, (token, value)):
            row.setdefault(names.key_of(other), _number(logprob))
        best.append(row)
    values = [None if value is None else _number(value) for value in logprobs]
    return {"tokens": [names.key_of(token) for token in ids], "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}


class ChatChoice:
    """A choice of /v1/chat/completions; arguments as of CompletionChoice."""

    def __init__(self, service: Service, index: int, *, top: int | None) -> None:
        self.service, self.index, self.top = service, index, top

    def opening(self) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, delta: StreamDelta) -> dict[str, Any]:
        logprobs = None
        if self.top is not None:
            tops = delta.top_logprobs or [[] for _ in delta.token_ids]
            logprobs = chat_logprobs(self.service.names, delta.token_ids, delta.raw_logprobs or [], tops)
        reasons = {"finish_reason": delta.finish_reason or None, "stop_reason": delta.stop_reason}
        return {"index": self.index, "delta": {"content": delta.text} if delta.text else {}, "logprobs": logprobs, **reasons}

    def whole(self, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
        text = "".join(piece["delta"].get("content", "") for piece in pieces)
        logprobs = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
        content = [entry for part in logprobs for entry in part["content"]]
        rest = {name: value for name, value in pieces[-1].items() if name != "delta"}
        message = {"role": "assistant", "content": text, "refusal": None}
        return {**rest, "message": message, "logprobs": {"content": content, "refusal": None} if logprobs else None}


def chat_logprobs(names: TokenNames, ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[Top]) -> dict[str, Any]:
    """The `logprobs` of /v1/chat/completions."""
    content = []
    for token, value, top in zip(ids, logprobs, tops, strict=True):
        content.append(_entry(names, token, value) | {"top_logprobs": [_entry(names, other, logprob) for other, logprob in top]})
    return {"content": content, "refusal": None}


def _entry(names: TokenNames, token: int, logprob: float) -> dict[str, Any]:
    return {"token": names.text_of(token), "logprob": _number(logprob), "bytes": list(names.bytes_of(token))}


def _number(logprob: float) -> float:
    return max(logprob, LOWEST)
