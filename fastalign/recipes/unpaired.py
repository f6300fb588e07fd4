"""`fastalign kto`: preference optimization from completions that are desirable or not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..data import Completions, DataOrder, labelled_examples, partners
from ..generation import Engine, SamplingParams
from ..models.adapters import is_adapted
from ..models.backbone import head_of, within_positions
from .arguments import Arguments
from .label_objective import LabelObjective, objective_of
from .preference import batch_size_of, records_read
from .preview import NUM_TREES, preview
from .reading import records_of
from .reference_cache import reference_logps
from .samples import readable
from .setup import Loaded, build_updater, check_output, load, num_steps, plan, seed_everything
from .training import Job, execute
from .unpaired_task import LabelledData, UnpairedTask

log = logging.getLogger("fastalign")


def completions_of(args: Arguments, loaded: Loaded, name: str | list[str], max_samples: int) -> Completions:
    """The data set as labelled completions."""
    data = args.data
    return labelled_examples(
        records_of(data, name, max_samples),
        loaded.tokenizer,
        max_length=within_positions(data.max_length, loaded.model),
        max_prompt_length=data.max_prompt_length,
        on_bad_record=data.on_bad_record,
        system_prompt=data.system_prompt,
        vocab_size=head_of(loaded.model).weight.shape[0],
    )


def with_reference(
    args: Arguments, loaded: Loaded, objective: LabelObjective, *given: tuple[Completions, Sequence[int]]
) -> list[LabelledData]:
    """Each data set with the reference's log-probs of the records that are used, and of their mismatched pairs where the row reads them."""
    far = [
        mismatched_pairs(found, used, args.batch.per_device_train_batch_size) if objective.reads_mismatched else {} for found, used in given
    ]
    own_trees = [[found.tree(i) for i in used] for found, used in given]
    far_trees = [[found.behind(i, other) for i, other in pairs.items()] for (found, _), pairs in zip(given, far, strict=True)]
    logps = reference_logps(args, loaded, *own_trees, *far_trees)
    ready = zip(given, far, logps[: len(given)], logps[len(given) :], strict=True)
    return [
        LabelledData(found, dict(zip(used, own, strict=True)), pairs, dict(zip(pairs, mismatched, strict=True)))
        for (found, used), pairs, own, mismatched in ready
    ]


def mismatched_pairs(found: Completions, used: Sequence[int], window: int) -> dict[int, int]:
    """For each record that is used the one whose completion it is paired with, where there is one."""
    everyone = partners(found.prompts, window)
    pairs = {i: other for i in used if (other := everyone[i]) is not None}
    if used and not pairs:
        log.warning("all prompts are equal: there is no mismatched pair, and the KL to the reference is taken to be 0")
    return pairs


def check_labels(name: str | list[str], found: Completions) -> None:
    """Says when the data have one kind of completions alone: the loss then only pushes one way."""
    good = sum(found.labels)
    if good in (0, len(found.labels)):
        log.warning("%s: all %d completions have label %s; KTO learns from both kinds", name, len(found.labels), bool(good))


def build_task(args: Arguments, loaded: Loaded, found: Completions, held_out: Completions, max_steps: int) -> UnpairedTask:
    """Reference log-probs, engine and updater around the loaded model."""
    objective, batch_size = objective_of(args), batch_size_of(args)
    used, every = records_read(args, len(found.labels), max_steps, batch_size), range(len(held_out.labels))
    data, eval_data = with_reference(args, loaded, objective, (found, used), (held_out, every))
    return UnpairedTask(
        objective=objective,
        data=data,
        eval_data=eval_data,
        updater=build_updater(loaded, args, max_steps),
        order=DataOrder(len(found.labels), seed=args.run.seed, shuffle=args.data.shuffle),
        batch_size=batch_size,
        max_tokens_per_micro_batch=args.batch.max_tokens_per_micro_batch,
        engine=Engine(loaded.model, loaded.tokenizer),
        show_prompts=readable(held_out.prompts or found.prompts, loaded.tokenizer),
        show_params=SamplingParams(n=1, temperature=0.0, max_tokens=64),
    )


def run(args: Arguments) -> dict[str, Any]:
    """Trains, and returns the summary (the plan under --dry_run)."""
    resume = check_output(args.run, args.data.eval_dataset_name)
    objective, batch_size = objective_of(args), batch_size_of(args)
    seed_everything(args.run.seed)
    loaded = load(args.model)
    found = completions_of(args, loaded, args.data.dataset_name, args.data.max_samples)
    check_labels(args.data.dataset_name, found)
    held_out = Completions([], [], [])
    if args.data.eval_dataset_name:
        held_out = completions_of(args, loaded, args.data.eval_dataset_name, args.data.eval_max_samples)
    max_steps = num_steps(args.optim, len(found.labels), batch_size)
    if args.run.dry_run:
        preview([found.tree(i) for i in range(min(NUM_TREES, len(found.labels)))], loaded.tokenizer)
        tokens = sum(found.tree(i).num_tokens for i in range(len(found.labels)))
        told = {"tokens a step": round(tokens * batch_size / len(found.labels)), **described(args, loaded, objective, found)}
        return plan(loaded, args, max_steps=max_steps, num_records=found.num_records, extra=told)
    task = build_task(args, loaded, found, held_out, max_steps)
    return execute(Job(f"Unpaired preference optimization: {objective.name}", args, loaded, task, max_steps, resume))


def described(args: Arguments, loaded: Loaded, objective: LabelObjective, found: Completions) -> dict[str, str]:
    """What --dry_run says about the loss and its data."""
    named = args.reference.ref_model_name_or_path or ("the adapter off" if is_adapted(loaded.model) else "the model before training")
    return {
        "completions": f"{sum(found.labels)} desirable, {len(found.labels) - sum(found.labels)} undesirable",
        "loss": f"{objective.name} {dict(objective.row.options) | dict(objective.options)}",
        "reference": f"{named}, scored once",
        "forward passes a step": "two: a scoring pass first" if objective.in_two_phases else "one",
    }
