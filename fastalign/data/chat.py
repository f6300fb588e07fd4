"""Conversations to token ids and the exact mask of what the assistant wrote.

Every boundary is checked in ids: what precedes an assistant turn, tokenized as generation will see it, must be a prefix
of the whole conversation's ids. Where a tokenizer merges characters across a boundary, or a template rewrites earlier
turns, there is no exact mask, and the record is reported instead of being trained on a guess.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from .dialects import plain_message
from .records import DataError, Record

Message = dict[str, Any]

_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, RecursionError)
# arguments of apply_chat_template that say how it works: not a record's, nor a client's, to give
_OWN = {"conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"}
_OWN |= {"max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "tools"}


def read_messages(record: Record, column: str) -> list[Message]:
    """The column as checked messages: a list of {"role": …, "content": …}; in a text column, its JSON. See `plain_message`.

    Raises:
        BadRecord: when there is none, or one lacks its role or content.
    """
    value = record.require(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise record.bad("invalid JSON", f"column {column!r}: invalid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, list):
        kind = type(value).__name__
        raise record.bad("wrong type", f"expected a list of {{role, content}} in column {column!r}, got {kind} {str(value)[:80]}")
    if not value:
        raise record.bad("empty messages", f"expected at least one message in column {column!r}, got none")
    for k, message in enumerate(value):
        _check_message(record, f"{column}[{k}]", message)
    return [plain_message(message) for message in value]


def _check_message(record: Record, place: str, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise record.bad("wrong type", f"{place}: expected {{role, content}}, got {str(message)[:80]}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    parts = isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content)
    if not isinstance(content, str) and not parts:
        raise record.bad("wrong type", f"{place}: expected text in 'content', got {type(content).__name__} {str(content)[:80]}")


class ChatEncoder:
    """Applies the tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)

    def _template(self, tools: Any) -> str:
        if not self.tokenizer.chat_template:
            raise DataError("the data are conversations, but the tokenizer has no chat template; give one with --chat_template file.jinja")
        return self.tokenizer.get_chat_template(tools=tools)

    def _options(self, record: Record) -> dict[str, Any]:
        tools = record.get("tools")
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except json.JSONDecodeError as error:
                raise record.bad("invalid JSON", f"column 'tools': invalid JSON: {error.msg} at column {error.colno}") from error
        extra = record.get("chat_template_kwargs") or {}
        if not isinstance(extra, dict):
            raise record.bad("wrong type", f"expected an object in column 'chat_template_kwargs', got {type(extra).__name__} {extra!r}")
        if taken := sorted(_OWN & set(extra)):
            raise record.bad("wrong type", f"chat_template_kwargs: {', '.join(taken)} is no variable of a chat template; leave it out")
        return {"tools": tools or None, **extra}

    def _render(self, record: Record, messages: Sequence[Message], **options: Any) -> list[int]:
        options = {**self._options(record), **options}
        self._template(options["tools"])
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=False, tokenizer_kwargs={"verbose": False}, **options
            )
        except _TEMPLATE_ERRORS as error:
            raise record.bad("chat template", f"the chat template refuses these messages: {error}") from error

    def prompt(self, record: Record, messages: Sequence[Message]) -> list[int]:
        """The ids that generation goes on from: the messages and the generation prompt.

        A last message of the assistant is left open, to be continued.
        """
        last = messages[-1]["role"] == "assistant"
        return self._render(record, messages, add_generation_prompt=not last, continue_final_message=last)

    def whole(self, record: Record, messages: Sequence[Message]) -> list[int]:
        """The ids of all messages as the template writes them, nothing cut and nothing marked."""
        return self._render(record, messages)

    def behind_turn(self) -> list[int]:
        """The ids that the template puts behind the token that closes the assistant's turn (ChatML's newline)."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = self.whole(Record({}, "chat template", 0), messages)
        last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in self._special), len(ids) - 1)
        return ids[last + 1 :]

    def conversation(self, record: Record, messages: Sequence[Message], scored_from: int = 0) -> tuple[list[int], list[bool]]:
        """Ids and scored flags: the assistant's messages from index `scored_from` on, each with its end-of-turn token.

        Raises:
            BadRecord: when nothing is scored, or a boundary is not one in token ids.
            DataError: when the tokenizer has no chat template.
        """
        for k, message in enumerate(messages):
            if k >= scored_from and _is_empty(message):
                raise record.bad("empty completion", f"message {k}: expected the assistant to say something, got nothing")
        if not any(m["role"] == "assistant" for m in messages[scored_from:]):
            roles = [m["role"] for m in messages[scored_from:]]
            raise record.bad("empty completion", f"expected a message of the assistant to learn, got roles {roles}")
        marked = "{% generation" in (template := self._template(self._options(record)["tools"])) or "{%- generation" in template
        ids, flags = (self._by_marks if marked else self._by_prefixes)(record, messages, scored_from)
        if not any(flags):
            raise record.bad("empty completion", "the chat template marks no token of the assistant; check its {% generation %} block")
        return ids, flags

    def _by_marks(self, record: Record, messages: Sequence[Message], scored_from: int) -> tuple[list[int], list[bool]]:
        """The spans that the template's {% generation %} blocks mark, their edges found by tokenizing up to them."""
        from transformers.utils.chat_template_utils import render_jinja_template  # late: seconds to import

        ids = self._render(record, messages)
        options = self._options(record)
        rendered, spans = render_jinja_template(
            conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
            chat_template=self._template(options["tools"]),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **options},
        )
        first = self.prompt(record, messages[:scored_from]) if scored_from else []
        self._check_prefix(record, first, ids, "the end of the prompt", _MARK_REMEDY)
        flags = [False] * len(ids)
        for begin, end in spans[0]:
            edges = [self.tokenizer(rendered[0][:edge], add_special_tokens=False, verbose=False)["input_ids"] for edge in (begin, end)]
            for edge, what in zip(edges, ("beginning", "end"), strict=True):
                self._check_prefix(record, edge, ids, f"the {what} of a {{% generation %}} block", _MARK_REMEDY)
            if len(edges[0]) >= len(first):
                flags[len(edges[0]) : len(edges[1])] = [True] * (len(edges[1]) - len(edges[0]))
        return ids, flags

    def _by_prefixes(self, record: Record, messages: Sequence[Message], scored_from: int) -> tuple[list[int], list[bool]]:
        """What each assistant message adds to the ids of the messages before it and the generation prompt."""
        ids = self._render(record, messages)
        flags = [False] * len(ids)
        for k, message in enumerate(messages):
            if message["role"] != "assistant" or k < scored_from:
                continue
            if k == 0:
                raise record.bad("chat template", f"a conversation cannot begin with the assistant here; {_PREFIX_REMEDY}")
            before = self._render(record, messages[:k], add_generation_prompt=True)
            upto = ids if k + 1 == len(messages) else self._render(record, messages[: k + 1])
            self._check_prefix(record, before, upto, f"the beginning of message {k}", _PREFIX_REMEDY)
            self._check_prefix(record, upto, ids, f"the end of message {k}", _PREFIX_REMEDY)
            stop = self._end_of_turn(upto, len(before))
            flags[len(before) : stop] = [True] * (stop - len(before))
        return ids, flags

    def _end_of_turn(self, ids: Sequence[int], begin: int) -> int:
        """Where the turn ends: behind its last special token, if only white space (ChatML's newline) follows that."""
        for stop in range(len(ids), begin, -1):
            if ids[stop - 1] in self._special:
                return stop if not self.tokenizer.decode(list(ids[stop:])).strip() else len(ids)
        return len(ids)

    def _check_prefix(self, record: Record, prefix: Sequence[int], ids: Sequence[int], what: str, remedy: str) -> None:
        if list(ids[: len(prefix)]) == list(prefix):
            return
        at = next((i for i, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), min(len(prefix), len(ids)))
        got, expected = (self.tokenizer.decode(list(x[max(0, at - 2) : at + 3])) for x in (ids, prefix))
        message = f"{what} is no boundary in token ids: at token {at} expected {expected!r}, got {got!r}; {remedy}"
        raise record.bad("no exact mask", message)


_MARK_REMEDY = "let the block begin and end at special tokens or line ends"
_PREFIX_REMEDY = "use a chat template with {% generation %} … {% endgeneration %} around what the assistant writes"


def _is_empty(message: Message) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content)
    return message["role"] == "assistant" and not message.get("tool_calls") and not (content or "").strip()
