"""`fastalign rft`: rejection-sampling fine-tuning. Sample, score, keep the best, train on them; round after round."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data import Prompt
from ..generation import Engine, SamplingParams
from ..losses.sft import SupervisedLoss, supervised_loss
from ..rewards import RewardSet, load_rewards
from ..training.metrics import Metrics, read_metrics
from ..training.report import write_report
from .arguments import Arguments
from .model_rewards import with_reward_models
from .online import prompts_of, sampling_of
from .rejection_task import RejectionTask, Selection
from .samplers import sampler_of
from .setup import Loaded, build_updater, check_output, load, plan, seed_everything
from .training import Job, clear, execute


def rewards_of(args: Arguments, loaded: Loaded) -> RewardSet:
    """The rewards that the flags name."""
    own = args.rejection
    if not own.reward:
        return RewardSet([], [])  # the environment's own is the only one
    return load_rewards(with_reward_models(own.reward, loaded), list(own.reward_weights) or None, timeout=own.reward_timeout)


def sampling(args: Arguments) -> SamplingParams:
    """How candidates are drawn."""
    return replace(sampling_of(args), n=args.rejection.num_generations)


def selection_of(args: Arguments, row: SupervisedLoss) -> Selection:
    """What is kept of a prompt's completions.

    Raises:
        ValueError: more are to be kept than are sampled, or a ranking would have fewer than two.
    """
    kept, sampled = args.rejection.num_kept, args.rejection.num_generations
    if not 1 <= kept <= sampled:
        raise ValueError(f"--num_kept must be between 1 and --num_generations {sampled}, got {kept}")
    if row.ranks and kept < 2:
        raise ValueError(f"--loss {args.rejection.loss} ranks the kept completions of a prompt: --num_kept must be 2 or more, got {kept}")
    return Selection(kept, args.rejection.min_reward)


def steps_of(args: Arguments, prompts_per_round: int) -> tuple[int, int]:
    """(optimizer steps of the run, of a round). A schedule needs them before it is known how many completions are kept.

    With --max_steps the rounds share it. With --num_train_epochs a round has the steps of so many passes over
    prompts x num_kept completions; where fewer are kept, they are seen more often.
    """
    rounds, optim = args.rejection.num_rounds, args.optim
    if rounds < 1:
        raise ValueError(f"--num_rounds must be >= 1, got {rounds}")
    if optim.max_steps == 0:
        if rounds > 1:
            raise ValueError(f"--max_steps 0 only samples, so there is one round; got --num_rounds {rounds}")
        return 0, 1
    if 0 < optim.max_steps < rounds:
        raise ValueError(f"--max_steps {optim.max_steps} leaves no step for some of --num_rounds {rounds}")
    if optim.max_steps > 0:
        return optim.max_steps, math.ceil(optim.max_steps / rounds)
    if optim.num_train_epochs <= 0:
        raise ValueError(f"nothing to do: --max_steps {optim.max_steps} --num_train_epochs {optim.num_train_epochs}")
    batch = args.batch.per_device_train_batch_size * args.batch.gradient_accumulation_steps
    per_round = max(1, math.ceil(optim.num_train_epochs * prompts_per_round * args.rejection.num_kept / batch))
    return per_round * rounds, per_round


def round_size(args: Arguments, num_prompts: int) -> int:
    """Prompts of a round."""
    asked = args.rejection.prompts_per_round
    if not 0 <= asked <= num_prompts:
        raise ValueError(f"--prompts_per_round must be between 0 (all) and the {num_prompts} prompts of the data, got {asked}")
    return asked or num_prompts


def build_task(args: Arguments, loaded: Loaded, prompts: list[Prompt], held_out: list[Prompt], rewards: RewardSet) -> RejectionTask:
    """Engine, rewards and updater around the loaded model."""
    row = supervised_loss(args.rejection.loss, args.loss_options)
    size = round_size(args, len(prompts))
    max_steps, per_round = steps_of(args, size)
    return RejectionTask(
        updater=build_updater(loaded, args, max(max_steps, 1)),
        engine=Engine(
            loaded.model,
            loaded.tokenizer,
            kv_cache_tokens=args.sampling.kv_cache_tokens or None,
            max_num_seqs=args.sampling.max_num_seqs,
        ),
        rewards=rewards,
        prompts=prompts,
        eval_prompts=held_out,
        params=sampling(args),
        selection=selection_of(args, row),
        row=row,
        seed=args.run.seed,
        shuffle=args.data.shuffle,
        prompts_per_round=size,
        steps_per_round=per_round,
        batch_size=args.batch.per_device_train_batch_size * args.batch.gradient_accumulation_steps,
        max_tokens_per_micro_batch=args.batch.max_tokens_per_micro_batch,
        kept_folder=Path(args.run.output_dir),
        sampler=sampler_of(args.environment, prompts, held_out),
    )


def sample_only(args: Arguments, task: RejectionTask) -> dict[str, Any]:
    """Best-of-K data: one round without training. Writes kept-round-1.jsonl, metrics.jsonl, summary.json and report.html."""
    output_dir = Path(args.run.output_dir)
    clear(output_dir)
    metrics = Metrics(output_dir, report_to=args.run.report_to, run_name=args.run.run_name, config=args.flat(), total_steps=1)
    with closing(metrics):
        summary = task.evaluate() | task.collect()
        metrics.write(0, summary)
        metrics.summary(summary)
    config, rows = args.flat(), read_metrics(output_dir)
    write_report(output_dir, title="Rejection sampling: what is kept", config=config, metrics=rows, summary=summary, samples=[])
    return summary


def run(args: Arguments) -> dict[str, Any]:
    """Trains, and returns the summary (the plan under --dry_run; the round's metrics under --max_steps 0, which only samples)."""
    resume = check_output(args.run, args.data.eval_dataset_name)
    selection_of(args, supervised_loss(args.rejection.loss, args.loss_options))
    sampling(args)
    steps_of(args, 1)
    if not args.rejection.reward and not sampler_of(args.environment).weights:
        raise ValueError("--reward is required: a built-in (math, gsm8k, format, length, code), a reward model, or path.py:function")
    seed_everything(args.run.seed)
    loaded = load(args.model)
    with rewards_of(args, loaded) as rewards:
        prompts = prompts_of(args, loaded, args.data.dataset_name, args.data.max_samples)
        held_out = prompts_of(args, loaded, args.data.eval_dataset_name, args.data.eval_max_samples) if args.data.eval_dataset_name else []
        for data in filter(None, (prompts, held_out)):
            rewards.check_columns(sorted({name for prompt in data for name in prompt.columns}))
        max_steps, per_round = steps_of(args, round_size(args, len(prompts)))
        if args.run.dry_run:
            sampled = round_size(args, len(prompts)) * args.rejection.num_generations
            extra = {"rounds": args.rejection.num_rounds, "steps a round": per_round, "completions a round": sampled}
            return plan(loaded, args, max_steps=max_steps, num_records=len(prompts), extra=extra)
        if resume is None:
            for stale in Path(args.run.output_dir).glob("kept-round-*.jsonl"):
                stale.unlink()
        task = build_task(args, loaded, prompts, held_out, rewards)
        if max_steps == 0:
            return sample_only(args, task)
        return execute(Job(f"Rejection-sampling fine-tuning: {args.rejection.loss}", args, loaded, task, max_steps, resume))
