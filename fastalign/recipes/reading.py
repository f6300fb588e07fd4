"""The records that a command's data flags name."""

from __future__ import annotations

from ..data import Record, load_records, parse_dataset_map
from ..data.dialects import as_prompt, normalize_all
from .arguments import DataArguments


def records_of(data: DataArguments, name: str | list[str], max_samples: int) -> list[Record]:
    """The records of a data set, or of several, renamed as --dataset_map says, those in a known dialect in this project's columns."""
    columns = parse_dataset_map(data.dataset_map)
    return normalize_all(load_records(name, split=data.dataset_split, columns=columns, max_samples=max_samples))


def prompts_named_by(data: DataArguments, name: str | list[str], max_samples: int) -> list[Record]:
    """The same for data to sample from: each record has a `prompt`, where it can be told."""
    columns = parse_dataset_map(data.dataset_map)
    return [as_prompt(r) for r in load_records(name, split=data.dataset_split, columns=columns, max_samples=max_samples)]
