"""Finished groups as the caller sees them."""

from __future__ import annotations

from typing import Any

from fastalign.generation.groups import Group, Member
from fastalign.generation.params import CompletionOutput
from fastalign.generation.stops import decode, first_stop


def completions(group: Group, tokenizer: Any, *, logprobs: bool) -> list[CompletionOutput]:
    """The group's samples in order."""
    return [_completion(member, tokenizer, logprobs) for member in group.members]


def _completion(member: Member, tokenizer: Any, logprobs: bool) -> CompletionOutput:
    record, truncated = member.record, member.group.params.truncates
    ids = record.tokens.tolist()
    return CompletionOutput(
        index=member.index,
        token_ids=ids,
        text=_text(member, ids, tokenizer) if tokenizer is not None else "",
        logprobs=record.logprobs.tolist() if logprobs else None,
        raw_logprobs=record.raw_logprobs.tolist() if logprobs else None,
        kept_mass=record.kept_mass.tolist() if logprobs and truncated else None,
        weight_versions=record.versions.tolist(),
        finish_reason=member.finish_reason,
        stop_reason=member.stop_reason,
    )


def _text(member: Member, ids: list[int], tokenizer: Any) -> str:
    if isinstance(member.stop_reason, int):
        return decode(tokenizer, ids[:-1])
    text = decode(tokenizer, ids)
    found = first_stop(text, member.group.params.stop) if isinstance(member.stop_reason, str) else None
    return text[: found[0]] if found else text
