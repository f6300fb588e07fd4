"""Data: records of many formats, as the token trees that training reads and the prompts that generation starts from."""

from .dialects import normalize
from .examples import Examples, Prompt, Prompts, columns_of_prompts, prompt_examples, sft_examples
from .load import load_parts, load_records
from .order import DataOrder, MixtureOrder
from .records import BadRecord, DataError, Record, parse_dataset_map
from .stream import SegmentStream

__all__ = [
    "BadRecord",
    "DataError",
    "DataOrder",
    "Examples",
    "MixtureOrder",
    "Prompt",
    "Prompts",
    "Record",
    "SegmentStream",
    "columns_of_prompts",
    "load_parts",
    "load_records",
    "normalize",
    "parse_dataset_map",
    "prompt_examples",
    "sft_examples",
]
