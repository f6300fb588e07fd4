"""The fastalign side of the DPO comparison: the task that `fastalign dpo` runs, step by step."""

from __future__ import annotations

import time
from typing import Any

from .turns import Gate


def side(gate: Gate, options: dict[str, Any]) -> None:
    """Scores the reference, builds the task, then runs one optimizer step a turn."""
    from fastalign.data import Pairs
    from fastalign.packing import pack, sequences
    from fastalign.recipes.preference import build_task, pairs_of
    from fastalign.recipes.setup import load, seed_everything

    from .memory import PeakMemory, states_mib

    memory = PeakMemory(options["device"])
    args = arguments(options)
    seed_everything(args.run.seed)
    loaded = load(args.model)
    pairs = pairs_of(args, loaded, args.data.dataset_name, 0)
    began = time.perf_counter()
    task = build_task(args, loaded, pairs, Pairs([]), options["max_steps"])
    preparation = time.perf_counter() - began
    gate.ready(states_mib=states_mib(loaded.model, reference=False), imports_mib=memory.imports_mib, preparation_s=preparation)
    for index in range(options["max_steps"]):
        gate.wait()
        memory.reset()
        metrics = task.step(index)
        times, peak = gate.elapsed(), memory.peak_mib()
        batch = pairs.trees[index * options["batch_size"] :][: options["batch_size"]]
        tokens = sum(len(ids) for tree in batch for ids in sequences(pack(tree)))
        gate.report(
            **times,
            peak_mib=peak,
            loss=metrics["loss"],
            margin=metrics["rewards/margins"],
            tokens=tokens,
            computed=metrics["num_tokens"],
        )


def arguments(options: dict[str, Any]) -> Any:
    """What `fastalign dpo` would get on its command line."""
    from fastalign.recipes import arguments as a
    from fastalign.recipes.offline_arguments import ReferenceArguments

    return a.Arguments(
        command="dpo",
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
        reference=ReferenceArguments(ref_model_name_or_path=options["reference"], reference_cache="none"),
    )
