"""Groups as the caller sees them, finished or not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastalign.generation.groups import Group, Member
from fastalign.generation.params import CompletionOutput, RequestOutput
from fastalign.generation.rows import Rows
from fastalign.generation.text import completion_text


def request_output(group: Group, prompt: str | None, tokenizer: Any, rows: Rows) -> RequestOutput:
    """The group with its samples in order, as far as they are."""
    missing = [CompletionOutput(j, [], finish_reason="") for j in range(len(group.members), group.params.n)]
    outputs = [completion_output(member, tokenizer, rows) for member in group.members]
    return RequestOutput(prompt, group.prompt.tolist(), outputs + missing)


def drawn_ids(member: Member, rows: Rows) -> NDArray[np.int64]:
    """[C] the ids that a sample has drawn so far."""
    if member.row < 0:
        return member.record.tokens.astype(np.int64, copy=False)
    return rows.tokens[member.row, rows.prompt_length[member.row] : rows.length[member.row]]


def completion_output(member: Member, tokenizer: Any, rows: Rows) -> CompletionOutput:
    """One sample, as far as it is."""
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
    stop_reason = member.stop_reason if member.finish_reason == "stop" else None
    return completion_text(tokenizer, ids, stop_reason, member.group.params.min_tokens)


def new_outputs(group: Group, rows: Rows) -> list[CompletionOutput]:
    """What each sample gained since it was last asked for, its end included; samples that gained nothing are left out. No text."""
    fresh = []
    for member in group.members:
        start, ids = member.streamed, drawn_ids(member, rows)[member.streamed :].tolist()
        if not ids and (not member.finish_reason or member.told):
            continue
        member.streamed, member.told = start + len(ids), bool(member.finish_reason)
        drawn = {name: _drawn(member, rows, name)[start : member.streamed].tolist() for name in ("logprobs", "raw_logprobs")}
        fresh.append(
            CompletionOutput(
                index=member.index,
                token_ids=ids,
                logprobs=drawn["logprobs"] if group.logprobs else None,
                raw_logprobs=drawn["raw_logprobs"] if group.logprobs else None,
                weight_versions=_drawn(member, rows, "versions")[start : member.streamed].tolist(),
                finish_reason=member.finish_reason,
                stop_reason=member.stop_reason,
                top_logprobs=member.top_logprobs[start : member.streamed] if group.params.top_logprobs else None,
                error=str(group.error) if member.finish_reason == "error" else None,
            )
        )
    return fresh


def _drawn(member: Member, rows: Rows, name: str) -> NDArray[Any]:
    return getattr(member.record, name) if member.row < 0 else getattr(rows, name)[member.row]
