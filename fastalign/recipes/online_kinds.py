"""Which task runs a row: by the kind of the row, never by its name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..algorithms import Algorithm, Exploring, ImplicitReward, MixturePlay, OnlinePreference, StepSupervised
from .arguments import Arguments
from .online_preference import OnlinePreferenceTask
from .online_task import OnlineTask
from .opponent_tasks import ExploringTask, MixtureTask
from .opponents import MixtureOpponent, ReferenceOpponent
from .prime_task import PrimeTask
from .process_rewards import PRM, implicit_model, step_judge
from .setup import Loaded
from .step_task import StepTask

# section of the arguments → flag → the kinds of rows that read it
_READ: dict[str, dict[str, tuple[type[Algorithm], ...]]] = {
    "process": {
        "step_reward": (StepSupervised,),
        "step_separator": (StepSupervised,),
        "outcome_coef": (StepSupervised, ImplicitReward),
        "prm_model_name_or_path": (ImplicitReward,),
        "prm_learning_rate": (ImplicitReward,),
        "prm_beta": (ImplicitReward,),
    },
    "opponent": {"exploration_coef": (Exploring,), "mixture_coef": (MixturePlay,)},
}


def with_own_options(algorithm: Algorithm, args: Arguments) -> Algorithm:
    """The row with what the flags of its kind replace in it.

    Raises:
        ValueError: a flag that the row does not read, or one that it needs.
    """
    changes: dict[str, Any] = {}
    for section, flags in _READ.items():
        given = getattr(args, section)
        for name, kinds in flags.items():
            value = getattr(given, name)
            if value == getattr(type(given)(), name):
                continue
            if type(algorithm) not in kinds:
                raise ValueError(f"--{name}: the algorithm does not read it; {_readers(kinds)} does")
            if hasattr(algorithm, name):
                changes[name] = value
    if isinstance(algorithm, Exploring | MixturePlay) and args.environment.environment:
        name = _readers((type(algorithm),))
        raise ValueError(f"--environment {args.environment.environment}: {name} compares with another policy, which has no turns")
    if type(algorithm) is StepSupervised and not args.process.step_reward:
        raise ValueError(
            "--step_reward is required: a process reward model's folder, module:function or path.py:function of completions cut after"
            " each step"
        )
    return replace(algorithm, **changes)


def _readers(kinds: tuple[type[Algorithm], ...]) -> str:
    from ..algorithms import ALGORITHMS

    return " or ".join(name for name, row in ALGORITHMS.items() if type(row) in kinds)


def task_of(algorithm: Algorithm, args: Arguments, loaded: Loaded, parts: dict[str, Any], max_steps: int) -> OnlineTask:
    """The task of a row, with what its kind needs beside an online task's own parts.

    Args:
        parts: what every online task is made of (`online.parts_of`).
    """
    if isinstance(algorithm, ImplicitReward):
        task = PrimeTask(prm=implicit_model(args, loaded, algorithm, max_steps), **parts)
        task.companions[PRM] = (task.prm.updater, loaded.tokenizer)
        return task
    if isinstance(algorithm, StepSupervised):
        judge, separator = step_judge(args, loaded)
        return StepTask(step_reward=judge, separator=separator, **parts)
    sampling = {"kv_cache_tokens": args.sampling.kv_cache_tokens or None, "max_num_seqs": args.sampling.max_num_seqs}
    if isinstance(algorithm, Exploring):
        return ExploringTask(opponent=ReferenceOpponent(parts["reference"], loaded.tokenizer, **sampling), **parts)
    if isinstance(algorithm, MixturePlay):
        mixture = MixtureOpponent(loaded.model, parts["reference"], loaded.tokenizer, algorithm.mixture_coef, **sampling)
        return MixtureTask(opponent=mixture, **parts)
    return (OnlinePreferenceTask if isinstance(algorithm, OnlinePreference) else OnlineTask)(**parts)
