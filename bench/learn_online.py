"""The online methods of bench.learn: each from the same SFT model, with the same number of completions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import tool_task
from bench.learn_reward import answer_reward_model
from bench.learn_setting import REWARD, Row, Setting, accuracies, optimizer
from fastalign.recipes import arithmetic
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    OnlineArguments,
    PPOArguments,
    ProcessArguments,
    SamplingArguments,
)

STEPS = 120
COMPLETIONS, GROUP = 512, 8  # a step, and of a prompt


def _arguments(setting: Setting, command: str, algorithm: str, learning_rate: float, **online: Any) -> Arguments:
    args = setting.arguments(command, algorithm, setting.files["train"], COMPLETIONS, optim=optimizer(learning_rate, STEPS))
    given = OnlineArguments(**({"algorithm": algorithm, "num_generations": GROUP, "reward": [REWARD]} | online))
    return replace(args, batch=BatchArguments(COMPLETIONS), sampling=SamplingArguments(max_completion_length=8), online=given)


def online(
    algorithm: str, learning_rate: float = 1.5e-4, *, process: ProcessArguments | None = None, **options: Any
) -> Callable[[Setting], Row]:
    """GRPO's command with a row of its table, without a KL unless the options say so."""

    def learn(setting: Setting) -> Row:
        from fastalign.recipes.online import run

        args = _arguments(setting, "grpo", algorithm, learning_rate, **({"beta": 0.0} | options))
        run(replace(args, process=process or ProcessArguments()))
        return accuracies(setting, setting.root / algorithm)

    return learn


def actor_critic(algorithm: str, learning_rate: float = 1.5e-4, *, warmup: int = 0, **advantage: float) -> Callable[[Setting], Row]:
    """PPO's command with a row of its table; its critic learns for a few steps alone. advantage: the estimator's options."""

    def learn(setting: Setting) -> Row:
        from fastalign.recipes.ppo import run

        args = _arguments(setting, "ppo", algorithm, learning_rate)
        run(replace(args, ppo=PPOArguments(critic_warmup=warmup, critic_learning_rate=5e-4), advantage_options=advantage))
        return accuracies(setting, setting.root / algorithm)

    return learn


def on_reward_model(setting: Setting) -> Row:
    """PPO that never sees a sum checked: a reward model of answers scores it. Without a dear KL it learns to please the model."""
    from fastalign.recipes.ppo import run

    args = _arguments(setting, "ppo", "ppo", 1.5e-4, beta=0.5, reward=[str(answer_reward_model(setting))])
    args = replace(args, run=replace(args.run, output_dir=str(setting.root / "ppo-reward-model")))
    run(replace(args, ppo=PPOArguments(critic_learning_rate=5e-4)))
    return accuracies(setting, setting.root / "ppo-reward-model")


def tools(setting: Setting) -> Row:
    """GRPO with a calculator on sums of three digits, from a cold start of its own that seldom calls it."""
    from fastalign.recipes import online as recipe
    from fastalign.recipes import sft

    root, seed, key = setting.root / "tools", setting.seed, "eval/rewards/correct/mean"
    files = tool_task.prepare(root, seed)
    sft.run(tool_task.cold_start(root, files, seed, replace(optimizer(1e-3, 400), lr_scheduler_type="constant")))
    found = recipe.run(tool_task.reinforce(root, files, seed, optimizer(2e-4, 60)))
    return {"before": found[f"{key}/before"], "after": found[key], "measure": "held-out greedy accuracy, three digits and a calculator"}


DIGITS = ProcessArguments(step_reward=f"{Path(arithmetic.__file__)}:begun_well", step_separator="")

ONLINE: dict[str, Callable[[Setting], Row]] = {
    "grpo": online("grpo"),
    "dr_grpo": online("dr_grpo"),
    "dapo": online("dapo"),
    "gspo": online("gspo"),
    "cispo": online("cispo"),
    "rloo": online("rloo"),
    "reinforce_pp": online("reinforce_pp"),
    "remax": online("remax"),
    "raft_pp": online("raft_pp"),
    "process_grpo": online("process_grpo", process=DIGITS),
    "prime": online("prime"),
    "online_dpo": online("online_dpo", beta=0.5),
    "xpo": online("xpo", beta=0.5),
    "nash_md": online("nash_md", beta=0.008),
    "ppo": actor_critic("ppo"),
    "vapo": actor_critic("vapo", warmup=10, alpha=2.5),  # of four tokens; the row's is for thousands, lambda would be 0
    "ppo-reward-model": on_reward_model,
    "tools": tools,
}
