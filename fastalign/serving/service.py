"""What every endpoint needs: the engine, the model's name and limits, prompts as token ids, and counts."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fastalign.data.chat import ChatEncoder, read_messages
from fastalign.data.records import DataError, Record
from fastalign.generation.asynchronous import AsyncEngine
from fastalign.generation.requests import Limits
from fastalign.generation.stops import decode, special_ids
from fastalign.serving.errors import ApiError
from fastalign.serving.tokens import TokenNames


@dataclass(frozen=True)
class PromptIds:
    """A prompt as the engine takes it, and as text."""

    ids: list[int]
    text: str


class Service:
    """One model behind an engine.

    Args:
        engine: whose engine has a tokenizer.
        name: what clients call the model.

    Attributes:
        max_length: tokens that a prompt and its completion may have together; None: any number.
        counts: of what was served, by metric name with its labels.
    """

    def __init__(self, engine: AsyncEngine, name: str) -> None:
        inner = engine.engine
        if inner.tokenizer is None:
            raise ValueError("Service: the engine needs a tokenizer: Engine(model, tokenizer)")
        self.engine, self.name, self.tokenizer = engine, name, inner.tokenizer
        self.limits, self.names, self.special = (
            Limits.of(inner.model, inner.tokenizer),
            TokenNames(inner.tokenizer),
            special_ids(inner.tokenizer),
        )
        cache = None if inner.kv_cache_tokens is None else inner.kv_cache_tokens // inner.block_size * inner.block_size
        known = [limit for limit in (self.limits.max_length, cache) if limit is not None]
        self.max_length = min(known) if known else None
        self.started = int(time.time())
        self.counts: Counter[str] = Counter()
        self._chat = ChatEncoder(inner.tokenizer)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for another model than this one."""
        if name is not None and name != self.name:
            raise ApiError(
                f"the model {name!r} does not exist; this server has {self.name!r}", status=404, param="model", code="model_not_found"
            )

    def card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        card = {"id": self.name, "object": "model", "created": self.started, "owned_by": "fastalign"}
        return card | {"max_model_len": self.max_length}

    def completion_prompt(self, prompt: str | list[int]) -> PromptIds:
        """A prompt of /v1/completions: text is tokenized as the tokenizer does it, with the special tokens that it adds."""
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ApiError(f"prompt: half of a surrogate pair at character {error.start}", param="prompt") from error
            return self._checked(PromptIds(self.tokenizer(prompt, verbose=False).input_ids, prompt), "prompt")
        self._checked(PromptIds(prompt, ""), "prompt")
        return PromptIds(prompt, decode(self.tokenizer, prompt))

    def chat_prompt(self, messages: list[dict[str, Any]], template_options: dict[str, Any] | None) -> PromptIds:
        """A conversation through the chat template, open for the assistant; a last message of the assistant is continued.

        Raises:
            ApiError: no template, a message without role or text, or what the template refuses.
        """
        if not self.tokenizer.chat_template:
            raise ApiError(
                f"the tokenizer of {self.name!r} has no chat template; use /v1/completions, or start the server with --chat_template",
                code="no_chat_template",
            )
        record = Record({"messages": [_flat(m) for m in messages], "chat_template_kwargs": template_options}, "messages", 1)
        try:
            ids = self._chat.prompt(record, read_messages(record, "messages"))
        except DataError as error:
            raise ApiError(str(error).removeprefix(f"{record.where}: "), param="messages") from error
        return self._checked(PromptIds(list(ids), ""), "messages")

    def room(self, prompt: PromptIds, wanted: int | None) -> int:
        """Tokens that the completion may have: what was asked for, or all that the model's context leaves."""
        left = None if self.max_length is None else self.max_length - len(prompt.ids)
        if wanted is None:
            return left if left is not None else 2048
        return wanted if left is None else min(wanted, max(left, 1))

    def check_length(self, prompt: PromptIds, param: str) -> None:
        """Raises ApiError for a prompt that leaves no room for a completion."""
        if self.max_length is not None and len(prompt.ids) >= self.max_length:
            raise ApiError(
                f"{param}: {len(prompt.ids)} tokens, expected at most {self.max_length - 1}: the context is {self.max_length} tokens and a"
                " completion needs one; shorten it",
                param=param,
                code="context_length_exceeded",
            )

    def _checked(self, prompt: PromptIds, param: str) -> PromptIds:
        if not prompt.ids:
            raise ApiError(f"{param}: expected at least one token, got none", param=param)
        limit = self.limits.max_length
        if limit is not None and len(prompt.ids) > limit:
            raise ApiError(
                f"{param}: {len(prompt.ids)} tokens, expected at most {limit}: the model's context; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        vocab_size = self.limits.num_embeddings
        bad = next((token for token in prompt.ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise ApiError(f"{param}: expected token ids in [0, {vocab_size}), got {bad}", param=param)
        return prompt


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is text: parts of text are joined, other parts stay for the check to refuse."""
    content = message.get("content")
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return message | {"content": "".join(str(part.get("text", "")) for part in content)}
    return message
