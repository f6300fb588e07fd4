"""`fastalign grpo` and its kin: online reinforcement learning with verifiable or user-given rewards."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..advantages import ADVANTAGES
from ..algorithms import ACTOR_CRITICS, ALGORITHMS, Algorithm, Exploring, OnlinePreference, resolve
from ..data import DataOrder, Prompt, prompt_examples
from ..generation import Engine, SamplingParams
from ..losses.policy import POLICY
from ..models.backbone import causal_lm, head_of, positions_of
from ..models.linear import check_quantization
from ..ops.policy import PolicyOptions
from .arguments import Arguments, OnlineArguments
from .online_kinds import task_of, with_own_options
from .online_rewards import check_rewards, rewards_of
from .online_task import OnlineTask
from .planned import planned_models
from .reading import prompts_named_by
from .reference import Reference
from .reuse import ForwardReuse
from .rollout_engines import (
    check_staleness,
    engine_of,
    is_off_policy,
    quantization_of,
    rollouts_ahead,
    sampling_engine,
    uncorrected,
)
from .samplers import sampler_of
from .setup import Loaded, build_updater, check_output, num_steps, plan, seed_everything
from .sharing import load_policy
from .training import Job, execute

log = logging.getLogger("fastalign")


def algorithm_of(args: Arguments) -> Algorithm:
    """The row that the flags name, with what they replace in it; its group must have advantages."""
    algorithm = with_own_options(resolved(args), args)
    if not isinstance(algorithm, OnlinePreference):
        check_group_size(algorithm, args.online.num_generations)
    elif args.online.num_generations < 2 and not isinstance(algorithm, Exploring):  # which pairs one of each policy
        raise ValueError(f"--num_generations {args.online.num_generations}: a pair needs two completions of a prompt; give 2 or more")
    return algorithm


def resolved(args: Arguments) -> Algorithm:
    """The row that the flags name, with what they replace in it."""
    online = args.online
    options = dict(args.loss_options)
    for name, value in (("epsilon", online.epsilon), ("epsilon_high", online.epsilon_high)):
        if value is not None:
            options.setdefault(name, value)
    name = online.algorithm or args.command
    if online.epsilon is not None and online.epsilon_high is None and _has_two_bounds(name, online.loss):
        options.setdefault("epsilon_high", None)  # one epsilon on both sides, whatever the row has above
    algorithm = resolve(
        name,
        advantage=online.advantage,
        loss=online.loss,
        aggregate=online.aggregate,
        kl_coef=online.beta,
        kl=online.kl_estimator,
        advantage_options=args.advantage_options,
        loss_options=options,
        preference=online.preference_loss,
    )
    if isinstance(algorithm, OnlinePreference) and (online.entropy_coef or online.importance_correction != "auto"):
        flag = "entropy_coef" if online.entropy_coef else "importance_correction"
        raise ValueError(f"--{flag}: {online.algorithm} has no policy loss that reads it; leave it out")
    if online.entropy_coef is not None:
        algorithm = replace(algorithm, entropy_coef=online.entropy_coef)
    check_staleness(args, algorithm)
    return replace(algorithm, correction_options=correction_of(online, algorithm.correction_options))


def _has_two_bounds(name: str, loss: str) -> bool:
    """Whether the policy loss of the row, or the one that replaces it, reads epsilon_high."""
    base = (ALGORITHMS | ACTOR_CRITICS).get(name)
    chosen = POLICY.get(loss or (base.loss if base else ""))
    return chosen is not None and "epsilon_high" in (chosen.function.__kwdefaults__ or {})


def correction_of(online: OnlineArguments, own: Mapping[str, Any]) -> dict[str, Any]:
    """The importance correction that the flags name; own: the algorithm's.

    Raises:
        ValueError: a bound that the correction does not read, or bounds out of order.
    """
    options = dict(own)
    if online.importance_correction != "auto":
        options["correction"] = online.importance_correction
    elif is_off_policy(online) and online.off_policy_objective != "plain" and options.get("correction", "none") == "none":
        options["correction"] = "truncate"
    correction = options.get("correction", "none")
    read = {"none": (), "truncate": ("high",)}.get(correction.removeprefix("sequence_"), ("low", "high"))
    for side, value in (("low", online.importance_correction_low), ("high", online.importance_correction_high)):
        if value is None:
            continue
        if side not in read:
            hint = "mask or sequence_mask" if correction != "none" else "truncate, mask, sequence_truncate or sequence_mask"
            given = f"--importance_correction_{side} {value:g}"
            raise ValueError(f"{given}: the importance correction {correction!r} has no such bound; give --importance_correction {hint}")
        options[f"correction_{side}"] = value
    if "low" not in read and options.get("correction_high") is not None:
        options["correction_low"] = 0.0  # not read, and a cut below its default is a cut all the same
    PolicyOptions(**options)
    return options


def prompts_of(args: Arguments, loaded: Loaded, name: str | list[str], max_samples: int) -> list[Prompt]:
    """The data set as tokenized prompts with the columns that the rewards read."""
    data, positions = args.data, positions_of(loaded.model)
    of_model = positions is not None and positions < data.max_length
    room = (positions if of_model and positions else data.max_length) - args.sampling.max_completion_length
    if of_model and room < 1:
        raise ValueError(
            f"--max_completion_length {args.sampling.max_completion_length} leaves no room for a prompt in the model's"
            f" {positions} positions"
        )
    if room < 1:
        raise ValueError(
            f"--max_completion_length {args.sampling.max_completion_length} leaves no room for a prompt in --max_length {data.max_length};"
            " raise --max_length"
        )
    within = f"prompt and completion have the model's {positions} positions" if of_model else f"both have --max_length {data.max_length}"
    return prompt_examples(
        prompts_named_by(data, name, max_samples),
        loaded.tokenizer,
        max_prompt_length=min(data.max_prompt_length or room, room),
        limit_flag="--max_prompt_length" if 0 < data.max_prompt_length <= room else f"lower --max_completion_length: {within}",
        on_bad_record=data.on_bad_record,
        system_prompt=data.system_prompt,
        vocab_size=head_of(loaded.model).weight.shape[0],
    )


def check_group_size(algorithm: Algorithm, size: int) -> None:
    """Refuses a group so small that its advantages are 0 whatever the rewards: nothing would be learned."""
    rewards, cu_groups = torch.arange(2.0 * size), torch.tensor([0, size, 2 * size], dtype=torch.int32)
    rewards[: size - 1] = 0.0  # one group with a single success, one of many rewards
    if size >= 1 and not ADVANTAGES[algorithm.advantage](rewards, cu_groups, **algorithm.advantage_options).any():
        raise ValueError(
            f"--num_generations {size}: the advantage {algorithm.advantage!r} of a group of {size} is 0 whatever the rewards, so nothing"
            " would be learned; give 2 or more, or an advantage that needs no group (--advantage reinforce)"
        )


def num_prompts_of(args: Arguments) -> int:
    """Prompts an optimizer step: completions of the batch over the group's size."""
    completions = args.batch.per_device_train_batch_size * args.batch.gradient_accumulation_steps
    size = args.online.num_generations
    if size < 1 or completions % size:
        raise ValueError(
            f"per_device_train_batch_size x gradient_accumulation_steps = {completions} completions must be a multiple of "
            f"--num_generations {size}; try {max(size, 1) * max(1, completions // max(size, 1))}"
        )
    return completions // size


def sampling_of(args: Arguments) -> SamplingParams:
    s = args.sampling
    if s.temperature <= 0:
        raise ValueError(f"--temperature must be > 0 for training, got {s.temperature}; greedy samples of a group are all the same")
    return SamplingParams(
        n=args.online.num_generations,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        max_tokens=s.max_completion_length,
        stop=list(s.stop),
        seed=args.run.seed,
    )


def build_task(args: Arguments, loaded: Loaded, prompts: list[Prompt], held_out: list[Prompt], max_steps: int) -> OnlineTask:
    """Reference, engine, rewards and updater around the loaded model, and what the kind of row needs beside them."""
    algorithm = algorithm_of(args)
    return task_of(algorithm, args, loaded, parts_of(args, loaded, prompts, held_out, max_steps, algorithm), max_steps)


def parts_of(
    args: Arguments,
    loaded: Loaded,
    prompts: list[Prompt],
    held_out: list[Prompt],
    max_steps: int,
    algorithm: Algorithm,
    *,
    num_rollouts: int | None = None,
) -> dict[str, Any]:
    """What every online task is made of. max_steps: steps of the policy; num_rollouts: of the run, where these are more."""
    reference = Reference(loaded.model) if algorithm.reads_reference else None
    if uncorrected(args.online, algorithm):
        log.warning("the rollouts are another policy's, and --importance_correction none weighs their tokens as if they were its own")
    live = engine_of(args, loaded.model, loaded.tokenizer)
    ahead = rollouts_ahead(args, loaded, live, num_rollouts or max_steps)
    return {
        "updater": build_updater(loaded, args, max_steps * args.online.num_iterations, temperature=args.sampling.temperature),
        "engine": ahead.engine if ahead is not None else sampling_engine(args, loaded, live),
        "exact_engine": live,
        "reference": reference,
        "rewards": rewards_of(args, algorithm, loaded),
        "prompts": prompts,
        "eval_prompts": held_out,
        "order": DataOrder(len(prompts), seed=args.run.seed, shuffle=args.data.shuffle),
        "algorithm": algorithm,
        "params": sampling_of(args),
        "num_prompts": num_prompts_of(args),
        "num_iterations": args.online.num_iterations,
        "max_tokens_per_micro_batch": args.batch.max_tokens_per_micro_batch,
        "sampler": sampler_of(args.environment),
        "ahead": ahead,
        "plain_ratio": args.online.off_policy_objective == "plain",
        "reuse": reuse_of(args, live),
    }


def reuse_of(args: Arguments, live: Engine) -> ForwardReuse | None:
    """What hands the rollout's forward pass to the update; None where the rollout is another model's."""
    return ForwardReuse(live) if args.online.reuse_forward and not is_off_policy(args.online) else None


def evaluate(args: Arguments) -> dict[str, float]:
    """Held-out metrics of the model as it is: mean rewards of greedy completions, keys starting with eval/."""
    loaded = load_policy(args)
    held_out = prompts_of(args, loaded, args.data.eval_dataset_name, args.data.eval_max_samples)
    task = build_task(args, loaded, held_out, held_out, 1)
    try:
        return task.evaluate()
    finally:
        task.close()


def require_reward(args: Arguments) -> None:
    """Raises ValueError where nothing gives a reward: no flag, and no environment."""
    if not args.online.reward and not sampler_of(args.environment).weights:
        known = "a built-in (math, gsm8k, format, length, code), module:function, path.py:function, or a reward model's folder"
        raise ValueError(f"--reward is required: {known}")


def both_prompts(args: Arguments, loaded: Loaded) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts of training and of the held-out evaluation."""
    data = args.data
    prompts = prompts_of(args, loaded, data.dataset_name, data.max_samples)
    return prompts, prompts_of(args, loaded, data.eval_dataset_name, data.eval_max_samples) if data.eval_dataset_name else []


def run(args: Arguments) -> dict[str, Any]:
    """Trains, and returns the summary (the plan under --dry_run)."""
    resume = check_output(args.run, args.data.eval_dataset_name)
    algorithm, num_prompts, _ = algorithm_of(args), num_prompts_of(args), sampling_of(args)
    require_reward(args)
    seed_everything(args.run.seed)
    loaded = load_policy(args)
    check_quantization(causal_lm(loaded.model), quantization_of(args.online))
    prompts, held_out = both_prompts(args, loaded)
    max_steps = num_steps(args.optim, len(prompts), num_prompts)
    check_rewards(args, algorithm, loaded, prompts, held_out)
    if args.run.dry_run:
        extra = {"completions a step": num_prompts * args.online.num_generations, "algorithm": str(algorithm)}
        extra |= planned_models(args, loaded, reads_reference=algorithm.reads_reference)
        return plan(loaded, args, max_steps=max_steps, num_records=len(prompts), extra=extra)
    task = build_task(args, loaded, prompts, held_out, max_steps)
    try:
        title = f"Online learning: {args.online.algorithm or args.command}"
        return execute(Job(title, args, loaded, task, max_steps, resume, task.companions))
    finally:
        task.close()
