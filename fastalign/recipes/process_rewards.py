"""What the rows with rewards on the way need beside an online task's own parts: a judge of steps, or a model that becomes one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..algorithms import ImplicitReward
from ..models.backbone import head_of
from ..models.load import load_causal_lm
from ..rewards import load_rewards
from .arguments import Arguments
from .model_rewards import names_model, with_reward_models
from .prime_task import ImplicitRewardModel
from .reference import Reference
from .setup import Loaded, build_updater
from .sharing import reward_model
from .step_task import FunctionReward, ModelReward, StepReward

PRM = "prm"  # the folder in output_dir and in checkpoints


def step_judge(args: Arguments, loaded: Loaded) -> tuple[StepReward, str]:
    """The judge of steps, and the text that ends a step.

    Raises:
        ValueError: a folder that is no process reward model.
    """
    name = args.process.step_reward
    if not names_model(name, "--step_reward"):
        separator = args.process.step_separator.replace("\\n", "\n").replace("\\t", "\t")
        return FunctionReward(load_rewards(with_reward_models([name], loaded), timeout=args.online.reward_timeout)), separator
    model = reward_model(loaded, name, "step_reward", "--step_reward")
    if model.steps is None:
        raise ValueError(
            f"--step_reward {name}: expected a process reward model (fastalign reward --loss process), got one of whole answers"
        )
    return ModelReward(model), str(model.separator)


def implicit_model(args: Arguments, loaded: Loaded, row: ImplicitReward, max_steps: int) -> ImplicitRewardModel:
    """The model of implicit rewards, begun from --prm_model_name_or_path or else from the policy's own weights.

    Raises:
        ValueError: it knows fewer tokens than the policy.
    """
    name = args.process.prm_model_name_or_path or args.model.model_name_or_path
    model: Any = load_causal_lm(name, dtype=args.model.dtype, device=loaded.device)
    rows, wanted = head_of(model).weight.shape[0], head_of(loaded.model).weight.shape[0]
    if rows < wanted:
        raise ValueError(f"--prm_model_name_or_path {name}: it knows {rows} tokens, the policy {wanted}; it must read the policy's own ids")
    if args.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    reference = Reference(model)
    rate = args.optim.learning_rate if args.process.prm_learning_rate is None else args.process.prm_learning_rate
    own = replace(args, optim=replace(args.optim, learning_rate=rate))
    updater = build_updater(Loaded(model.train(), loaded.tokenizer, loaded.device), own, max_steps)
    return ImplicitRewardModel(updater, reference, beta=row.prm_beta)
