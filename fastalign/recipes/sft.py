"""`fastalign sft`: supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..data import DataOrder, Record, load_records, parse_dataset_map, sft_examples
from ..data.conditions import conditioned, parse_sources
from ..data.ranked import Ranked, ranked_examples
from ..generation import Engine, SamplingParams
from ..losses.sft import supervised_loss
from ..models.backbone import head_of
from ..packing import Segment
from .arguments import Arguments
from .setup import Loaded, build_updater, check_output, load, num_steps, plan, seed_everything
from .sft_task import SupervisedTask, cut_of
from .training import Job, execute

NUM_SHOWN = 4


def examples(args: Arguments, loaded: Loaded, name: str, max_samples: int) -> list[Segment]:
    """The data set as tokenized, masked segments."""
    return _read(sft_examples, args, loaded, name, max_samples).segments


def ranked(args: Arguments, loaded: Loaded, name: str, max_samples: int) -> list[Ranked]:
    """The data set as prompts with scored completions."""
    return _read(ranked_examples, args, loaded, name, max_samples)


def _read(encode: Callable[..., Any], args: Arguments, loaded: Loaded, name: str, max_samples: int) -> Any:
    data = args.data
    records = load_records(name, split=data.dataset_split, columns=parse_dataset_map(data.dataset_map), max_samples=max_samples)
    return encode(
        conditions(args, records),
        loaded.tokenizer,
        max_length=data.max_length,
        on_bad_record=data.on_bad_record,
        system_prompt=data.system_prompt,
        vocab_size=head_of(loaded.model).weight.shape[0],
    )


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


def prompt_of(segment: Segment) -> list[int]:
    """What precedes the first scored token; the whole of a segment that none is scored of."""
    flags = [segment.scored] * len(segment.ids) if isinstance(segment.scored, bool) else list(segment.scored)
    return list(segment.ids[: flags.index(True) if True in flags else len(flags)])


def shown_prompts(segments: Sequence[Segment | Ranked], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """A few prompts whose completion can be compared before and after."""
    prompts = []
    for example in segments:
        ids = prompt_of(example.segment if isinstance(example, Ranked) else example)
        if ids:
            prompts.append((tokenizer.decode(ids, skip_special_tokens=True), ids))
        if len(prompts) == NUM_SHOWN:
            break
    return prompts


def run(args: Arguments) -> dict[str, Any]:
    """Trains, and returns the summary (the plan under --dry_run)."""
    resume, row = check_output(args.run, args.data.eval_dataset_name), supervised_loss(args.supervised.loss, args.loss_options)
    seed_everything(args.run.seed)
    loaded = load(args.model)
    read: Callable[..., Sequence[Any]] = ranked if row.ranks else examples
    segments = read(args, loaded, args.data.dataset_name, args.data.max_samples)
    held_out = read(args, loaded, args.data.eval_dataset_name, args.data.eval_max_samples) if args.data.eval_dataset_name else []
    batch_size = args.batch.per_device_train_batch_size * args.batch.gradient_accumulation_steps
    max_steps = num_steps(args.optim, len(segments), batch_size)
    tokens = sum(s.num_tokens for s in segments)
    if args.run.dry_run:
        return plan(
            loaded,
            args,
            max_steps=max_steps,
            num_records=len(segments),
            extra={"tokens a step": round(tokens * batch_size / len(segments))},
        )
    task = SupervisedTask(
        updater=build_updater(loaded, args, max_steps),
        segments=segments,
        eval_segments=held_out,
        order=DataOrder(len(segments), seed=args.run.seed, shuffle=args.data.shuffle),
        batch_size=batch_size,
        max_tokens_per_micro_batch=args.batch.max_tokens_per_micro_batch,
        cut=cut_of(row),
        engine=Engine(loaded.model, loaded.tokenizer),
        show_prompts=shown_prompts(held_out or segments, loaded.tokenizer),
        show_params=SamplingParams(n=1, temperature=0.0, max_tokens=64),
    )
    return execute(Job("Supervised fine-tuning", args, loaded, task, max_steps, resume))
