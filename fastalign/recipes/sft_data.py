"""What `fastalign sft` reads: records of one or several data sets as examples, in memory or streamed, and the order they are drawn in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..data import DataOrder, MixtureOrder, Record, SegmentStream, load_parts, parse_dataset_map, sft_examples
from ..data.conditions import conditioned, parse_sources
from ..data.examples import Limits
from ..data.ranked import ranked_examples
from ..data.stream import Reader, supervised_encoding
from ..losses.sft import SupervisedLoss
from ..models.backbone import head_of, within_positions
from ..packing import Segment
from .arguments import Arguments
from .setup import Loaded

NUM_SAMPLED = 16  # records of a stream that are looked at before it is trained on


def examples(args: Arguments, loaded: Loaded, name: str | list[str], max_samples: int) -> list[Segment]:
    """The data set, or several one behind the other, as tokenized, masked segments."""
    return [segment for part in parts_of(args, loaded, name, max_samples) for segment in part]


def parts_of(
    args: Arguments, loaded: Loaded, name: str | list[str], max_samples: int, row: SupervisedLoss | None = None
) -> list[Sequence[Any]]:
    """Each data set as the row's examples: tokenized, masked segments, or prompts with scored completions. Each has its own format."""
    data = args.data
    names, columns = [name] if isinstance(name, str) else name, parse_dataset_map(data.dataset_map)
    parts: list[Sequence[Any]] = []
    for records in load_parts(names, split=data.dataset_split, columns=columns, max_samples=max_samples):
        options: dict[str, Any] = {"max_length": within_positions(data.max_length, loaded.model), "on_bad_record": data.on_bad_record}
        options |= {"system_prompt": data.system_prompt, "vocab_size": head_of(loaded.model).weight.shape[0]}
        records = conditions(args, records)
        if row is not None and row.ranks:
            parts.append(ranked_examples(records, loaded.tokenizer, **options))
        else:
            parts.append(sft_examples(records, loaded.tokenizer, **options).segments)
    return parts


def ordered(args: Arguments, loaded: Loaded, row: SupervisedLoss) -> tuple[Sequence[Any], DataOrder | MixtureOrder]:
    """The training data and the order of it: of all together, or by weight where weights are given."""
    parts = parts_of(args, loaded, args.data.dataset_name, args.data.max_samples, row)
    found = [example for part in parts for example in part]
    if args.data.dataset_weights:
        weights = args.data.dataset_weights
        return found, MixtureOrder([len(part) for part in parts], weights, seed=args.run.seed, shuffle=args.data.shuffle)
    return found, DataOrder(len(found), seed=args.run.seed, shuffle=args.data.shuffle)


def streamed(args: Arguments, loaded: Loaded, row: SupervisedLoss) -> tuple[Sequence[Any], SegmentStream]:
    """The first training records, to be shown, and the stream of all.

    Raises:
        ValueError: without --max_steps, with weights, or for a loss or conditions that need the records in memory.
    """
    data = args.data
    if args.optim.max_steps < 1:
        raise ValueError("--streaming: how many records there are is not known before they are read; give --max_steps")
    if data.dataset_weights:
        raise ValueError("--streaming reads the data sets one behind the other; --dataset_weights needs them in memory")
    if row.ranks or args.supervised.source_weights or args.supervised.source_prompts:
        raise ValueError("--streaming reads plain records; ranked completions, --source_weights and --source_prompts need them in memory")
    names = [data.dataset_name] if isinstance(data.dataset_name, str) else data.dataset_name
    read = Reader(names, split=data.dataset_split, columns=parse_dataset_map(data.dataset_map), max_samples=data.max_samples)
    limits = Limits(within_positions(data.max_length, loaded.model), "--max_length", head_of(loaded.model).weight.shape[0])
    encode, again = (
        supervised_encoding(read.head, loaded.tokenizer, limits, on_bad_record=data.on_bad_record, system_prompt=data.system_prompt)
        for _ in range(2)
    )
    stream = SegmentStream(read, encode, window=data.stream_window, seed=args.run.seed, shuffle=data.shuffle)
    return SegmentStream(read, again, window=NUM_SAMPLED, shuffle=False).next_batch(NUM_SAMPLED), stream


def conditions(args: Arguments, records: list[Record]) -> list[Record]:
    """The records under the flags' source weights and prompts; as they are where neither is given.

    Raises:
        ValueError: a weight that is no finite number >= 0.
    """
    weights: dict[str, float] = {}
    for name, text in parse_sources("--source_weights", args.supervised.source_weights).items():
        try:
            weights[name] = float(text)
        except ValueError:
            weights[name] = math.nan
        if not (math.isfinite(weights[name]) and weights[name] >= 0):
            raise ValueError(f"--source_weights {name}={text}: expected a finite number >= 0")
    prefixes = parse_sources("--source_prompts", args.supervised.source_prompts)
    return conditioned(records, weights, prefixes) if weights or prefixes else records
