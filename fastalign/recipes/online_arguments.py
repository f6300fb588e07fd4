"""The arguments of sampling and of online learning, torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SamplingArguments:
    """Sampling.

    Args:
        max_completion_length: most tokens of a completion.
        temperature: softmax temperature of sampling and of the trained log-probs; 0: greedy (generate and eval only).
        top_p: keep the smallest set of tokens with this probability; 1: off.
        top_k: keep the k most probable tokens; 0: off.
        min_p: keep tokens at least this fraction of the most probable one; 0: off.
        stop: text that ends a completion (repeatable).
        max_num_seqs: sequences decoded at once.
        kv_cache_tokens: tokens that the KV cache holds; 0: chosen from the work and free memory.
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)
    max_num_seqs: int = 256
    kv_cache_tokens: int = 0


@dataclass
class OnlineArguments:
    """Online reinforcement learning.

    Args:
        algorithm: a row of the table: grpo, rloo, dapo, …; ppo, vapo, …; empty: the command's name. `fastalign algorithms` lists them.
        num_generations: completions a prompt (the group's size G).
        num_iterations: optimizer passes over each rollout (mu).
        beta: coefficient of the KL penalty to the reference; unset: the algorithm's.
        kl_estimator: of the KL in the loss: k2, whose gradient is the KL's while samples are the policy's, or k3; empty: the algorithm's.
        epsilon: clip range below 1 (and above, unless epsilon_high); unset: the algorithm's.
        epsilon_high: clip range above 1; unset: the algorithm's, or epsilon.
        reward: a built-in (math, gsm8k, format, code), a reward model, judge:model=…, module:function, path.py:function (repeatable).
        reward_weights: one weight a reward; empty: 1 each.
        reward_combination: sum: weighted; gate: the first times the sum of the others; normalize: each over its group first, then the sum.
        reward_timeout: seconds one sample's reward may take.
        advantage: replaces the algorithm's advantage estimator by another row.
        loss: replaces the algorithm's policy loss by another row.
        share_backbone: with a LoRA adapter: the critic, and reward models that are adapters of the policy's base, share its weights.
        preference_loss: online_dpo's loss, a row of fastalign dpo --loss; its options are --beta and --loss.NAME; empty: dpo.
        aggregate: replaces the algorithm's aggregation: token, sequence or budget.
        entropy_coef: coefficient of the entropy bonus; unset: the algorithm's.
        rollout_quantization: int8: sample with 8-bit weights (CPU), train the weights as they are; none: sample with the weights.
        max_staleness: 1: sample each rollout while the step before updates, from a copy of the weights; 0: from the policy as it is.
        off_policy_objective: decoupled: ratios to the policy before the update, weighed by its to the sampler; plain: to the sampler.
        rollout_device: where the copy of --max_staleness 1 lies and samples, as in cuda:1; empty: beside the policy.
        reuse_forward: on the CPU the update takes the rollout's forward pass, where a completion computed anew agrees; false: never.
        importance_correction: weight of what another policy sampled; auto: truncate if stale or quantized, else the algorithm's.
        importance_correction_low: the mask corrections drop ratios below this; unset: the algorithm's, or 0.5.
        importance_correction_high: ratios are cut at this, or dropped above it by the mask corrections; unset: the algorithm's, or 2.
    """

    algorithm: str = ""
    num_generations: int = 8
    num_iterations: int = 1
    beta: float | None = None
    kl_estimator: str = ""
    epsilon: float | None = None
    epsilon_high: float | None = None
    reward: list[str] = field(default_factory=list)
    reward_weights: list[float] = field(default_factory=list)
    reward_combination: Literal["sum", "gate", "normalize"] = "sum"
    reward_timeout: float = 10.0
    advantage: str = ""
    loss: str = ""
    share_backbone: bool = False
    preference_loss: str = ""
    aggregate: str = ""
    entropy_coef: float | None = None
    rollout_quantization: Literal["none", "int8"] = "none"
    max_staleness: int = 0
    off_policy_objective: Literal["decoupled", "plain"] = "decoupled"
    rollout_device: str = ""
    reuse_forward: bool = True
    importance_correction: Literal["auto", "none", "truncate", "mask", "sequence_truncate", "sequence_mask"] = "auto"
    importance_correction_low: float | None = None
    importance_correction_high: float | None = None


@dataclass
class ProcessArguments:
    """Rewards on the way to the outcome.

    Args:
        step_reward: process_grpo's: a process reward model, or module:function or path.py:function of completions cut after each step.
        step_separator: text that ends a step of a completion; a process reward model brings its own; "": every token is a step.
        outcome_coef: weight of the outcome's advantage beside that of steps or tokens; unset: the algorithm's.
        prm_model_name_or_path: prime's: where the model of implicit rewards begins; empty: the policy's own weights.
        prm_learning_rate: of that model; unset: the policy's.
        prm_beta: a token's implicit reward is this times its log-ratio to where that model began; unset: the algorithm's.
    """

    step_reward: str = ""
    step_separator: str = "\\n"
    outcome_coef: float | None = None
    prm_model_name_or_path: str = ""
    prm_learning_rate: float | None = None
    prm_beta: float | None = None


@dataclass
class OpponentArguments:
    """Another policy to compare with.

    Args:
        exploration_coef: xpo's: what the log-prob of the reference's completion adds to the loss; unset: the algorithm's.
        mixture_coef: nash_md's: the reference's share of the opponent, 0 to 1, in the exponent; unset: the algorithm's.
    """

    exploration_coef: float | None = None
    mixture_coef: float | None = None


@dataclass
class EnvironmentArguments:
    """Turns with an environment.

    Args:
        environment: answers between turns: calculator, python, module:Class, path.py:Class, options behind another colon; empty: one turn.
        max_turns: most turns of a completion, which share --max_completion_length with the answers between them.
        environment_timeout: seconds that one call of the environment may take.
        environment_weight: weight of the environment's own reward, where it gives one.
    """

    environment: str = ""
    max_turns: int = 8
    environment_timeout: float = 10.0
    environment_weight: float = 1.0


@dataclass
class PPOArguments:
    """The critic, and what of an actor-critic method it serves.

    Args:
        critic_model_name_or_path: where the critic begins: a reward model or a causal language model; empty: the policy's own weights.
        critic_learning_rate: unset: the policy's.
        critic_warmup: first steps that train the critic alone; unset: the algorithm's.
        value_clip: how far a value may move from the one at sampling time; 0: anywhere; unset: the algorithm's.
        kl_in: where the KL to the reference goes: reward or loss; unset: the algorithm's.
        kl_target: the KL a sequence (nats) that beta is steered to; 0: beta is fixed; unset: the algorithm's.
        kl_horizon: samples over which beta is steered; unset: the algorithm's.
        whiten: advantages to mean 0 and deviation 1 over the batch; unset: the algorithm's.
        normalize_rewards: scores less their running mean, over their running deviation; unset: the algorithm's.
        reward_clip: scores are cut to plus and minus this; 0: not cut; unset: the algorithm's.
        nll_coef: coefficient of the NLL of samples with a positive score; unset: the algorithm's.
    """

    critic_model_name_or_path: str = ""
    critic_learning_rate: float | None = None
    critic_warmup: int | None = None
    value_clip: float | None = None
    kl_in: Literal["reward", "loss"] | None = None
    kl_target: float | None = None
    kl_horizon: int | None = None
    whiten: bool | None = None
    normalize_rewards: bool | None = None
    reward_clip: float | None = None
    nll_coef: float | None = None
