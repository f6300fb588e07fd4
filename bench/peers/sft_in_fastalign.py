"""The fastalign side of the SFT comparison: the task that `fastalign sft` runs, step by step."""

from __future__ import annotations

from typing import Any

from .turns import Gate


def side(gate: Gate, options: dict[str, Any]) -> None:
    """Builds the task, then runs one optimizer step a turn."""
    from fastalign.data import DataOrder
    from fastalign.losses.sft import supervised_loss
    from fastalign.packing import pack
    from fastalign.recipes.setup import build_updater, load, seed_everything
    from fastalign.recipes.sft import examples
    from fastalign.recipes.sft_task import SupervisedTask, cut_of

    from .memory import PeakMemory, states_mib

    memory = PeakMemory(options["device"])
    args = arguments(options)
    seed_everything(args.run.seed)
    loaded = load(args.model)
    segments = examples(args, loaded, args.data.dataset_name, 0)
    task = SupervisedTask(
        updater=build_updater(loaded, args, options["max_steps"]),
        segments=segments,
        eval_segments=[],
        order=DataOrder(len(segments), seed=args.run.seed, shuffle=False),
        batch_size=options["batch_size"],
        max_tokens_per_micro_batch=args.batch.max_tokens_per_micro_batch,
        cut=cut_of(supervised_loss(args.supervised.loss)),
    )
    gate.ready(states_mib=states_mib(loaded.model, reference=False), imports_mib=memory.imports_mib)
    for index in range(options["max_steps"]):
        gate.wait()
        memory.reset()
        metrics = task.step(index)
        times, peak = gate.elapsed(), memory.peak_mib()
        batch = segments[index * options["batch_size"] :][: options["batch_size"]]
        gate.report(
            **times,
            peak_mib=peak,
            loss=metrics["loss"],
            grad_norm=metrics["grad_norm"],
            tokens=metrics["num_tokens"],
            scored=sum(pack(segment).num_targets for segment in batch),
            computed=metrics["num_tokens"],
        )


def arguments(options: dict[str, Any]) -> Any:
    """What `fastalign sft` would get on its command line."""
    from fastalign.recipes import arguments as a

    return a.Arguments(
        command="sft",
        model=a.ModelArguments(
            model_name_or_path=options["model"],
            tokenizer_name_or_path=options["tokenizer"],
            dtype=options["dtype"],
            device=options["device"],
        ),
        data=a.DataArguments(dataset_name=options["data"], max_length=options["max_length"], shuffle=False),
        optim=a.OptimArguments(learning_rate=options["learning_rate"], lr_scheduler_type="constant", max_steps=options["max_steps"]),
        batch=a.BatchArguments(per_device_train_batch_size=options["batch_size"]),
        run=a.RunArguments(output_dir=options["output_dir"], seed=options["seed"]),
        supervised=a.SupervisedArguments(loss=options["loss"]),
    )
