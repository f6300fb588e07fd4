"""What an environment says, as token ids behind those that are there: nothing that was sampled is tokenized again."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from ..data import Prompt
from ..data.chat import ChatEncoder
from ..data.records import Record
from ..data.tokens import TextEncoder
from ..generation.text import special_ids

_ANSWER, _OBSERVATION = "answer-of-the-assistant", "what-is-observed"  # placeholders that no template writes by itself


class Observer:
    """Turns observations into ids.

    Behind a plain prompt an observation is its text. In a conversation it is a message: the ids are those that the chat template
    puts between the assistant's words and its next turn.

    Args:
        tokenizer: of the model.
        role: who speaks in conversations, "user" where the template knows no such role.
    """

    def __init__(self, tokenizer: Any, role: str = "tool") -> None:
        self.tokenizer, self.role = tokenizer, role
        self._text, self._special = TextEncoder(tokenizer), special_ids(tokenizer)
        written = sorted({tokenizer.convert_ids_to_tokens(token) for token in self._special}, key=len, reverse=True)
        self._forged = re.compile("|".join(map(re.escape, written)) or r"(?!)")
        self._between: dict[str, tuple[str, str]] = {}  # by the template's options: what it writes before and behind an observation

    def first(self, prompt: Prompt, text: str) -> list[int]:
        """[L] the prompt's ids with a first observation, before the model has written anything."""
        text = self._tame(text)
        if isinstance(prompt.prompt, str):
            return [*prompt.ids, *self._plain(text)]
        messages = [*prompt.prompt, {"role": "user", "content": text}]
        return ChatEncoder(self.tokenizer).prompt(Record(prompt.columns, "first observation", 0), messages)

    def next(self, prompt: Prompt, text: str, last: int) -> list[int]:
        """[K] what follows a turn whose last id is `last`."""
        text = self._tame(text)
        if isinstance(prompt.prompt, str):
            return self._plain(text)
        before, behind = self._around(prompt)
        closing = self.tokenizer.decode([last]) if last in self._special else ""  # a turn that closed itself is not closed twice
        return self._ids((before + text + behind).removeprefix(closing))

    def _tame(self, text: str) -> str:
        """The text without the tokenizer's special tokens: with them what a tool finds could end its turn and speak for others."""
        while self._forged.search(text):  # what is left may make another
            text = self._forged.sub("", text)
        return text

    def _plain(self, text: str) -> list[int]:
        (ids,) = self._text.pieces([text])
        return self._ids(text) if ids is None else ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _around(self, prompt: Prompt) -> tuple[str, str]:
        options = prompt.columns.get("chat_template_kwargs") or {}
        key = repr(sorted(options.items()))
        if key not in self._between:
            found = next(filter(None, (self._written(role, options) for role in dict.fromkeys((self.role, "user")))), None)
            if found is None:
                raise ValueError(f"the chat template has no place for an observation, as {self.role!r} or as 'user', behind an answer")
            self._between[key] = found
        return self._between[key]

    def _written(self, role: str, options: dict[str, Any]) -> tuple[str, str] | None:
        """What the template writes around an observation of this role; None where it refuses or leaves it out."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}, {"role": role, "content": _OBSERVATION}]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except (TemplateError, TypeError, ValueError, KeyError):
            return None
        before, found, behind = text.rpartition(_ANSWER)[2].partition(_OBSERVATION)
        return (before, behind) if found and _ANSWER in text else None
