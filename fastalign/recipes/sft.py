"""`fastalign sft`: supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.ranked import Ranked
from ..generation import Engine, SamplingParams
from ..losses.sft import supervised_loss
from ..packing import Segment
from .arguments import Arguments
from .preview import preview
from .setup import build_updater, check_output, load, num_steps, plan, seed_everything
from .sft_data import examples, ordered, parts_of, streamed
from .sft_task import SupervisedTask, cut_of
from .training import Job, execute

NUM_SHOWN = 4

__all__ = ["examples", "prompt_of", "run", "shown_prompts"]


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
    found, order = (streamed if args.data.streaming else ordered)(args, loaded, row)
    held_out: list[Any] = []
    if args.data.eval_dataset_name:
        held_out = [e for part in parts_of(args, loaded, args.data.eval_dataset_name, args.data.eval_max_samples, row) for e in part]
    batch_size = args.batch.per_device_train_batch_size * args.batch.gradient_accumulation_steps
    max_steps = num_steps(args.optim, len(found), batch_size)
    if args.run.dry_run:
        preview([example.segment if isinstance(example, Ranked) else example for example in found], loaded.tokenizer)
        extra: dict[str, Any] = {"tokens a step": round(sum(e.num_tokens for e in found) * batch_size / len(found))}
        extra |= {"records": f"streamed, in windows of {args.data.stream_window}"} if args.data.streaming else {}
        return plan(loaded, args, max_steps=max_steps, num_records=len(found), extra=extra)
    task = SupervisedTask(
        updater=build_updater(loaded, args, max_steps),
        segments=[] if args.data.streaming else found,
        eval_segments=held_out,
        order=order,
        batch_size=batch_size,
        max_tokens_per_micro_batch=args.batch.max_tokens_per_micro_batch,
        cut=cut_of(row),
        engine=Engine(loaded.model, loaded.tokenizer),
        show_prompts=shown_prompts(held_out or found, loaded.tokenizer),
        show_params=SamplingParams(n=1, temperature=0.0, max_tokens=64),
    )
    return execute(Job("Supervised fine-tuning", args, loaded, task, max_steps, resume))
