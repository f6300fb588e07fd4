"""The part that every training command shares once its task is built: resume, loop, save, report."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..models.adapters import merged
from ..training.checkpoint import Checkpoint, load_checkpoint, restore_rng, save_checkpoint
from ..training.files import write_atomic
from ..training.interrupt import interruptible
from ..training.loop import Cadence, StopAt, Task, run
from ..training.metrics import Metrics, read_metrics
from ..training.report import write_report
from ..training.step import Updater
from ..training.weights import restore_weights, save_model
from .arguments import Arguments
from .setup import Loaded

SAMPLES = "samples_before.json"


class TrainTask(Task, Protocol):
    """A task that can be saved and shows samples."""

    updater: Updater

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def show(self) -> list[dict[str, Any]]:
        """A few samples: prompt, completion, and what is worth telling about them."""


@dataclass(frozen=True)
class Job:
    """A training command about to run."""

    title: str
    args: Arguments
    loaded: Loaded
    task: TrainTask
    max_steps: int
    resume: Path | None


def restore(job: Job, metrics: Metrics) -> int:
    """Puts model, optimizer, schedule, data order and random states back; returns the step to go on from."""
    if job.resume is None:
        return 0
    saved: Checkpoint = load_checkpoint(job.resume)
    updater = job.task.updater
    restore_weights(job.loaded.model, saved.path)
    given = optimizer_options(updater.optimizer)
    updater.optimizer.load_state_dict(saved.optimizer_state)
    for name, value in optimizer_options(updater.optimizer).items():
        if value != given[name]:
            raise ValueError(f"a resumed run goes on as it was: {name} was {value}, now it is {given[name]}; start a new run to change it")
    updater.schedule.load_state_dict(saved.scheduler_state)
    job.task.load_state_dict(saved.data_state)
    metrics.resume(saved.step, saved.extra["metrics"])
    restore_rng(saved.rng)
    return saved.step


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
    run_args = args.run
    metrics = Metrics(
        output_dir,
        report_to=run_args.report_to,
        run_name=run_args.run_name,
        config=args.flat(),
        total_steps=job.max_steps,
        logging_steps=run_args.logging_steps,
    )
    with closing(metrics), interruptible() as interrupt:
        start = restore(job, metrics)
        before = job.task.show() if start == 0 else read_samples(output_dir)
        write_atomic(output_dir / SAMPLES, json.dumps(before))
        cadence = Cadence(job.max_steps, run_args.save_steps, run_args.eval_steps, StopAt.parse(run_args.stop_at))
        if not run(job.task, cadence, metrics, interrupt, start=start, save=lambda step: save(job, metrics, step)):
            raise KeyboardInterrupt(f"stopped; go on with --output_dir {output_dir} --resume_from_checkpoint latest")
        final = merged(job.loaded.model) if args.model.merge_adapter else job.loaded.model
        save_model(output_dir, final, job.loaded.tokenizer)
        del final
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
