"""Groups as the caller sees them, finished or not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastalign.generation.groups import Group, Member
from fastalign.generation.params import CompletionOutput, RequestOutput
from fastalign.generation.rows import Rows
from fastalign.generation.stops import decode, first_stop


def request_output(group: Group, prompt: str | None, tokenizer: Any, rows: Rows) -> RequestOutput:
    """The group with its samples in order, as far as they are."""
    missing = [CompletionOutput(j, [], finish_reason="") for j in range(len(group.members), group.params.n)]
    outputs = [_completion(member, tokenizer, rows) for member in group.members]
    return RequestOutput(prompt, group.prompt.tolist(), outputs + missing)


def drawn_ids(member: Member, rows: Rows) -> NDArray[np.int64]:
    """[C] the ids that a sample has drawn so far."""
    if member.row < 0:
        return member.record.tokens.astype(np.int64, copy=False)
    return rows.tokens[member.row, rows.prompt_length[member.row] : rows.length[member.row]]


def _completion(member: Member, tokenizer: Any, rows: Rows) -> CompletionOutput:
    record = member.record if member.row < 0 else rows.record(member.row)
    group, params = member.group, member.group.params
    ids, logprobs = record.tokens.tolist(), group.logprobs
    return CompletionOutput(
        index=member.index,
        token_ids=ids,
        text=_text(member, ids, tokenizer) if tokenizer is not None else "",
        logprobs=record.logprobs.tolist() if logprobs else None,
        raw_logprobs=record.raw_logprobs.tolist() if logprobs else None,
        kept_mass=record.kept_mass.tolist() if logprobs and params.truncates else None,
        weight_versions=record.versions.tolist(),
        finish_reason=member.finish_reason,
        stop_reason=member.stop_reason,
        top_logprobs=list(member.top_logprobs) if params.top_logprobs else None,
        error=str(group.error) if member.finish_reason == "error" else None,
    )


def _text(member: Member, ids: list[int], tokenizer: Any) -> str:
    if isinstance(member.stop_reason, int):
        return decode(tokenizer, ids[:-1])
    text = decode(tokenizer, ids)
    if member.finish_reason != "stop":
        return text
    read = len(decode(tokenizer, ids[:-1]).rstrip("\ufffd"))  # a stop string in there came before min_tokens, and ended nothing
    found = first_stop(text, member.group.params.stop, read)
    return text[: found[0]] if found else text
