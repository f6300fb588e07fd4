"""What the tests of online learning share: a task, arguments, a built task, and the check that a broken-off run goes on to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preference_runs import rows_of
from tiny_models import write_arithmetic_model

from fastalign.recipes import arithmetic, online
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OnlineArguments,
    OptimArguments,
    RunArguments,
    SamplingArguments,
)
from fastalign.recipes.setup import load, seed_everything


def write_task(root: Path, rewards: str) -> Path:
    """A tiny model, 24 problems, and reward.py with these functions."""
    write_arithmetic_model(root / "model")
    (train,) = arithmetic.problems(0)
    arithmetic.write_jsonl(root / "train.jsonl", train[:24], ("prompt", "answer"))
    (root / "reward.py").write_text(rewards)
    return root


def online_arguments(task: Path, output: Path, changes: dict[str, dict[str, Any]], *, command: str = "grpo", **given: Any) -> Arguments:
    """Four steps of the command; `given` replaces whole sections, `changes` fields of them."""
    sections: dict[str, Any] = {
        "model": ModelArguments(model_name_or_path=str(task / "model"), dtype="float32", device="cpu"),
        "data": DataArguments(dataset_name=str(task / "train.jsonl"), max_length=48),
        "optim": OptimArguments(learning_rate=1e-3, max_steps=4, lr_scheduler_type="constant"),
        "batch": BatchArguments(per_device_train_batch_size=8),
        "run": RunArguments(output_dir=str(output)),
        "sampling": SamplingArguments(max_completion_length=6),
        "online": OnlineArguments(num_generations=4),
    }
    args = Arguments(command=command, **(sections | given))
    return replace(args, **{name: replace(getattr(args, name), **values) for name, values in changes.items()})


def built(args: Arguments) -> Any:
    """The task that the arguments make, before its first step."""
    seed_everything(0)
    loaded = load(args.model)
    prompts, held_out = online.both_prompts(args, loaded)
    return online.build_task(args, loaded, prompts, held_out, 4)


def assert_resumes_to_the_bit(
    run: Callable[[Arguments], Any],
    args: Arguments,
    folder: Path,
    models: Sequence[str] = (".",),
    checkpoint: str = "checkpoint-2",
    weights: str = "model.safetensors",
) -> RunArguments:
    """Runs whole, and again from a checkpoint: the same metrics and the same weights; the arguments of the second run.

    Args:
        args: with save_steps.
        models: folders in output_dir that hold one each.
        weights: the file of each that is compared.
    """
    whole, part = folder / "whole", folder / "part"
    run(replace(args, run=replace(args.run, output_dir=str(whole))))
    shutil.copytree(whole, part)
    (part / "summary.json").unlink()
    for model in models:
        (part / model / weights).unlink()
    again = replace(args.run, output_dir=str(part), resume_from_checkpoint=str(part / checkpoint))
    run(replace(args, run=again))
    assert rows_of(part) == rows_of(whole)
    for model in models:
        assert (part / model / weights).read_bytes() == (whole / model / weights).read_bytes()
    return again
