"""A rollout as JSON values, exactly: a checkpoint holds the one that was sampled ahead."""

from __future__ import annotations

import base64
from array import array
from dataclasses import fields
from typing import Any

from ..rollout import Rollout, Sample

# field of a sample → type code of its numbers; the other fields are JSON as they are
_NUMBERS = {"ids": "q", "logprobs": "d", "raw_logprobs": "d", "kept_mass": "d", "weight_versions": "q", "scored": "b"}
_NUMBERS |= {"step_ends": "q", "step_rewards": "d"}


def packed_rollout(rollout: Rollout) -> dict[str, Any]:
    """JSON values that `unpacked_rollout` reads. The columns, which only rewards read, are left out."""
    return {
        "prompts": [_text(ids, "q") for ids in rollout.prompts],
        "samples": [[_packed(sample) for sample in group] for group in rollout.samples],
        "greedy": [_packed(sample) for sample in rollout.greedy],
        "opponents": [[_packed(sample) for sample in group] for group in rollout.opponents],
    }


def unpacked_rollout(saved: dict[str, Any]) -> Rollout:
    """The rollout, equal to the bit, with empty columns."""
    return Rollout(
        [_list(text, "q") for text in saved["prompts"]],
        [[_sample(one) for one in group] for group in saved["samples"]],
        [{} for _ in saved["prompts"]],
        [_sample(one) for one in saved["greedy"]],
        [[_sample(one) for one in group] for group in saved["opponents"]],
    )


def _packed(sample: Sample) -> dict[str, Any]:
    values = {field.name: getattr(sample, field.name) for field in fields(sample)}
    numbers = {name: _text(values[name], code) for name, code in _NUMBERS.items() if values[name] is not None}
    return values | numbers


def _sample(saved: dict[str, Any]) -> Sample:
    values = dict(saved)
    values |= {name: _list(values[name], code) for name, code in _NUMBERS.items() if values[name] is not None}
    if values["scored"] is not None:
        values["scored"] = list(map(bool, values["scored"]))
    return Sample(**values)


def _text(values: list[Any], code: str) -> str:
    return base64.b64encode(array(code, values).tobytes()).decode()


def _list(text: str, code: str) -> list[Any]:
    numbers = array(code)
    numbers.frombytes(base64.b64decode(text))
    return numbers.tolist()
