"""Data: records of many formats, as the token trees that training reads and the prompts that generation starts from."""

from .examples import Examples, Prompt, Prompts, columns_of_prompts, prompt_examples, sft_examples
from .labelled import Completions, labelled_examples, partners
from .load import load_records
from .order import DataOrder
from .pairs import Pairs, pair_examples
from .records import BadRecord, DataError, Record, parse_dataset_map

__all__ = [
    "BadRecord",
    "Completions",
    "DataError",
    "DataOrder",
    "Examples",
    "Pairs",
    "Prompt",
    "Prompts",
    "Record",
    "columns_of_prompts",
    "labelled_examples",
    "load_records",
    "pair_examples",
    "parse_dataset_map",
    "partners",
    "prompt_examples",
    "sft_examples",
]
