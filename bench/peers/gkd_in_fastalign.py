"""The fastalign side of the distillation comparison: the task that `fastalign distill` runs, step by step."""

from __future__ import annotations

from typing import Any


def train(options: dict[str, Any]) -> list[dict[str, float]]:
    """Loss and gradient norm of each step."""
    from fastalign.data import DataOrder
    from fastalign.generation import Engine
    from fastalign.recipes.distill import divergence_of, load_teacher, read
    from fastalign.recipes.distill_task import DistillTask, OnPolicy
    from fastalign.recipes.online import sampling_of
    from fastalign.recipes.setup import build_updater, load, seed_everything

    args = arguments(options)
    seed_everything(args.run.seed)
    loaded = load(args.model)
    teacher = load_teacher(args, loaded)
    prompts, segments = read(args, loaded)
    expected = [example["input_ids"] for example in options["examples"]]
    if [list(segment.ids) for segment in segments] != expected:
        raise RuntimeError("the sides read different tokens")
    task = DistillTask(
        updater=build_updater(loaded, args, options["max_steps"]),
        teacher=teacher,
        divergence=divergence_of(args),
        on_policy=OnPolicy(args.distill.lmbda, sampling_of(args), args.data.max_length, args.run.seed),
        engine=Engine(loaded.model, loaded.tokenizer),
        prompts=prompts,
        segments=segments,
        eval_segments=[],
        order=DataOrder(len(segments), seed=args.run.seed, shuffle=False),
        batch_size=2 * options["batch_size"],
        max_tokens_per_micro_batch=args.batch.max_tokens_per_micro_batch,
        show_prompts=[],
    )
    return [task.step(index) for index in range(options["max_steps"])]


def arguments(options: dict[str, Any]) -> Any:
    """What `fastalign distill` would get on its command line."""
    from fastalign.recipes import arguments as a

    return a.Arguments(
        command="distill",
        model=a.ModelArguments(model_name_or_path=options["model"], dtype=options["dtype"], device=options["device"]),
        data=a.DataArguments(dataset_name=options["data"], max_length=512, shuffle=False),
        optim=a.OptimArguments(learning_rate=options["learning_rate"], lr_scheduler_type="constant", max_steps=options["max_steps"]),
        batch=a.BatchArguments(per_device_train_batch_size=options["batch_size"], gradient_accumulation_steps=2),
        run=a.RunArguments(output_dir=options["output_dir"], seed=options["seed"]),
        distill=a.DistillArguments(teacher_model_name_or_path=options["teacher"], loss="jsd", jsd_beta=options["beta"], lmbda=0.0),
    )
