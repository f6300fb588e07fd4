"""The table of online algorithms: a row names one advantage, one policy loss, one aggregation, one KL placement.

The loop never asks for an algorithm's name; what distinguishes two algorithms is here.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .advantages import ADVANTAGES, TOKEN_ADVANTAGES
from .losses.policy import AGGREGATES, KL, POLICY
from .losses.preference import PREFERENCE


@dataclass(frozen=True)
class Algorithm:
    """One row.

    Attributes:
        advantage: a row of `ADVANTAGES`, with its own arguments in `advantage_options`.
        loss: a row of `POLICY`, with its own arguments in `loss_options`.
        aggregate: how tokens become a scalar: "token", "sequence" or "budget".
        kl_coef: coefficient of the KL to the reference, in the loss; 0: no reference model at all.
        kl: a row of `KL`.
        entropy_coef: coefficient of the entropy bonus.
        correction_options: weight of what another policy sampled: the `correction` arguments of `ops.policy.PolicyOptions`.
        dynamic_sampling: refill the batch until every group has mixed rewards (DAPO, §3.2).
        overlong_buffer: last fraction of the completion budget over which a completion loses up to 1 reward (DAPO, Eq. 13); 0: off.
    """

    advantage: str = "grpo"
    loss: str = "clip"
    aggregate: str = "sequence"
    kl_coef: float = 0.0
    kl: str = "k3"
    entropy_coef: float = 0.0
    dynamic_sampling: bool = False
    overlong_buffer: float = 0.0
    advantage_options: Mapping[str, Any] = field(default_factory=dict)
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    correction_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reads_reference(self) -> bool:
        """Whether there has to be a reference."""
        return self.kl_coef > 0


@dataclass(frozen=True)
class ActorCritic(Algorithm):
    """A row with a critic: `advantage` names a row of `TOKEN_ADVANTAGES`.

    Attributes:
        kl_in: where the KL to the reference goes: "reward" (k1 a token, from the rewards) or "loss" (the estimator `kl`).
        whiten: advantages to mean 0 and deviation 1 over the batch's tokens.
        value_clip: a value moves at most this far from the one at sampling time (arXiv:1707.06347's authors' code); None: not clipped.
        critic_warmup: first steps that train the critic alone.
        normalize_rewards: scores less their running mean, over their running deviation (PPO-max, arXiv:2307.04964, section 5.3).
        reward_clip: scores are cut to plus and minus this, after that; 0: not cut.
        kl_target: the KL a sequence (nats) that kl_coef is steered to (Ziegler et al., arXiv:1909.08593, section 2.2); 0: fixed.
        kl_horizon: samples over which the steering works.
        nll_coef: coefficient of the NLL of samples with a positive score (VAPO, arXiv:2504.05118, section 4.3).
    """

    kl_in: str = "reward"
    whiten: bool = True
    value_clip: float | None = 0.2
    critic_warmup: int = 0
    normalize_rewards: bool = False
    reward_clip: float = 0.0
    kl_target: float = 0.0
    kl_horizon: int = 10_000
    nll_coef: float = 0.0


@dataclass(frozen=True)
class StepSupervised(Algorithm):
    """A row with a reward at the end of every step, and no critic: each token has an advantage of its own.

    Attributes:
        dense: a row of `DENSE_ADVANTAGES`, over steps, with its own arguments in `dense_options`.
        outcome_coef: weight of the outcome's group advantage (`advantage`), which is added to every token's; 0: steps alone.
    """

    dense: str = "process"
    outcome_coef: float = 0.0
    dense_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImplicitReward(StepSupervised):
    """A row whose steps are tokens and whose rewards are a model's that learns beside the policy from outcomes alone.

    Attributes:
        prm_beta: a token's reward is prm_beta log(π_prm / π_ref), nats.
        prm_threshold: an outcome over this is right, for the model's cross-entropy.
    """

    dense: str = "prime"
    outcome_coef: float = 1.0
    prm_beta: float = 0.05
    prm_threshold: float = 0.5


@dataclass(frozen=True)
class OnlinePreference(Algorithm):
    """A row that compares a group's best and worst completion; it has neither advantages nor a policy loss.

    Attributes:
        preference: a row of `losses.preference.PREFERENCE`, with its own arguments in `preference_options`.
    """

    preference: str = "dpo"
    preference_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reads_reference(self) -> bool:
        return PREFERENCE[self.preference].reference


@dataclass(frozen=True)
class Exploring(OnlinePreference):
    """A row whose pairs are a completion of the policy's and one of the reference's, which it is driven away from.

    Attributes:
        exploration_coef: what the log-prob of the reference's completion adds to the loss (XPO's alpha).
    """

    exploration_coef: float = 1e-5

    @property
    def reads_reference(self) -> bool:
        return True


@dataclass(frozen=True)
class MixturePlay(Algorithm):
    """A row whose advantage is how often a completion is preferred to those of an opponent: policy and reference, geometrically mixed.

    Attributes:
        mixture_coef: the reference's share of the opponent, in the exponent.
    """

    mixture_coef: float = 0.125

    @property
    def reads_reference(self) -> bool:
        return True


GRPO = Algorithm(kl_coef=0.04, loss_options={"epsilon": 0.2})
DR_GRPO = replace(GRPO, advantage="dr_grpo", aggregate="budget", kl_coef=0.0)
RLOO = replace(GRPO, advantage="rloo", aggregate="budget", kl_coef=0.05)  # a completion is one action: its log-probs are added up
DAPO = replace(
    GRPO,
    aggregate="token",
    kl_coef=0.0,
    loss_options={"epsilon": 0.2, "epsilon_high": 0.28},
    dynamic_sampling=True,
    overlong_buffer=0.2,
)
GSPO = replace(GRPO, loss="gspo", kl_coef=0.0, loss_options={})
CISPO = replace(GRPO, loss="cispo", aggregate="token", kl_coef=0.0, loss_options={})
REINFORCE = replace(GRPO, advantage="reinforce", loss="reinforce", aggregate="budget", kl_coef=0.0, loss_options={})
REINFORCE_PP = replace(GRPO, advantage="reinforce_pp", aggregate="token", kl_coef=0.01)
REMAX = replace(REINFORCE, advantage="remax")
OPO = replace(REINFORCE, advantage="opo", aggregate="token")
MAXRL = replace(GRPO, advantage="maxrl", aggregate="token", kl_coef=0.0)
PASSK = replace(GRPO, advantage="passk", aggregate="token", kl_coef=0.0)
RAFT = replace(REINFORCE, loss="raft", aggregate="token")
RAFT_PP = replace(RAFT, loss="raft_pp", loss_options={"epsilon": 0.2})
PPO = ActorCritic(advantage="gae", aggregate="token", kl_coef=0.05, kl="k2", loss_options={"epsilon": 0.2})
PPO_MAX = replace(PPO, normalize_rewards=True, reward_clip=5.0, critic_warmup=50)
VC_PPO = replace(PPO, critic_warmup=50, advantage_options={"lam_critic": 1.0})
VAPO = replace(
    VC_PPO,
    kl_coef=0.0,
    loss_options={"epsilon": 0.2, "epsilon_high": 0.28},
    advantage_options={"lam_critic": 1.0, "alpha": 0.05},
    nll_coef=0.1,
)
REFT = replace(PPO, kl_coef=0.01)  # the paper's for programs as reasoning; 0.05 for prose, which is PPO's row
PROCESS_GRPO = StepSupervised(kl_coef=0.04, loss_options={"epsilon": 0.2})
PRIME = ImplicitReward(advantage="rloo", aggregate="token", dynamic_sampling=True, loss_options={"epsilon": 0.2})
ONLINE_DPO = OnlinePreference(preference_options={"beta": 0.1})
XPO = Exploring(preference_options={"beta": 0.1})
NASH_MD = MixturePlay(advantage="reinforce", loss="reinforce", aggregate="budget", kl_coef=0.008)

ALGORITHMS: dict[str, Algorithm] = {
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "rloo": RLOO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "reinforce": REINFORCE,
    "reinforce_pp": REINFORCE_PP,
    "remax": REMAX,
    "opo": OPO,
    "maxrl": MAXRL,
    "passk": PASSK,
    "raft": RAFT,
    "raft_pp": RAFT_PP,
    "process_grpo": PROCESS_GRPO,
    "prime": PRIME,
    "online_dpo": ONLINE_DPO,
    "xpo": XPO,
    "nash_md": NASH_MD,
}
ACTOR_CRITICS: dict[str, ActorCritic] = {"ppo": PPO, "ppo_max": PPO_MAX, "vc_ppo": VC_PPO, "vapo": VAPO, "reft": REFT}


def row(table: Mapping[str, Any], name: str, what: str) -> Any:
    """The row of a table, or a ValueError that names the nearest ones."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.4)
    raise ValueError(
        f"{what}: no row named {name!r}; " + (f"did you mean {', '.join(near)}? " if near else "") + f"Rows: {', '.join(table)}"
    )


def check_options(function: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    """Raises a ValueError when an option is not a keyword-only argument of the function, or no number where its default is one."""
    known = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{what}: {function.__name__} has no option {name!r}; {hint}Options: {', '.join(known) or 'none'}")
        whole = type(known[name]) is int and isinstance(value, float)
        if value is not None and type(known[name]) in (int, float) and (whole or not isinstance(value, (int, float))):
            raise ValueError(f"{what}.{name}: expected a {'whole ' * whole}number, as in {known[name]}; got {value!r}")


def resolve(
    name: str,
    *,
    advantage: str = "",
    loss: str = "",
    aggregate: str = "",
    kl_coef: float | None = None,
    kl: str = "",
    advantage_options: Mapping[str, Any] | None = None,
    loss_options: Mapping[str, Any] | None = None,
    preference: str = "",
) -> Algorithm:
    """A row with parts replaced by other rows or by options, all checked.

    Replacing the loss or the advantage drops the options that the row had for it. Of a row that compares completions, kl_coef is beta,
    the loss options are those of the preference loss, and advantage, loss and aggregate are not read: naming one is an error.
    """
    base: Algorithm = row(ALGORITHMS | ACTOR_CRITICS, name, "algorithm")
    if isinstance(base, OnlinePreference):
        parts = {"advantage": advantage or advantage_options, "loss": loss, "aggregate": aggregate, "kl_estimator": kl}
        for flag, given in parts.items():
            if given:
                raise ValueError(f"--{flag}: {name} compares a group's best and worst completion, it has no {flag}; see --preference_loss")
        return _compared(base, preference, kl_coef, loss_options or {})
    if isinstance(base, MixturePlay) and (advantage or advantage_options or kl):
        raise ValueError(f"--{'kl_estimator' if kl else 'advantage'}: {name}'s advantage is its own, with the KL in it; leave it out")
    if preference:
        raise ValueError(f"--preference_loss: {name} compares no completions; give --algorithm online_dpo")
    own_loss = {} if loss and loss != base.loss else dict(base.loss_options)
    own_advantage = {} if advantage and advantage != base.advantage else dict(base.advantage_options)
    chosen = replace(
        base,
        advantage=advantage or base.advantage,
        loss=loss or base.loss,
        aggregate=aggregate or base.aggregate,
        kl_coef=base.kl_coef if kl_coef is None else kl_coef,
        kl=kl or base.kl,
        advantage_options=own_advantage | dict(advantage_options or {}),
        loss_options=own_loss | dict(loss_options or {}),
    )
    estimators: Mapping[str, Any] = TOKEN_ADVANTAGES if isinstance(base, ActorCritic) else ADVANTAGES
    check_options(row(estimators, chosen.advantage, "advantage"), chosen.advantage_options, "--advantage")
    check_options(row(POLICY, chosen.loss, "loss").function, chosen.loss_options, "--loss")
    row(dict.fromkeys(AGGREGATES), chosen.aggregate, "aggregate")
    row(KL, chosen.kl, "kl_estimator")
    if chosen.kl == "k1":
        raise ValueError("--kl_estimator k1: the gradient of k1 in a loss is 0 on average, it holds nothing back; take k2 or k3")
    if chosen.kl_coef < 0:
        raise ValueError(f"--beta must be >= 0, got {chosen.kl_coef}")
    return chosen


def _compared(base: OnlinePreference, preference: str, beta: float | None, options: Mapping[str, Any]) -> OnlinePreference:
    name = preference or base.preference
    chosen = row(PREFERENCE, name, "preference_loss")
    if chosen.couples_pairs or chosen.statistics is not None:
        raise ValueError(f"--preference_loss {name}: it needs numbers of a whole batch of pairs; give one that judges pairs one by one")
    own = dict(base.preference_options) if name == base.preference else {}
    own |= ({} if beta is None else {"beta": beta}) | dict(options)
    check_options(chosen.function, own, "--loss")
    return replace(base, preference=name, preference_options=own, kl_coef=0.0)
