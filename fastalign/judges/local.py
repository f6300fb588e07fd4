"""A judge's language model in this process: all questions of a batch through one engine, votes as samples of one prompt."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..data.chat import ChatEncoder
from ..data.records import Record
from ..data.tokens import TextEncoder
from ..generation import Engine, SamplingParams
from ..models.backbone import causal_lm
from .asking import Conversation, Question, shortened

logger = logging.getLogger("fastalign")

CHUNK = 1024  # conversations given to the engine at once: their replies are kept before the next ones are asked


class LocalModel:
    """Replies with an engine of ours.

    Args:
        engine: over the model and with its tokenizer. Conversations go through the chat template; a tokenizer without one gets their
            contents as plain text, a blank line between them.
        params: how a reply is sampled; its `seed` and the conversation decide the draw, so a rerun repeats.
        name: of the model, for the key under which replies are kept.
    """

    def __init__(self, engine: Engine, params: SamplingParams, name: str = "") -> None:
        self.engine, self.params = engine, replace(params, logprobs=False)
        self.text, self.chat = TextEncoder(engine.tokenizer), ChatEncoder(engine.tokenizer)
        sampled = {key: getattr(params, key) for key in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")}
        self.identity: dict[str, Any] = {"model": name, **sampled, "chat_template": engine.tokenizer.chat_template}
        config: Any = causal_lm(engine.model).config
        self.max_length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._lock = threading.Lock()  # several rewards may share a judge, and are scored in threads

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """As `Model`. A conversation that leaves no room for the reply has none, and is named in the log."""
        members: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for i, question in enumerate(questions):
            members.setdefault(question.messages, []).append(i)
        groups = list(members.values())
        for start in range(0, len(groups), CHUNK):
            yield from self._answer(questions, groups[start : start + CHUNK])

    def _answer(self, questions: Sequence[Question], groups: list[list[int]]) -> list[tuple[int, str | None]]:
        fitting, found = [], list[tuple[int, str | None]]()
        for own in groups:
            ids = self.encode(questions[own[0]].conversation)
            if self.max_length is not None and len(ids) + self.params.max_tokens > self.max_length:
                asked = shortened(questions[own[0]].messages[-1][1])
                message = "judge: no reply to a conversation of %d tokens: with max_tokens=%d it passes the model's %d; it asks %s"
                logger.warning(message, len(ids), self.params.max_tokens, self.max_length, asked)
                found += [(i, None) for i in own]
            else:
                fitting.append((own, ids))
        if not fitting:
            return found
        params = [replace(self.params, n=1 + max(questions[i].draw for i in own)) for own, _ in fitting]
        keys = [questions[own[0]].key() for own, _ in fitting]
        with self._lock:
            outputs = self.engine.generate([ids for _, ids in fitting], params, request_ids=keys)
            self.engine.release_cache()  # whoever trains or samples has the memory
        for (own, _), output in zip(fitting, outputs, strict=True):
            found += [(i, output.outputs[questions[i].draw].text) for i in own]
        return found

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the reply begins."""
        if self.engine.tokenizer.chat_template:
            return self.chat.prompt(Record({}, "judge", 0), conversation)
        return self.text.prompts(["\n\n".join(message["content"] for message in conversation) + "\n\n"])[0]
