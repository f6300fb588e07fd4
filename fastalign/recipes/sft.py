"""`fastalign sft`: supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from ..data import DataOrder, MixtureOrder, SegmentStream, load_parts, parse_dataset_map, sft_examples
from ..data.examples import Limits
from ..data.stream import reader, supervised_encoding
from ..generation import Engine, SamplingParams
from ..models.backbone import head_of
from ..packing import Segment
from .arguments import Arguments
from .preview import preview
from .setup import Loaded, build_updater, check_output, load, num_steps, plan, seed_everything
from .sft_task import SupervisedTask
from .training import Job, execute

NUM_SHOWN = 4
NUM_SAMPLED = 16  # records of a stream that are looked at before it is trained on


def examples(args: Arguments, loaded: Loaded, name: str | list[str], max_samples: int) -> list[Segment]:
    """The data set, or several one behind the other, as tokenized, masked segments."""
    return [segment for part in parts_of(args, loaded, name, max_samples) for segment in part]


def parts_of(args: Arguments, loaded: Loaded, name: str | list[str], max_samples: int) -> list[list[Segment]]:
    """Each data set as tokenized, masked segments; each has a format of its own."""
    data = args.data
    names, columns = [name] if isinstance(name, str) else name, parse_dataset_map(data.dataset_map)
    return [
        sft_examples(
            records,
            loaded.tokenizer,
            max_length=data.max_length,
            on_bad_record=data.on_bad_record,
            system_prompt=data.system_prompt,
            vocab_size=head_of(loaded.model).weight.shape[0],
        ).segments
        for records in load_parts(names, split=data.dataset_split, columns=columns, max_samples=max_samples)
    ]


def segments_of(args: Arguments, loaded: Loaded) -> tuple[list[Segment], DataOrder | MixtureOrder]:
    """The training data and the order of it: of all together, or by weight where weights are given."""
    parts = parts_of(args, loaded, args.data.dataset_name, args.data.max_samples)
    segments = [segment for part in parts for segment in part]
    if args.data.dataset_weights:
        weights = args.data.dataset_weights
        return segments, MixtureOrder([len(part) for part in parts], weights, seed=args.run.seed, shuffle=args.data.shuffle)
    return segments, DataOrder(len(segments), seed=args.run.seed, shuffle=args.data.shuffle)


def stream_of(args: Arguments, loaded: Loaded) -> tuple[list[Segment], SegmentStream]:
    """The first training records, to be shown, and the stream of all.

    Raises:
        ValueError: without --max_steps, or with weights.
    """
    data = args.data
    if args.optim.max_steps < 1:
        raise ValueError("--streaming: how many records there are is not known before they are read; give --max_steps")
    if data.dataset_weights:
        raise ValueError("--streaming reads the data sets one behind the other; --dataset_weights needs them in memory")
    names = [data.dataset_name] if isinstance(data.dataset_name, str) else data.dataset_name
    read = reader(names, split=data.dataset_split, columns=parse_dataset_map(data.dataset_map), max_samples=data.max_samples)
    limits = Limits(data.max_length, "--max_length", head_of(loaded.model).weight.shape[0])
    encode, again = (
        supervised_encoding(read, loaded.tokenizer, limits, on_bad_record=data.on_bad_record, system_prompt=data.system_prompt)
        for _ in range(2)
    )
    stream = SegmentStream(read, encode, window=data.stream_window, seed=args.run.seed, shuffle=data.shuffle)
    return SegmentStream(read, again, window=NUM_SAMPLED, shuffle=False).next_batch(NUM_SAMPLED), stream


def shown_prompts(segments: list[Segment], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """What precedes the first scored token of a few segments: prompts whose completion can be compared before and after."""
    prompts = []
    for segment in segments:
        flags = [segment.scored] * len(segment.ids) if isinstance(segment.scored, bool) else list(segment.scored)
        start = flags.index(True) if True in flags else 0
        if start > 0:
            ids = list(segment.ids[:start])
            prompts.append((tokenizer.decode(ids, skip_special_tokens=True), ids))
        if len(prompts) == NUM_SHOWN:
            break
    return prompts


def run(args: Arguments) -> dict[str, Any]:
    """Trains, and returns the summary (the plan under --dry_run)."""
    resume = check_output(args.run, args.data.eval_dataset_name)
    seed_everything(args.run.seed)
    loaded = load(args.model)
    segments, order = stream_of(args, loaded) if args.data.streaming else segments_of(args, loaded)
    held_out = examples(args, loaded, args.data.eval_dataset_name, args.data.eval_max_samples) if args.data.eval_dataset_name else []
    batch_size = args.batch.per_device_train_batch_size * args.batch.gradient_accumulation_steps
    max_steps = num_steps(args.optim, len(segments), batch_size)
    if args.run.dry_run:
        preview(segments, loaded.tokenizer)
        tokens = sum(s.num_tokens for s in segments)
        extra: dict[str, Any] = {"tokens a step": round(tokens * batch_size / len(segments))}
        extra |= {"records": f"streamed, in windows of {args.data.stream_window}"} if args.data.streaming else {}
        return plan(loaded, args, max_steps=max_steps, num_records=len(segments), extra=extra)
    task = SupervisedTask(
        updater=build_updater(loaded, args, max_steps),
        segments=[] if args.data.streaming else segments,
        eval_segments=held_out,
        order=order,
        batch_size=batch_size,
        max_tokens_per_micro_batch=args.batch.max_tokens_per_micro_batch,
        engine=Engine(loaded.model, loaded.tokenizer),
        show_prompts=shown_prompts(held_out or segments, loaded.tokenizer),
        show_params=SamplingParams(n=1, temperature=0.0, max_tokens=64),
    )
    return execute(Job("Supervised fine-tuning", args, loaded, task, max_steps, resume))
