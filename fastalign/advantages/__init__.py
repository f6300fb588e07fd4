"""Advantages: of groups one a sequence (`ADVANTAGES`), of tokens and steps one each (`TOKEN_ADVANTAGES`, `DENSE_ADVANTAGES`)."""

from ..ops.scan import discounted_returns, gae
from .groups import (
    ADVANTAGES,
    OF_SCALE,
    READS,
    dr_grpo,
    grpo,
    lite_ppo,
    maxrl,
    opo,
    passk,
    reinforce,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    rloo,
)
from .tokens import DENSE_ADVANTAGES, TOKEN_ADVANTAGES, generalized, prime, process

__all__ = [
    "ADVANTAGES",
    "DENSE_ADVANTAGES",
    "OF_SCALE",
    "READS",
    "TOKEN_ADVANTAGES",
    "discounted_returns",
    "dr_grpo",
    "gae",
    "generalized",
    "grpo",
    "lite_ppo",
    "maxrl",
    "opo",
    "passk",
    "prime",
    "process",
    "reinforce",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "rloo",
]
