"""What a judge asks a language model, whoever runs it, and the file that remembers the replies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Question:
    """One reply that is wanted.

    Attributes:
        messages: the conversation so far, as ((role, content), …).
        draw: which of several samples of the same conversation.
    """

    messages: tuple[tuple[str, str], ...]
    draw: int = 0

    @property
    def conversation(self) -> Conversation:
        """The messages as chat templates and servers take them."""
        return [{"role": role, "content": content} for role, content in self.messages]

    def key(self) -> int:
        """63 bits that stand for the conversation: its random key, whatever else is asked beside it."""
        digest = hashlib.sha256(json.dumps(self.messages, ensure_ascii=False).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def followed_by(self, reply: str, turn: str) -> Question:
        """The same conversation after a reply and the next thing that is asked."""
        return Question((*self.messages, ("assistant", reply), ("user", turn)), self.draw)


class Model(Protocol):
    """A language model that replies to conversations."""

    identity: dict[str, Any]
    """What its replies depend on besides the conversation: the model and how it samples."""

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """(index, reply) of each question, in any order; None where there is none."""


class Remembering:
    """A model whose replies are kept in a .jsonl file: what was asked before is not asked again. Failures are not kept.

    Args:
        model: who is asked.
        path: the file, appended to; several models may share it. A last line that was not written whole is dropped.

    Raises:
        ValueError: the path holds something else.
    """

    def __init__(self, model: Model, path: str | Path) -> None:
        self.model, self.path, self.identity = model, Path(path), model.identity
        self._known: dict[str, str] = {}
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                item = json.loads(line)
                self._known[item["key"]] = item["reply"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"cache {self.path}: line {number} is no judge's reply; is it another file? choose a new one") from error
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """As `Model`; each new reply is written before it is returned."""
        keys = [self._key(question) for question in questions]
        for i, key in enumerate(keys):
            if key in self._known:
                yield i, self._known[key]
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        if not missing:
            return
        with self.path.open("ab", buffering=0) as file:  # a reply is one write, so that several runs may share the file
            for j, reply in self.model.ask([questions[i] for i in missing]):
                i = missing[j]
                if reply is not None:
                    self._known[keys[i]] = reply
                    item = {"key": keys[i], "model": self.identity.get("model"), "conversation": questions[i].conversation, "reply": reply}
                    file.write((json.dumps(item, ensure_ascii=False) + "\n").encode())
                yield i, reply

    def _key(self, question: Question) -> str:
        asked = json.dumps([self.identity, question.messages, question.draw], sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(asked.encode()).hexdigest()[:32]


def shortened(text: str, limit: int = 200) -> str:
    """The text as logs have it."""
    return repr(text if len(text) <= limit else text[:limit] + "…")
