"""`fastalign dpo`: preference optimization from pairs."""

from __future__ import annotations

from typing import Any

from ..data import DataOrder, Pairs, pair_examples
from ..generation import Engine, SamplingParams
from ..losses.preference import PREFERENCE
from ..models.adapters import is_adapted
from ..models.backbone import head_of, within_positions
from .arguments import Arguments
from .pair_objective import PairObjective, objective_of
from .preference_task import PairData, PreferenceTask
from .preview import preview
from .reading import records_of
from .reference_cache import reference_logps
from .samples import readable
from .setup import Loaded, build_updater, check_output, load, num_steps, plan, seed_everything
from .training import Job, execute


def pairs_of(args: Arguments, loaded: Loaded, name: str | list[str], max_samples: int) -> Pairs:
    """The data set as token trees of pairs."""
    data = args.data
    return pair_examples(
        records_of(data, name, max_samples),
        loaded.tokenizer,
        max_length=within_positions(data.max_length, loaded.model),
        max_prompt_length=data.max_prompt_length,
        on_bad_record=data.on_bad_record,
        system_prompt=data.system_prompt,
        vocab_size=head_of(loaded.model).weight.shape[0],
    )


def check_columns(objective: PairObjective, name: str | list[str], pairs: Pairs) -> None:
    """Raises ValueError where the data have margins or probabilities that no row reads: they would be ignored in silence."""
    if pairs.margins is not None and not objective.reads_margin:
        readers = ", ".join(row for row, loss in PREFERENCE.items() if loss.margin)
        raise ValueError(
            f"{name} has a column 'margin', which --loss {' '.join(term.name for term in objective.terms)} does not read (these do: "
            f"{readers}); choose one of them, or rename the column, as in --dataset_map margin=strength"
        )
    if pairs.probabilities is not None and not objective.reads_probability:
        readers = ", ".join(row for row, loss in PREFERENCE.items() if loss.soft)
        raise ValueError(
            f"{name} has a column 'probability', which --loss {' '.join(term.name for term in objective.terms)} does not read: it takes "
            f"the place of --label_smoothing, with these losses: {readers}; choose them without --label_smoothing, or rename the column, "
            "as in --dataset_map probability=confidence"
        )


def records_read(args: Arguments, num_records: int, max_steps: int, batch_size: int) -> list[int]:
    """The records that the run will see, in the file's order: what the reference has to score."""
    order = DataOrder(num_records, seed=args.run.seed, shuffle=args.data.shuffle)
    if max_steps * batch_size >= num_records:
        return list(range(num_records))
    return sorted(set(order.next_batch(max_steps * batch_size)))


def with_reference(args: Arguments, loaded: Loaded, objective: PairObjective, *given: tuple[Pairs, list[int]]) -> list[PairData]:
    """Each data set with the reference's log-probs of the records that are used, where a row reads them."""
    if not objective.reads_reference:
        return [PairData(pairs.trees, pairs.margins, pairs.probabilities) for pairs, _ in given]
    groups = reference_logps(args, loaded, *([pairs.trees[i] for i in used] for pairs, used in given))
    ready = zip(given, groups, strict=True)
    return [
        PairData(pairs.trees, pairs.margins, pairs.probabilities, dict(zip(used, logps, strict=True))) for (pairs, used), logps in ready
    ]


def build_task(args: Arguments, loaded: Loaded, pairs: Pairs, held_out: Pairs, max_steps: int) -> PreferenceTask:
    """Reference log-probs, engine and updater around the loaded model."""
    objective, batch_size = objective_of(args), batch_size_of(args)
    used, every = records_read(args, len(pairs.trees), max_steps, batch_size), list(range(len(held_out.trees)))
    data, eval_data = with_reference(args, loaded, objective, (pairs, used), (held_out, every))
    return PreferenceTask(
        objective=objective,
        data=data,
        eval_data=eval_data,
        updater=build_updater(loaded, args, max_steps),
        order=DataOrder(len(pairs.trees), seed=args.run.seed, shuffle=args.data.shuffle),
        batch_size=batch_size,
        max_tokens_per_micro_batch=args.batch.max_tokens_per_micro_batch,
        engine=Engine(loaded.model, loaded.tokenizer),
        show_prompts=readable((tree.ids for tree in (held_out.trees or pairs.trees)), loaded.tokenizer),
        show_params=SamplingParams(n=1, temperature=0.0, max_tokens=64),
    )


def batch_size_of(args: Arguments) -> int:
    """Pairs an optimizer step."""
    return args.batch.per_device_train_batch_size * args.batch.gradient_accumulation_steps


def run(args: Arguments) -> dict[str, Any]:
    """Trains, and returns the summary (the plan under --dry_run)."""
    resume = check_output(args.run, args.data.eval_dataset_name)
    objective, batch_size = objective_of(args), batch_size_of(args)
    named = args.reference.ref_model_name_or_path
    if named and not objective.reads_reference:
        raise ValueError(f"--ref_model_name_or_path {named}: --loss {' '.join(args.preference.loss)} reads no reference; leave it out")
    seed_everything(args.run.seed)
    loaded = load(args.model)
    pairs = pairs_of(args, loaded, args.data.dataset_name, args.data.max_samples)
    check_columns(objective, args.data.dataset_name, pairs)
    held_out = Pairs([])
    if args.data.eval_dataset_name:
        held_out = pairs_of(args, loaded, args.data.eval_dataset_name, args.data.eval_max_samples)
        check_columns(objective, args.data.eval_dataset_name, held_out)
    max_steps = num_steps(args.optim, len(pairs.trees), batch_size)
    if args.run.dry_run:
        preview(pairs.trees, loaded.tokenizer)
        tokens = sum(tree.num_tokens for tree in pairs.trees)
        told = {"tokens a step": round(tokens * batch_size / len(pairs.trees)), **described(args, loaded, objective)}
        return plan(loaded, args, max_steps=max_steps, num_records=len(pairs.trees), extra=told)
    task = build_task(args, loaded, pairs, held_out, max_steps)
    names = " + ".join(term.name for term in objective.terms)
    return execute(Job(f"Preference optimization: {names}", args, loaded, task, max_steps, resume))


def described(args: Arguments, loaded: Loaded, objective: PairObjective) -> dict[str, str]:
    """What --dry_run says about the loss and its reference."""
    parts = [f"{term.weight:g} x {term.name} {dict(term.row.options) | dict(term.options)}" for term in objective.terms]
    named = args.reference.ref_model_name_or_path or ("the adapter off" if is_adapted(loaded.model) else "the model before training")
    phases = "two: a scoring pass over the batch first" if any(term.in_two_phases for term in objective.terms) else "one"
    return {
        "loss": " + ".join(parts),
        "reference": f"{named}, scored once" if objective.reads_reference else "none",
        "forward passes a step": phases,
    }
