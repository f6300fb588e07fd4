"""Rewards that need a model among those that flags name: --reward FOLDER of a reward model, --reward judge:model=…"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..judges.reward_model import RewardModel, reward_name
from ..models.reward import is_reward_model
from ..rewards.callers import InProcess
from ..rewards.isolation import IsolatedReward
from ..rewards.reward_set import Reward
from ..rewards.specifications import Specification
from .judging import InJudge, JudgeOptions, build_grader, names_judge
from .setup import Loaded
from .sharing import reward_model

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_loaded: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()  # by policy: a run loads each of its judges once


def with_reward_models(specifications: Sequence[str], policy: Loaded) -> list[Specification]:
    """The specifications for `load_rewards`, reward models and judges replaced by the rewards themselves.

    Args:
        specifications: as --reward gives them.
        policy: whose device the models share, and whose token ids a reward model reuses where its tokenizer is the same.

    Raises:
        ValueError: a folder that is no reward model, or one that does not load; as `build_grader`.
    """
    rewards: list[Specification] = []
    for specification in specifications:
        if names_judge(specification):
            rewards.append(_judge(specification, policy))
        else:
            rewards.append(_reward(specification, policy) if names_model(specification) else specification)
    return rewards


def reward_modules(policy: Loaded) -> list[nn.Module]:
    """The reward models that were loaded for a policy."""
    known = _loaded.get(policy.model, {}) | (policy.shared or {})
    return [judge.model for judge in known.values() if isinstance(judge, RewardModel)]


def _judge(specification: str, policy: Loaded) -> Reward:
    known = _loaded.setdefault(policy.model, {})
    judge = known.get(specification) or build_grader(specification, policy)
    if not JudgeOptions.parse(specification).is_self:  # that one loads nothing, and would hold on to the policy
        known[specification] = judge
    return Reward("judge", IsolatedReward("judge", InJudge(judge)))


def names_model(specification: str, flag: str = "--reward") -> bool:
    """Whether a specification is a reward model's folder or Hub name.

    Raises:
        ValueError: a folder that is no reward model.
    """
    if not Path(specification).is_dir():
        return bool(_HUB_NAME.fullmatch(specification)) and not specification.endswith(".py")
    if not is_reward_model(specification):
        raise ValueError(
            f"{flag} {specification}: expected the folder of a reward model (a sequence classifier, as fastalign reward writes it); "
            "a function is module:function or path.py:function"
        )
    return True


def _reward(specification: str, policy: Loaded) -> Reward:
    known = _loaded.setdefault(policy.model, {}) if policy.shared is None else policy.shared
    if specification not in known:
        known[specification] = reward_model(policy, specification, f"reward_{len(known)}")
    name = reward_name(specification)
    return Reward(name, IsolatedReward(name, InProcess(known[specification])))
