"""Reward models among the rewards that flags name: --reward FOLDER."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import nn

from ..judges.reward_model import RewardModel, reward_name
from ..models.reward import is_reward_model
from ..rewards.callers import InProcess
from ..rewards.isolation import IsolatedReward
from ..rewards.reward_set import Reward
from ..rewards.specifications import Specification
from .setup import Loaded

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_loaded: WeakKeyDictionary[nn.Module, dict[str, RewardModel]] = WeakKeyDictionary()  # by policy: a run loads each of its judges once


def with_reward_models(specifications: Sequence[str], policy: Loaded) -> list[Specification]:
    """The specifications for `load_rewards`, every folder or Hub name of a reward model replaced by the reward itself.

    Args:
        specifications: as --reward gives them.
        policy: whose device the reward models share, and whose token ids they reuse where their tokenizer is the same.

    Raises:
        ValueError: a folder that is no reward model, or one that does not load.
    """
    return [_reward(specification, policy) if names_model(specification) else specification for specification in specifications]


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
    known = _loaded.setdefault(policy.model, {})
    if specification not in known:
        known[specification] = RewardModel.load(specification, policy.tokenizer, device=policy.device)
    name = reward_name(specification)
    return Reward(name, IsolatedReward(name, InProcess(known[specification])))
