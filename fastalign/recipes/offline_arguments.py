"""The arguments of the offline commands beside those that every command shares, torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SupervisedArguments:
    """The supervised loss.

    Args:
        loss: a row of the table: nll, dft, rrhf (completions with scores); `fastalign algorithms` lists them.
        source_weights: NAME=WEIGHT (repeatable): what a record whose column `source` is NAME weighs in the loss (C-RLFT).
        source_prompts: NAME=TEXT (repeatable): text in front of the prompts of that source.
    """

    loss: str = "nll"
    source_weights: list[str] = field(default_factory=list)
    source_prompts: list[str] = field(default_factory=list)


@dataclass
class ReferenceArguments:
    """The reference policy, for losses that read one.

    Args:
        ref_model_name_or_path: the reference; empty: the model as it is before training (with an adapter: the adapter off).
        reference_cache: a folder for the reference's log-probs, kept by model and data; empty: output_dir/reference; none: not kept.
    """

    ref_model_name_or_path: str = ""
    reference_cache: str = ""


@dataclass
class PreferenceArguments:
    """The preference loss.

    Args:
        loss: one row of the table, or several to be mixed (repeatable): dpo, ipo, simpo, orpo, …; `fastalign algorithms` lists them.
        loss_weights: one weight a loss; empty: 1 each.
        beta: the loss's beta; unset: the row's.
        label_smoothing: share of labels taken to be flipped, for rows that read it; unset: the row's.
        f_divergence_type: the divergence to the reference in place of the reverse KL.
        f_alpha_divergence_coef: alpha of the alpha divergence.
        ld_alpha: what a token past the length of the pair's shorter completion counts (LD-DPO); 1: all alike.
        use_weighting: weigh each pair by how likely it is under the policy (WPO).
    """

    loss: list[str] = field(default_factory=lambda: ["dpo"])
    loss_weights: list[float] = field(default_factory=list)
    beta: float | None = None
    label_smoothing: float | None = None
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float = 1.0
    use_weighting: bool = False


@dataclass
class UnpairedArguments:
    """The loss of completions that are desirable or not.

    Args:
        loss: a row of the table: kto, bco, apo_zero_unpaired.
        beta: the loss's beta; unset: the row's.
        desirable_weight: what a desirable completion counts.
        undesirable_weight: what an undesirable completion counts.
    """

    loss: str = "kto"
    beta: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass
class RewardArguments:
    """The reward model.

    Args:
        loss: a row of the table: bradley_terry, plackett_luce, outcome, process, attributes; `fastalign algorithms` lists them.
        center_rewards_coefficient: coefficient of the squared sum of a pair's rewards, which keeps them around 0; 0: off.
        attributes: what an answer is graded by, each a column of numbers and, after =, its weight in the reward (attributes).
        step_separator: text behind every step, at whose end the step is scored (process).
        step_aggregation: how the saved model's steps make one reward: product, min, last or sum of their probabilities (process).
    """

    loss: str = "bradley_terry"
    center_rewards_coefficient: float = 0.0
    attributes: list[str] = field(default_factory=list)
    step_separator: str = "\\n"
    step_aggregation: Literal["product", "min", "last", "sum"] = "product"


@dataclass
class DistillArguments:
    """The teacher.

    Args:
        teacher_model_name_or_path: the teacher: the student's vocabulary, any width.
        loss: a row of the table: forward_kl, reverse_kl, jsd.
        jsd_beta: the generalized Jensen-Shannon divergence's beta; 0: forward KL, 1: reverse KL.
        lmbda: share of the steps whose completions the student samples itself (GKD's lambda); 1: the data need prompts only.
        divergence_temperature: softmax temperature of both distributions; unset: that of sampling.
    """

    teacher_model_name_or_path: str = ""
    loss: str = "jsd"
    jsd_beta: float = 0.5
    lmbda: float = 0.5
    divergence_temperature: float | None = None


@dataclass
class RejectionArguments:
    """Rejection sampling.

    Args:
        loss: the supervised loss of what is kept: a row of the table: nll, dft, rrhf (ranks the kept completions of a prompt).
        num_generations: completions sampled a prompt.
        num_kept: the best completions a prompt that are trained on.
        min_reward: completions below are never kept; unset: no bound.
        num_rounds: rounds of sampling, scoring and training, which share max_steps; with --max_steps 0 one round only samples.
        prompts_per_round: prompts sampled from in a round; 0: all.
        reward: a built-in (math, gsm8k, format, code), a reward model, judge:model=…, module:function, path.py:function (repeatable).
        reward_weights: one weight a reward; empty: 1 each.
        reward_timeout: seconds one sample's reward may take.
    """

    loss: str = "nll"
    num_generations: int = 8
    num_kept: int = 1
    min_reward: float | None = None
    num_rounds: int = 1
    prompts_per_round: int = 0
    reward: list[str] = field(default_factory=list)
    reward_weights: list[float] = field(default_factory=list)
    reward_timeout: float = 10.0
