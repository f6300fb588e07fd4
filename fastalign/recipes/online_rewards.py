"""The rewards of an online run: the flags', the row's own, and which combinations of them the row can read."""

from __future__ import annotations

from ..advantages import OF_SCALE
from ..algorithms import Algorithm, Exploring, ImplicitReward, MixturePlay
from ..data import Prompt
from ..rewards import RewardSet, load_rewards
from .arguments import Arguments, OnlineArguments
from .model_rewards import with_reward_models
from .samplers import sampler_of
from .setup import Loaded


def rewards_of(args: Arguments, algorithm: Algorithm, loaded: Loaded) -> RewardSet:
    """The rewards that the flags name (reward models, too), and the row's soft overlong punishment (DAPO, arXiv:2503.14476, Eq. 13)."""
    online, limit, shaping = args.online, args.sampling.max_completion_length, []
    check_combination(online, algorithm)
    specifications = with_reward_models(online.reward, loaded)
    if algorithm.overlong_buffer:
        shaping = [f"overlong:max_length={limit},buffer={max(1, round(algorithm.overlong_buffer * limit))}"]
    if not (specifications or shaping):
        return RewardSet([], [])  # the environment's own is the only one
    combination = online.reward_combination
    return load_rewards(specifications, online.reward_weights or None, online.reward_timeout, combination=combination, shaping=shaping)


def check_combination(online: OnlineArguments, algorithm: Algorithm) -> None:
    """Raises ValueError for a combination of rewards with nothing to combine, or under which the row would compare unlike numbers."""
    if online.reward_combination == "sum":
        return
    flag = f"--reward_combination {online.reward_combination}"
    if not online.reward:
        raise ValueError(f"{flag}: there is no --reward to combine; an environment's own is added up as it is")
    of_scale = algorithm.advantage in OF_SCALE or isinstance(algorithm, (Exploring, MixturePlay, ImplicitReward))
    if online.reward_combination == "normalize" and of_scale:
        raise ValueError(
            f"{flag}: rewards become relative to their own group, and this algorithm compares them with others (the greedy completion's, "
            "another policy's, a threshold); take sum or gate"
        )


def check_rewards(args: Arguments, algorithm: Algorithm, loaded: Loaded, *data: list[Prompt]) -> None:
    """Raises before anything is sampled when a reward or the environment does not load or lacks a column."""
    sampler_of(args.environment, *data)
    with rewards_of(args, algorithm, loaded) as rewards:
        for prompts in data:
            if prompts:
                rewards.check_columns(sorted({name for prompt in prompts for name in prompt.columns}))
