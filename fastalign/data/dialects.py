"""Dialects: records as other projects write them, in the columns and roles that this one reads.

ShareGPT keeps conversations as [{from, value}]; Anthropic's HH keeps a whole preference record in two transcripts,
"\\n\\nHuman: …\\n\\nAssistant: …". Both become messages of {role, content}; every other record stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from .records import BadRecord, Record

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "system_prompt"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # the value is the call as JSON
}
_CALLS = ("function_call", "tool_call")
_SHAREGPT = ("conversations", "conversation")
_SIDES = ("chosen", "rejected", "completion")
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def normalize(record: Record) -> Record:
    """The record in this project's columns; one in no known dialect comes back as it is.

    - `conversations` of [{from, value}] or [{role, content}], with an optional `system` text → `messages`
      (beside `chosen` and `rejected`, which may be {from, value}: → `prompt`).
    - `chosen`, `rejected`, `completion` that are HH transcripts → `prompt` messages, which they share, and the messages
      that are their own; with an HH `prompt`, plain sides become one assistant message each.

    A record that is begun in a dialect and cannot be read comes back without columns, its `error` saying why, so that
    `--on_bad_record` decides about it as about any other.
    """
    try:
        columns = _from_sharegpt(record) or _from_transcripts(record)
    except BadRecord as error:
        return Record({}, record.source, record.line, str(error).removeprefix(f"{record.where}: "))
    return record if columns is None else Record(columns, record.source, record.line)


def normalize_all(records: Sequence[Record]) -> list[Record]:
    """`normalize` of each."""
    return [normalize(record) for record in records]


def as_prompt(record: Record) -> Record:
    """`normalize` for data of prompts alone, from which a model samples; columns beside the prompt stay for the rewards.

    - `messages` without `prompt`: what comes before the assistant's turns at the end.
    - an HH `prompt`, with or without completions → messages.
    """
    record = normalize(record)
    messages, text = record.get("messages"), record.get("prompt")
    if text is None and isinstance(messages, list):
        end = len(messages)
        while end and isinstance(messages[end - 1], dict) and messages[end - 1].get("role") == "assistant":
            end -= 1
        return Record({**record, "prompt": messages[:end]}, record.source, record.line)
    turns = read_transcript(text)
    return record if turns is None else Record({**record, "prompt": _without_generation_prompt(turns)}, record.source, record.line)


def _without_generation_prompt(turns: list[Message]) -> list[Message]:
    """An HH prompt ends in "\\n\\nAssistant:", which the chat template writes."""
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns


def plain_message(message: Message) -> Message:
    """A checked message as templates expect it: no null entries, and a call's arguments as an object rather than as its JSON.

    Tables give every message every key, null where it has none, and a template that asks whether a key is there is misled.
    """
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_plain_call(call) for call in message["tool_calls"]]
    return message


def _plain_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    call = {key: value for key, value in call.items() if value is not None}
    if isinstance(call.get("function"), dict):
        return {**call, "function": _plain_call(call["function"])}
    if isinstance(call.get("arguments"), str):
        try:
            call["arguments"] = json.loads(call["arguments"])
        except json.JSONDecodeError:
            return call  # a tool that takes text
    return call


def _from_sharegpt(record: Record) -> dict[str, Any] | None:
    name = next((name for name in _SHAREGPT if record.get(name) is not None), None)
    turns = _turns(record, name) if name else _turns(record, "messages")
    if turns is None or (name is None and not _is_sharegpt(turns)):
        return None
    messages = [_message(record, f"{name or 'messages'}[{k}]", turn) for k, turn in enumerate(turns)]
    columns = {key: value for key, value in record.items() if key not in (name, "messages")}
    system = columns.pop("system", None)
    if isinstance(system, str) and system.strip() and not (messages and messages[0]["role"] == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    sides = [side for side in ("chosen", "rejected") if side in columns]
    for side in sides:
        if isinstance(columns[side], dict):
            columns[side] = [_message(record, side, columns[side])]
        elif isinstance(columns[side], str):
            columns[side] = [{"role": "assistant", "content": columns[side]}]
    return {**columns, "prompt" if sides else "messages": messages}


def _turns(record: Record, name: str) -> list[Any] | None:
    """The column as a list, read from JSON where it is text; None where it is neither."""
    value = record.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise record.bad("invalid JSON", f"invalid JSON: column {name!r}: {error.msg} at column {error.colno}") from error
    return value if isinstance(value, list) else None


def _is_sharegpt(turns: Sequence[Any]) -> bool:
    return bool(turns) and isinstance(turns[0], dict) and {"from", "value"} <= turns[0].keys()


def _message(record: Record, place: str, turn: Any) -> Message:
    if isinstance(turn, dict) and turn.get("from") is None and isinstance(turn.get("role"), str):
        return turn  # the column's name is ShareGPT's, the messages are ours
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
        raise record.bad("wrong type", f"wrong type: {place}: expected {{from, value}} with text in both, got {str(turn)[:80]}")
    speaker = turn["from"].strip().lower()
    if speaker not in ROLES:
        raise record.bad("unknown role", f"unknown role: {place}: expected 'from' to be one of {', '.join(ROLES)}, got {turn['from']!r}")
    if speaker in _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(record, place, turn["value"])}
    return {"role": ROLES[speaker], "content": turn["value"]}


def _calls(record: Record, place: str, text: str) -> list[dict[str, Any]]:
    """One call, or a list of them: {"name": …, "arguments": {…}}."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise record.bad("invalid JSON", f"invalid JSON: {place}: expected a call as JSON, got {text[:80]!r} ({error.msg})") from error
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise record.bad("wrong type", f"wrong type: {place}: expected a call {{name, arguments}}, got {str(call)[:80]}")
    return [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}} for call in calls]


def _from_transcripts(record: Record) -> dict[str, Any] | None:
    told = {side: turns for side in _SIDES if (turns := read_transcript(record.get(side))) is not None}
    prompt = read_transcript(record.get("prompt"))
    if told:
        shared = _shared_turns(list(told.values()))
        if not shared:
            raise record.bad("no shared prompt", f"no shared prompt: {' and '.join(told)} do not begin with the same turn")
        return {**record, "prompt": next(iter(told.values()))[:shared], **{side: turns[shared:] for side, turns in told.items()}}
    sides = [side for side in _SIDES if isinstance(record.get(side), str)]
    if prompt is None or not sides:
        return None
    prompt = _without_generation_prompt(prompt)
    return {**record, "prompt": prompt, **{side: [{"role": "assistant", "content": record[side].strip()}] for side in sides}}


def read_transcript(text: Any) -> list[Message] | None:
    """The messages of "\\n\\nHuman: …\\n\\nAssistant: …"; None for anything else."""
    if not isinstance(text, str) or not re.match(r"\s*Human:", text) or "\n\nAssistant:" not in text:
        return None
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _shared_turns(transcripts: list[list[Message]]) -> int:
    """How many turns all begin with; each keeps at least one of its own."""
    most = min(map(len, transcripts)) - 1
    return next((k for k in range(most) if any(t[k] != transcripts[0][k] for t in transcripts)), most)
