"""The part that every training command shares once its task is built: resume, loop, save, report."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import nn

from ..models.adapters import merged
from ..training.checkpoint import Checkpoint, Companion, load_checkpoint, restore_rng, save_checkpoint
from ..training.files import write_atomic
from ..training.interrupt import interruptible
from ..training.loop import Cadence, StopAt, Task, run
from ..training.metrics import Metrics, read_metrics
from ..training.report import write_report
from ..training.step import Updater
from ..training.weights import restore_weights, save_model
from .arguments import Arguments
from .setup import Loaded

log = logging.getLogger("fastalign")
SAMPLES = "samples_before.json"
# flags that say how far, where and how a run is told of, not what it learns
FREE = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run", "max_steps", "num_train_epochs", "stop_at", "device"}
FREE |= {"save_steps", "save_total_limit", "eval_steps", "logging_steps", "report_to", "run_name", "config"}


class TrainTask(Task, Protocol):
    """A task that can be saved and shows samples."""

    updater: Updater

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def show(self) -> list[dict[str, Any]]:
        """A few samples: prompt, completion, and what is worth telling about them."""


@dataclass(frozen=True)
class Job:
    """A training command about to run.

    Attributes:
        companions: models that are trained beside the main one, by name: each is saved and restored in a folder of its own.
    """

    title: str
    args: Arguments
    loaded: Loaded
    task: TrainTask
    max_steps: int
    resume: Path | None
    companions: Mapping[str, tuple[Updater, Any]] = field(default_factory=dict)  # name → (updater, tokenizer)


def restore(job: Job) -> Checkpoint | None:
    """Puts model, optimizer, schedule and data order back; returns the checkpoint to go on from, where there is one."""
    if job.resume is None:
        return None
    saved: Checkpoint = load_checkpoint(job.resume)
    if changed := changed_flags(job.args, saved.path.parent / "config.yaml"):
        log.warning("%s was written with other %s; the run goes on with what is given now", saved.path, ", ".join(changed))
    if set(saved.companions) != set(job.companions):
        had = ", ".join(saved.companions) or "no other model"
        raise ValueError(
            f"{saved.path} was written by another command: it has {had} beside the policy; resume with the command that wrote it"
        )
    restore_updater(job.task.updater, job.loaded.model, saved.path, saved.optimizer_state, saved.scheduler_state)
    for beside, (updater, _) in job.companions.items():
        own = saved.companions[beside]
        restore_updater(updater, updater.model, saved.path / beside, own["optimizer"], own["scheduler"])
    job.task.load_state_dict(saved.data_state)
    return saved


def changed_flags(args: Arguments, config: Path) -> list[str]:
    """The flags that a run began with otherwise, of those that say what it learns; none where its config.yaml is gone."""
    if not config.exists():
        return []
    known, given = (yaml.safe_load(text) or {} for text in (config.read_text(encoding="utf-8"), yaml.safe_dump(args.flat())))
    return sorted(name for name, value in given.items() if name not in FREE and name in known and known[name] != value)


def restore_updater(updater: Updater, model: nn.Module, folder: Path, optimizer_state: dict, scheduler_state: dict) -> None:
    """Puts one model's weights, optimizer and schedule back.

    Raises:
        ValueError: the flags ask for another optimizer than the saved one.
    """
    restore_weights(model, folder)
    given = optimizer_options(updater.optimizer)
    updater.optimizer.load_state_dict(optimizer_state)
    for name, value in optimizer_options(updater.optimizer).items():
        if value != given[name]:
            raise ValueError(f"a resumed run goes on as it was: {name} was {value}, now it is {given[name]}; start a new run to change it")
    updater.schedule.load_state_dict(scheduler_state)


def optimizer_options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the flags set: peak learning rate, betas, eps, weight decay."""
    options = optimizer.param_groups[0]
    return {"learning_rate": options["initial_lr"], **{name: options[name] for name in ("betas", "eps", "weight_decay")}}


def execute(job: Job) -> dict[str, Any]:
    """Runs the job to its end and returns the summary, which is also in summary.json.

    Raises:
        KeyboardInterrupt: after an interrupt, once a checkpoint is saved.
    """
    args, output_dir = job.args, Path(job.args.run.output_dir)
    if job.resume is None:
        clear(output_dir)
    run_args, saved = args.run, restore(job)  # a checkpoint that does not fit leaves the folder as it is
    metrics = Metrics(
        output_dir,
        report_to=run_args.report_to,
        run_name=run_args.run_name,
        config=args.flat(),
        total_steps=job.max_steps,
        logging_steps=run_args.logging_steps,
    )
    with closing(metrics), interruptible() as interrupt:
        start = 0
        if saved is not None:
            start = saved.step
            metrics.resume(start, saved.extra["metrics"])
            restore_rng(saved.rng)
        before = job.task.show() if start == 0 else read_samples(output_dir)
        write_atomic(output_dir / SAMPLES, json.dumps(before))
        cadence = Cadence(job.max_steps, run_args.save_steps, run_args.eval_steps, StopAt.parse(run_args.stop_at))
        if not run(job.task, cadence, metrics, interrupt, start=start, save=lambda step: save(job, metrics, step)):
            raise KeyboardInterrupt(f"stopped; go on with --output_dir {output_dir} --resume_from_checkpoint latest")
        final = merged(job.loaded.model) if args.model.merge_adapter else job.loaded.model
        save_model(output_dir, final, job.loaded.tokenizer)
        del final
        for name, (updater, tokenizer) in job.companions.items():
            (output_dir / name).mkdir(exist_ok=True)
            save_model(output_dir / name, updater.model, tokenizer)
        summary = summarize(metrics.rows())
        metrics.summary(summary)
    after = job.task.show()
    samples = [compared(b, a) for b, a in zip(before, after, strict=False)]
    write_atomic(output_dir / "samples.json", json.dumps(samples))
    write_report(output_dir, title=job.title, config=args.flat(), metrics=read_metrics(output_dir), summary=summary, samples=samples)
    return summary


def compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """One prompt's completions before and after training, and whatever else the task tells about each."""
    told = {
        f"{name} {when}": shown[name]
        for when, shown in (("before", before), ("after", after))
        for name in shown.keys() - {"prompt", "completion"}
    }
    return {"prompt": after["prompt"], "before": before["completion"], "after": after["completion"], **told}


def save(job: Job, metrics: Metrics, step: int) -> Path:
    """Writes checkpoint-`step` with everything that a bit-exact continuation needs."""
    updater = job.task.updater
    return save_checkpoint(
        job.args.run.output_dir,
        step,
        model=job.loaded.model,
        tokenizer=job.loaded.tokenizer,
        optimizer_state=updater.optimizer.state_dict(),
        scheduler_state=updater.schedule.state_dict(),
        data_state=job.task.state_dict(),
        extra={"metrics": metrics.state_dict()},
        save_total_limit=job.args.run.save_total_limit,
        companions={
            name: Companion(other.model, tokenizer, other.optimizer.state_dict(), other.schedule.state_dict())
            for name, (other, tokenizer) in job.companions.items()
        },
    )


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of every metric, and the first and last of the held-out ones."""
    summary: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("eval/"):
                summary.setdefault(f"{name}/before", value)
            summary[name] = value
    return summary


def clear(output_dir: Path) -> None:
    """Removes an earlier run's rows and checkpoints; only reached when there is none or overwriting was asked for."""
    for path in [output_dir / "metrics.jsonl", output_dir / "summary.json", output_dir / SAMPLES]:
        path.unlink(missing_ok=True)
    for path in output_dir.glob("checkpoint-*"):
        shutil.rmtree(path)


def read_samples(output_dir: Path) -> list[dict[str, Any]]:
    path = output_dir / SAMPLES
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
