"""`fastalign distill`: a student learns a teacher's next-token distributions, on given or on its own completions (GKD)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..data import DataOrder
from ..generation import Engine
from ..models.backbone import causal_lm, head_of
from ..models.load import load_causal_lm, load_tokenizer
from ..packing import Segment
from .arguments import Arguments
from .distill_task import DistillTask, Divergence, OnPolicy
from .online import prompts_of, sampling_of
from .setup import Loaded, build_updater, check_output, load, num_steps, plan, seed_everything
from .sft import examples, prompt_of, shown_prompts
from .training import Job, execute


def load_teacher(args: Arguments, loaded: Loaded) -> nn.Module:
    """The teacher, frozen, on the student's device.

    Raises:
        ValueError: another vocabulary than the student's, or a soft-cap on either side's logits.
    """
    name = args.distill.teacher_model_name_or_path
    teacher = load_causal_lm(name, dtype=args.model.dtype, device=loaded.device).requires_grad_(False).eval()
    theirs, ours = head_of(teacher).weight.shape[0], head_of(loaded.model).weight.shape[0]
    if theirs != ours:
        raise ValueError(
            f"--teacher_model_name_or_path {name}: expected the student's vocabulary of {ours}, got {theirs}; distributions over two"
            " vocabularies cannot be compared token by token: take a teacher of the same family, or train on its generations"
            " (fastalign generate, then fastalign sft)"
        )
    check_tokenizer(name, loaded)
    for flag, model in (("--model_name_or_path", loaded.model), ("--teacher_model_name_or_path", teacher)):
        if head_of(model).logit_softcap is not None:
            family = causal_lm(model).config.model_type
            raise ValueError(f"{flag}: {family} soft-caps its logits, which the divergence does not read; take a family without")
    return teacher


def check_tokenizer(name: str, loaded: Loaded) -> None:
    """Raises when a tokenizer lies beside the teacher and names its tokens otherwise than the student's."""
    try:
        theirs = load_tokenizer(name).get_vocab()
    except ValueError:
        return  # none there
    ours = loaded.tokenizer.get_vocab()
    other = next((token for token in ours if theirs.get(token) != ours[token]), None)
    if other is not None:
        raise ValueError(
            f"--teacher_model_name_or_path {name}: token {other!r} is {ours[other]} in the student's tokenizer and {theirs.get(other)} in"
            " the teacher's; the two must share one vocabulary"
        )


def check_lmbda(args: Arguments) -> None:
    """Raises when the on-policy share leaves no room or no way to sample."""
    if not 0.0 <= args.distill.lmbda <= 1.0:
        raise ValueError(f"--lmbda must be in [0, 1], got {args.distill.lmbda}")
    if args.distill.lmbda > 0:
        sampling_of(args)


def read(args: Arguments, loaded: Loaded) -> tuple[list[list[int]], list[Segment]]:
    """Prompts for the on-policy steps and completed sequences for the others; with --lmbda 1 a prompt is all that a record needs."""
    if args.distill.lmbda == 1.0:
        return [prompt.ids for prompt in prompts_of(args, loaded, args.data.dataset_name, args.data.max_samples)], []
    segments = examples(args, loaded, args.data.dataset_name, args.data.max_samples)
    prompts = [prompt_of(segment) for segment in segments]
    if args.distill.lmbda > 0:
        short = next((i for i, prompt in enumerate(prompts) if not 0 < len(prompt) < args.data.max_length), None)
        if short is not None:
            raise ValueError(
                f"--lmbda {args.distill.lmbda:g}: example {short} has a prompt of {len(prompts[short])} tokens, from which nothing can be"
                f" sampled within --max_length {args.data.max_length}; give records of prompt and completion, or --lmbda 0"
            )
    return prompts, segments


def divergence_of(args: Arguments) -> Divergence:
    """What the flags name."""
    own = args.distill.divergence_temperature
    return Divergence(args.distill.loss, args.distill.jsd_beta, args.sampling.temperature if own is None else own)


def run(args: Arguments) -> dict[str, Any]:
    """Trains, and returns the summary (the plan under --dry_run)."""
    resume = check_output(args.run, args.data.eval_dataset_name)
    check_lmbda(args)
    if not args.distill.teacher_model_name_or_path:
        raise ValueError("--teacher_model_name_or_path is required: a folder or Hub name of a model with the student's vocabulary")
    seed_everything(args.run.seed)
    loaded = load(args.model)
    teacher = load_teacher(args, loaded)
    prompts, segments = read(args, loaded)
    held_out = examples(args, loaded, args.data.eval_dataset_name, args.data.eval_max_samples) if args.data.eval_dataset_name else []
    batch_size = args.batch.per_device_train_batch_size * args.batch.gradient_accumulation_steps
    max_steps = num_steps(args.optim, len(prompts), batch_size)
    if args.run.dry_run:
        size = sum(p.numel() * p.element_size() for p in teacher.parameters()) / 2**20
        extra = {"teacher": args.distill.teacher_model_name_or_path, "memory: teacher, MiB": round(size)}
        return plan(loaded, args, max_steps=max_steps, num_records=len(prompts), extra=extra)
    sampling = replace(sampling_of(args), n=1)
    task = DistillTask(
        updater=build_updater(loaded, args, max_steps),
        teacher=teacher,
        divergence=divergence_of(args),
        on_policy=OnPolicy(args.distill.lmbda, sampling, args.data.max_length, args.run.seed),
        engine=Engine(
            loaded.model,
            loaded.tokenizer,
            kv_cache_tokens=args.sampling.kv_cache_tokens or None,
            max_num_seqs=args.sampling.max_num_seqs,
        ),
        prompts=prompts,
        segments=segments,
        eval_segments=held_out,
        order=DataOrder(len(prompts), seed=args.run.seed, shuffle=args.data.shuffle),
        batch_size=batch_size,
        max_tokens_per_micro_batch=args.batch.max_tokens_per_micro_batch,
        show_prompts=shown_prompts(held_out or segments, loaded.tokenizer),
    )
    return execute(Job(f"Distillation: {args.distill.loss}", args, loaded, task, max_steps, resume))
