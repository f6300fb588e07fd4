"""`fastalign ppo`: actor-critic methods, with a critic of their own and rewards of every token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..algorithms import ActorCritic
from ..data import Prompt
from ..models.backbone import causal_lm, head_of
from ..models.linear import check_quantization
from ..models.load import load_tokenizer
from ..models.reward import load_reward_model
from ..models.shared import weights_bytes
from . import online
from .arguments import Arguments
from .critic import Critic
from .model_rewards import reward_modules
from .online_rewards import check_rewards
from .planned import planned_critic, planned_models
from .ppo_task import PPOTask
from .rollout_engines import quantization_of
from .setup import Loaded, build_updater, check_output, num_steps, plan, seed_everything
from .sharing import load_policy, shared_critic
from .training import Job, execute

CRITIC = "critic"  # the folder in output_dir and in checkpoints


def algorithm_of(args: Arguments) -> ActorCritic:
    """The row that the flags name, with what they replace in it.

    Raises:
        ValueError: options that exclude each other.
    """
    row, given = online.resolved(args), args.ppo
    assert isinstance(row, ActorCritic)
    changes = {name: value for name, value in vars(given).items() if value is not None and hasattr(row, name)}
    changes["value_clip"] = row.value_clip if given.value_clip is None else given.value_clip or None  # 0: not clipped
    row = replace(row, **changes)
    if row.kl_target and not row.kl_coef:
        raise ValueError("--kl_target: there is no KL to steer, because its coefficient is 0; give --beta its first value")
    if row.kl_in not in ("reward", "loss"):
        raise ValueError(f"--kl_in: expected reward or loss, got {row.kl_in!r}")
    if args.online.kl_estimator and row.kl_in == "reward":
        raise ValueError(f"--kl_estimator {args.online.kl_estimator}: the KL is in the rewards, as log-ratios; give --kl_in loss with it")
    return row if row.kl_in == "loss" else replace(row, kl="k1")


def load_critic(args: Arguments, loaded: Loaded, max_steps: int, row: ActorCritic) -> tuple[Critic, Any]:
    """The critic, begun from --critic_model_name_or_path or else from the policy's own weights, and its tokenizer.

    Raises:
        ValueError: it knows fewer tokens than the policy.
    """
    model, tokenizer = (shared_critic(args, loaded, CRITIC) if loaded.shared is not None else None) or own_critic(args, loaded)
    rate = args.optim.learning_rate if args.ppo.critic_learning_rate is None else args.ppo.critic_learning_rate
    own = replace(args, optim=replace(args.optim, learning_rate=rate))
    updater = build_updater(Loaded(model.train(), tokenizer, loaded.device), own, max_steps * args.online.num_iterations)
    return Critic(updater, clip=row.value_clip), tokenizer


def own_critic(args: Arguments, loaded: Loaded) -> tuple[Any, Any]:
    """A critic with weights of its own, and its tokenizer.

    Raises:
        ValueError: it knows fewer tokens than the policy.
    """
    name = args.ppo.critic_model_name_or_path or args.model.model_name_or_path
    tokenizer = load_tokenizer(name if args.ppo.critic_model_name_or_path else args.model.tokenizer_name_or_path or name)
    model: Any = load_reward_model(name, tokenizer, dtype=args.model.dtype, device=loaded.device, start=True)
    rows, wanted = model.get_input_embeddings().weight.shape[0], head_of(loaded.model).weight.shape[0]
    if rows < wanted:
        raise ValueError(
            f"--critic_model_name_or_path {name}: the critic knows {rows} tokens, the policy {wanted}; it must read the policy's own ids"
        )
    if args.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def build_task(
    args: Arguments, loaded: Loaded, prompts: list[Prompt], held_out: list[Prompt], max_steps: int
) -> tuple[PPOTask, dict[str, Any]]:
    """The task, and the models that are trained beside the policy."""
    row = algorithm_of(args)
    updates = max(1, max_steps - row.critic_warmup)
    parts = online.parts_of(args, loaded, prompts, held_out, updates, row, num_rollouts=max_steps)
    critic, tokenizer = load_critic(args, loaded, max_steps, row)
    reference = [] if parts["reference"] is None else [parts["reference"].model]
    held = weights_bytes([loaded.model, critic.updater.model, *reference, *reward_modules(loaded)])
    return PPOTask(critic=critic, weights_mb=held / 2**20, **parts), {CRITIC: (critic.updater, tokenizer)}


def run(args: Arguments) -> dict[str, Any]:
    """Trains, and returns the summary (the plan under --dry_run)."""
    resume = check_output(args.run, args.data.eval_dataset_name)
    row, num_prompts, _ = algorithm_of(args), online.num_prompts_of(args), online.sampling_of(args)
    online.require_reward(args)
    seed_everything(args.run.seed)
    loaded = load_policy(args)
    check_quantization(causal_lm(loaded.model), quantization_of(args.online))
    prompts, held_out = online.both_prompts(args, loaded)
    max_steps = num_steps(args.optim, len(prompts), num_prompts)
    if max_steps <= row.critic_warmup:
        raise ValueError(f"--critic_warmup {row.critic_warmup}: the run has {max_steps} steps, so the policy would never be trained")
    check_rewards(args, row, loaded, prompts, held_out)
    if args.run.dry_run:
        extra = {"completions a step": num_prompts * args.online.num_generations, "algorithm": str(row)}
        extra |= planned_models(args, loaded, reads_reference=row.reads_reference) | planned_critic(args, loaded)
        return plan(loaded, args, max_steps=max_steps, num_records=len(prompts), extra=extra)
    task, companions = build_task(args, loaded, prompts, held_out, max_steps)
    try:
        return execute(Job(f"Actor and critic: {args.online.algorithm or args.command}", args, loaded, task, max_steps, resume, companions))
    finally:
        task.close()
