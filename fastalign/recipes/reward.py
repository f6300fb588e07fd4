"""`fastalign reward`: reward models from pairs, rankings, outcomes, steps and grades."""

from __future__ import annotations

import math
from typing import Any

from ..catalogue import REWARD_LOSSES, nearest
from ..data import DataOrder, Judged
from ..losses.reward import AGGREGATIONS, REWARD
from ..models.adapters import attach_lora
from ..models.backbone import causal_lm, within_positions
from ..models.load import load_tokenizer
from ..models.reward import load_reward_model, note
from .arguments import Arguments, ModelArguments
from .preview import preview
from .reading import records_of
from .reward_task import RewardObjective, RewardTask
from .setup import Loaded, build_updater, check_output, num_steps, pick_device, plan, seed_everything
from .training import Job, execute

PER_RECORD = {"margin": 0.0, "probability": 1.0}  # options of a row that come with the data, a number a ranking; where a record has none


def objective_of(args: Arguments) -> RewardObjective:
    """The row that --loss names, with its options.

    Raises:
        ValueError: an unknown row, or an option that the row does not read.
    """
    given = args.reward
    if given.loss not in REWARD:
        raise ValueError(f"--loss: {nearest(given.loss, REWARD_LOSSES)}")
    row = REWARD[given.loss]
    options = dict(args.loss_options)
    for name in options:
        if name not in row.options or name in PER_RECORD:
            raise ValueError(f"--loss.{name}: the loss {given.loss!r} has no such argument")
    if given.center_rewards_coefficient:
        if "center_rewards_coefficient" not in row.options:
            able = [name for name, other in REWARD.items() if "center_rewards_coefficient" in other.options]
            raise ValueError(f"--center_rewards_coefficient: the loss {given.loss!r} is not centred; {', '.join(able)} can be")
        options["center_rewards_coefficient"] = given.center_rewards_coefficient
    if given.attributes and row.reads != "attributes":
        raise ValueError(f"--attributes: the loss {given.loss!r} reads none; give --loss attributes")
    if given.step_aggregation not in AGGREGATIONS:
        raise ValueError(f"--step_aggregation: {nearest(given.step_aggregation, AGGREGATIONS)}")
    return RewardObjective(row, options, attributes_of(args) if row.reads == "attributes" else {})


def attributes_of(args: Arguments) -> dict[str, float]:
    """--attributes: names, and what each grade counts in the reward (1 where it is not said).

    Raises:
        ValueError: none, one twice, or a weight that is no number.
    """
    found: dict[str, float] = {}
    for each in args.reward.attributes:
        name, _, weight = each.partition("=")
        try:
            number = float(weight or 1.0)
        except ValueError:
            number = math.nan
        if not name or name in found or not math.isfinite(number):
            raise ValueError(f"--attributes {each!r}: expected NAME or NAME=WEIGHT, each name once and the weight a number")
        found[name] = number
    if not found:
        raise ValueError("--loss attributes: name the columns that hold the grades, as in --attributes helpfulness=0.65 verbosity=-0.4")
    return found


def load(args: Arguments, objective: RewardObjective) -> Loaded:
    """The reward model (begun from a causal language model where the name is one's), its tokenizer and device."""
    given = args.model
    if not given.model_name_or_path:
        raise ValueError("--model_name_or_path is required: a local folder in Hugging Face format, or a Hub name")
    device = pick_device(given.device)
    tokenizer = load_tokenizer(given.tokenizer_name_or_path or given.model_name_or_path, given.chat_template)
    options: dict[str, Any] = {"dtype": given.dtype, "device": device, "start": True, "attributes": objective.attributes}
    model: Any = load_reward_model(given.model_name_or_path, tokenizer, **options)
    if objective.row.reads == "steps":  # how its scores are to be read goes with the model
        note(model, tokenizer, step_separator=separator_of(args), step_aggregation=args.reward.step_aggregation)
    if given.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if given.load_in_4bit:
        raise ValueError("--load_in_4bit: a reward model's base stays whole; leave it out, --dtype bfloat16 halves it")
    method = given.peft_method or ("lora" if given.use_peft else "")
    if method:
        model = attach_to_scores(model, given, method)
    model.train()
    return Loaded(model, tokenizer, device)


def attach_to_scores(model: Any, given: ModelArguments, method: str) -> Any:
    """A LoRA adapter on the backbone; the score head beside it is trained as it is.

    Raises:
        ValueError: a method that is no kind of LoRA.
    """
    kinds = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
    if method not in kinds:
        raise ValueError(f"--peft_method {method}: a reward model takes {', '.join(kinds)}")
    targets = given.lora_target_modules or "all-linear"
    return attach_lora(model, r=given.lora_r, alpha=given.lora_alpha, target_modules=targets, task_type="SEQ_CLS", **kinds[method])


def separator_of(args: Arguments) -> str:
    r"""--step_separator, with \n and \t as a shell passes them."""
    return args.reward.step_separator.replace("\\n", "\n").replace("\\t", "\t")


def examples(args: Arguments, loaded: Loaded, objective: RewardObjective, name: str | list[str], max_samples: int) -> list[Judged]:
    """The data set as what the loss reads.

    Raises:
        ValueError: the records have margins or probabilities, and the loss reads none.
    """
    data = args.data
    base = causal_lm(loaded.model)
    options: dict[str, Any] = {"separator": separator_of(args)} if objective.row.reads == "steps" else {}
    if objective.attributes:
        options["attributes"] = list(objective.attributes)
    found = objective.reading.examples(
        records_of(data, name, max_samples),
        loaded.tokenizer,
        max_length=within_positions(data.max_length, loaded.model),
        on_bad_record=data.on_bad_record,
        system_prompt=data.system_prompt,
        vocab_size=base.get_input_embeddings().weight.shape[0],
        pad_token_id=base.config.get_text_config().pad_token_id,
        **options,
    )
    for column, absent in PER_RECORD.items():
        if column not in objective.row.options and any(getattr(example, column) != absent for example in found):
            able = ", ".join(other for other, row in REWARD.items() if column in row.options)
            raise ValueError(
                f"{name} has a column {column!r}, which --loss {args.reward.loss} does not read ({able} does); choose another loss, or "
                f"rename the column, as in --dataset_map {column}=unread"
            )
    return found


def run(args: Arguments) -> dict[str, Any]:
    """Trains, and returns the summary (the plan under --dry_run). With --max_steps 0 it evaluates and trains nothing."""
    objective = objective_of(args)
    only_evaluates = args.optim.max_steps == 0
    held_out_name = args.data.eval_dataset_name or (args.data.dataset_name if only_evaluates else "")
    resume = check_output(args.run, held_out_name)
    seed_everything(args.run.seed)
    loaded = load(args, objective)
    found = examples(args, loaded, objective, args.data.dataset_name, args.data.max_samples)
    held_out = examples(args, loaded, objective, held_out_name, args.data.eval_max_samples) if held_out_name else []
    batch_size = args.batch.per_device_train_batch_size * args.batch.gradient_accumulation_steps
    max_steps = 0 if only_evaluates else num_steps(args.optim, len(found), batch_size)
    if args.run.dry_run:
        preview([example.tree for example in found], loaded.tokenizer)
        tokens = sum(example.tree.num_tokens for example in found)
        extra = {"tokens a step": round(tokens * batch_size / len(found)), "loss": args.reward.loss}
        return plan(loaded, args, max_steps=max_steps, num_records=len(found), extra=extra)
    task = RewardTask(
        updater=build_updater(loaded, args, max_steps),
        objective=objective,
        examples=found,
        eval_examples=held_out,
        order=DataOrder(len(found), seed=args.run.seed, shuffle=args.data.shuffle),
        batch_size=batch_size,
        max_tokens_per_micro_batch=args.batch.max_tokens_per_micro_batch,
        tokenizer=loaded.tokenizer,
    )
    return execute(Job("Reward model", args, loaded, task, max_steps, resume))
