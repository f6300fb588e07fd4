"""Data: records of many formats, as the token trees that training reads and the prompts that generation starts from."""

from .candidates import Judged
from .dialects import normalize
from .examples import Examples, Prompt, Prompts, columns_of_prompts, prompt_examples, sft_examples
from .labelled import Completions, labelled_examples, partners
from .load import load_parts, load_records
from .order import DataOrder, MixtureOrder
from .pairs import Pairs, pair_examples
from .rankings import attribute_examples, outcome_examples, ranking_examples
from .records import BadRecord, DataError, Record, parse_dataset_map
from .steps import step_examples
from .stream import SegmentStream

__all__ = [
    "BadRecord",
    "Completions",
    "DataError",
    "DataOrder",
    "Examples",
    "Judged",
    "MixtureOrder",
    "Pairs",
    "Prompt",
    "Prompts",
    "Record",
    "SegmentStream",
    "attribute_examples",
    "columns_of_prompts",
    "labelled_examples",
    "load_parts",
    "load_records",
    "normalize",
    "outcome_examples",
    "pair_examples",
    "parse_dataset_map",
    "partners",
    "prompt_examples",
    "ranking_examples",
    "sft_examples",
    "step_examples",
]
