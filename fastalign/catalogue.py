"""The names of the tables' rows, their papers and help, without torch: what -h and error messages need.

The rows themselves are beside their equations (algorithms.py, advantages/, losses/); a test keeps both in agreement.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What is said about a row.

    Attributes:
        help: one line.
        paper: where the equation comes from; empty where there is none.
        options: its own keyword arguments, given as --loss.NAME or --advantage.NAME.
        trl: what TRL calls it, where no row has that name.
    """

    help: str
    paper: str = ""
    options: tuple[str, ...] = ()
    trl: str = ""


ALGORITHMS: dict[str, Entry] = {
    "grpo": Entry("z-scored group rewards, clipped ratio, sequence mean, KL to the reference", "arXiv:2402.03300"),
    "dr_grpo": Entry("GRPO without its two biases: no division by the deviation, constant token budget", "arXiv:2503.20783"),
    "rloo": Entry("each reward against the mean of the group's others", "arXiv:2402.14740"),
    "dapo": Entry("clip-higher, token mean, no KL, dynamic sampling, soft overlong punishment", "arXiv:2503.14476"),
    "gspo": Entry("one clipped ratio a sequence", "arXiv:2507.18071"),
    "cispo": Entry("REINFORCE weighted by the clipped, detached ratio: no token's gradient is lost", "arXiv:2506.13585"),
    "reinforce": Entry("the reward times the gradient of the log-probability, no baseline", "Williams 1992"),
    "reinforce_pp": Entry("rewards normalized over the global batch", "arXiv:2501.03262"),
    "remax": Entry("REINFORCE with the greedy completion's reward as the baseline", "arXiv:2310.10505"),
    "opo": Entry("exact on-policy gradient with the baseline of least variance, no KL", "arXiv:2505.23585"),
    "maxrl": Entry("the group's rewards over their mean: maximum likelihood of being right", "arXiv:2602.02710"),
    "passk": Entry("Pass@k training: a group is rewarded for its subsets of k", "arXiv:2508.10751"),
    "raft": Entry("likelihood of the samples that are rewarded", "arXiv:2304.06767"),
    "raft_pp": Entry("RAFT with PPO's clipped ratio, for several passes over a rollout", "arXiv:2504.11343"),
    "process_grpo": Entry("GRPO with a reward at the end of every step (--step_reward)", "arXiv:2402.03300"),
    "prime": Entry("RLOO of outcomes and of implicit token rewards, whose model learns beside the policy", "arXiv:2502.01456"),
    "online_dpo": Entry("a preference loss of each group's best and worst completion (--preference_loss)", "arXiv:2402.04792"),
    "xpo": Entry("online DPO against the reference's completions, which it is driven away from", "arXiv:2405.21046"),
    "nash_md": Entry("how often it is preferred to a mixture of policy and reference, less the KL", "arXiv:2312.00886"),
}

ADVANTAGES: dict[str, Entry] = {
    "grpo": Entry("(reward - group mean) / (group deviation + eps)", "arXiv:2402.03300", ("eps",)),
    "dr_grpo": Entry("reward - group mean", "arXiv:2503.20783"),
    "rloo": Entry("reward - mean of the group's other rewards", "arXiv:2402.14740"),
    "reinforce": Entry("the reward itself", "Williams 1992"),
    "reinforce_pp": Entry("reward normalized over the global batch", "arXiv:2501.03262", ("eps",)),
    "reinforce_pp_baseline": Entry("reward - group mean, then normalized over the global batch", "arXiv:2501.03262", ("eps",)),
    "lite_ppo": Entry("(reward - group mean) / (deviation of the batch's rewards + eps)", "arXiv:2508.08221", ("eps",)),
    "opo": Entry("reward - mean of the group weighted by length, the baseline of least variance", "arXiv:2505.23585"),
    "remax": Entry("reward - that of the prompt's greedy completion, sampled beside the group", "arXiv:2310.10505"),
    "maxrl": Entry("(reward - group mean) / group mean: towards the likelihood of being right", "arXiv:2602.02710"),
    "passk": Entry("mean advantage over all subsets of k samples, which pass where one is right", "arXiv:2508.10751", ("k", "threshold")),
}

ACTOR_CRITICS: dict[str, Entry] = {
    "ppo": Entry("a critic, KL in the rewards, GAE, clipped ratio and clipped values", "arXiv:1707.06347"),
    "ppo_max": Entry("PPO with normalized and cut scores and a critic that is trained first", "arXiv:2307.04964"),
    "vc_ppo": Entry("PPO with a critic that is trained first, on undiscounted returns", "arXiv:2503.01491"),
    "vapo": Entry("VC-PPO with lambda by length, clip-higher, NLL of right samples, no KL", "arXiv:2504.05118"),
    "reft": Entry("PPO behind an SFT warm-up, rewarded for the answer (--reward math:partial=0.1)", "arXiv:2401.08967"),
}

TOKEN_ADVANTAGES: dict[str, Entry] = {
    "gae": Entry("generalized advantage estimation of token rewards", "arXiv:1506.02438", ("gamma", "lam", "lam_critic", "alpha")),
}

DENSE_ADVANTAGES: dict[str, Entry] = {
    "process": Entry("step rewards z-scored over all steps of the group, summed to go", "arXiv:2402.03300", ("eps",)),
    "prime": Entry("implicit token rewards less the mean of the group's others, summed to go", "arXiv:2502.01456", ("gamma",)),
}

POLICY_LOSSES: dict[str, Entry] = {
    "clip": Entry("PPO's clipped surrogate, with clip-higher and dual clip", "arXiv:1707.06347", ("epsilon", "epsilon_high", "dual_clip")),
    "reinforce": Entry("-A log p", "Williams 1992"),
    "gspo": Entry("clipped ratio of whole sequences", "arXiv:2507.18071", ("epsilon", "epsilon_high")),
    "gspo_token": Entry("GSPO's ratio in value, each token's own gradient", "arXiv:2507.18071", ("epsilon", "epsilon_high")),
    "cispo": Entry("-clip(ratio), detached, times A log p", "arXiv:2506.13585", ("epsilon", "epsilon_high")),
    "sapo": Entry("a soft gate of the ratio instead of a clip", "arXiv:2511.20347", ("tau_positive", "tau_negative")),
    "gmpo": Entry("geometric mean of a sequence's limited ratios", "arXiv:2507.20673", ("epsilon",)),
    "raft": Entry("-log p of the samples with a positive advantage", "arXiv:2304.06767"),
    "raft_pp": Entry("RAFT with PPO's clipped ratio", "arXiv:2504.11343", ("epsilon", "epsilon_high")),
    "self_imitation": Entry("-max(A, 0) log p", "arXiv:1806.05635"),
}

_SMOOTHED = ("beta", "label_smoothing")

PREFERENCE_LOSSES: dict[str, Entry] = {
    "dpo": Entry("-log sigmoid of the reward margin; label_smoothing makes it cDPO", "arXiv:2305.18290", _SMOOTHED, trl="sigmoid"),
    "robust": Entry("DPO, unbiased when a share label_smoothing of the labels is flipped", "arXiv:2403.00409", _SMOOTHED),
    "ipo": Entry("squared distance of the margin to 1 / (2 beta), whole completions", "arXiv:2310.12036", ("beta",)),
    "ipo_avg": Entry("IPO of log-ratios a token, TRL's ipo", "arXiv:2310.12036", ("beta",)),
    "hinge": Entry("hinge of the reward margin (RSO's hinge-norm)", "arXiv:2309.06657", ("beta",)),
    "slic": Entry("hinge of log-probs without a reference, and NLL of the chosen", "arXiv:2305.10425", ("delta", "nll_coef")),
    "rso": Entry("DPO's equation for pairs that come from rejection sampling", "arXiv:2309.06657", ("beta",)),
    "spin": Entry("DPO's equation for ground truth against the previous model's samples", "arXiv:2401.01335", ("beta",)),
    "dpo_norm": Entry("DPO of log-ratios a token", "arXiv:2411.15124", ("beta",), trl="sigmoid_norm"),
    "exo_pair": Entry("reverse KL to the smoothed label", "arXiv:2402.00856", _SMOOTHED),
    "nca_pair": Entry("noise contrastive: each reward on its own, against itself", "arXiv:2402.05369", ("beta",)),
    "bco_pair": Entry("binary classifier of each completion, around a running reward shift", "arXiv:2404.04656", ("beta", "shift")),
    "sppo_hard": Entry("self-play: log-ratios to plus and minus 1 / (2 beta)", "arXiv:2405.00675", ("beta",)),
    "aot": Entry("sorted margins against the reference's sorted margins", "arXiv:2406.05882", (*_SMOOTHED, "matched")),
    "aot_unpaired": Entry(
        "sorted chosen against sorted rejected log-ratios", "arXiv:2406.05882", (*_SMOOTHED, "matched_win", "matched_lose")
    ),
    "apo_zero": Entry("raises the chosen, lowers the rejected", "arXiv:2408.06266", ("beta",)),
    "apo_down": Entry("lowers both, the rejected more", "arXiv:2408.06266", ("beta",)),
    "discopop": Entry("a discovered blend of the logistic and the exponential loss", "arXiv:2406.08414", ("beta", "tau")),
    "simpo": Entry("log-probs a token with a target margin, no reference", "arXiv:2405.14734", ("beta", "gamma", "label_smoothing")),
    "cpo": Entry("DPO without a reference, and NLL of the chosen", "arXiv:2401.08417", ("beta", "nll_coef", "label_smoothing")),
    "cpo_simpo": Entry("SimPO, and NLL of the chosen", "arXiv:2401.08417", ("beta", "gamma", "nll_coef", "label_smoothing")),
    "alphapo": Entry("SimPO with the reward's shape as a parameter", "arXiv:2501.03884", ("beta", "gamma", "alpha", "label_smoothing")),
    "orpo": Entry("NLL of the chosen and the odds ratio, no reference", "arXiv:2403.07691", ("beta",)),
    "sft": Entry("NLL of the chosen, for mixtures"),
}

_WEIGHTED = ("beta", "desirable_weight", "undesirable_weight")

UNPAIRED_LOSSES: dict[str, Entry] = {
    "kto": Entry("sigmoid of each reward against the KL to the reference", "arXiv:2402.01306", (*_WEIGHTED, "z_ref")),
    "bco": Entry("binary classifier of each completion, around a running reward shift", "arXiv:2404.04656", (*_WEIGHTED, "shift")),
    "apo_zero_unpaired": Entry("raises desirable completions, lowers the others", "arXiv:2408.06266", _WEIGHTED),
}

SUPERVISED_LOSSES: dict[str, Entry] = {
    "nll": Entry("the negative log-likelihood, weighted by the record's weight", "arXiv:2308.12050"),
    "dft": Entry("each token's NLL times its own probability, detached", "arXiv:2508.05629"),
    "rrhf": Entry("completions ranked as their scores are, and NLL of the best", "arXiv:2304.05302", ("length_penalty", "sft_coef")),
}

REWARD_LOSSES: dict[str, Entry] = {
    "bradley_terry": Entry("-log sigmoid of the reward difference, over all pairs of a ranking", "arXiv:2203.02155"),
    "plackett_luce": Entry("-log of the probability of the whole ranking", "Plackett 1975"),
    "outcome": Entry("binary cross-entropy of each completion's label", "arXiv:2110.14168"),
    "process": Entry("binary cross-entropy of each step's label", "arXiv:2305.20050"),
    "attributes": Entry("squared error of several scores of one answer: helpfulness, verbosity, ...", "arXiv:2406.08673"),
}

DIVERGENCES: dict[str, Entry] = {
    "forward_kl": Entry("KL(teacher || student)", "arXiv:1503.02531"),
    "reverse_kl": Entry("KL(student || teacher)", "arXiv:2306.08543"),
    "jsd": Entry("generalized Jensen-Shannon divergence of GKD", "arXiv:2306.13649"),
}

TRL_NAMES = {entry.trl: name for name, entry in PREFERENCE_LOSSES.items() if entry.trl}

AGGREGATES: dict[str, Entry] = {
    "token": Entry("every token of the batch counts the same", "arXiv:2503.14476"),
    "sequence": Entry("every sequence of the batch counts the same", "arXiv:2402.03300"),
    "budget": Entry("every token counts 1 / max_completion_length, whatever the length", "arXiv:2503.20783"),
}

# of every training command: --peft_method
ADAPTERS: dict[str, Entry] = {
    "lora": Entry("low-rank updates of the linear layers, scaled by alpha / r", "arXiv:2106.09685"),
    "rslora": Entry("LoRA scaled by alpha / sqrt(r), so that a large rank learns as fast", "arXiv:2312.03732"),
    "dora": Entry("LoRA of each weight's direction, its rows' norms trained apart", "arXiv:2402.09353"),
    "qlora": Entry("LoRA beside frozen base weights of 4 bits (NF4, double quantization)", "arXiv:2305.14314"),
    "ia3": Entry("trained scales of keys, values and the MLP's inner activations", "arXiv:2205.05638"),
    "bitfit": Entry("the model's own biases alone", "arXiv:2106.10199"),
}

# command → flag → the table whose rows the flag names
ROWS: dict[str, dict[str, dict[str, Entry]]] = {
    "sft": {"loss": SUPERVISED_LOSSES},
    "reward": {"loss": REWARD_LOSSES},
    "dpo": {"loss": PREFERENCE_LOSSES},
    "kto": {"loss": UNPAIRED_LOSSES},
    "rft": {"loss": SUPERVISED_LOSSES},
    "distill": {"loss": DIVERGENCES},
    "grpo": {"algorithm": ALGORITHMS, "loss": POLICY_LOSSES, "advantage": ADVANTAGES, "aggregate": AGGREGATES},
    "ppo": {"algorithm": ACTOR_CRITICS, "loss": POLICY_LOSSES, "advantage": TOKEN_ADVANTAGES, "aggregate": AGGREGATES},
}

TRACKERS: dict[str, str] = {
    "tensorboard": "event files in output_dir/tensorboard",
    "wandb": "Weights & Biases; WANDB_MODE=offline is respected",
    "trackio": "Trackio's local dashboard",
}

COMMANDS: dict[str, str] = {
    "sft": "supervised fine-tuning",
    "reward": "reward models: pairs, rankings, outcomes, steps, grades",
    "dpo": "preference optimization from pairs: dpo, ipo, simpo, orpo, cpo, … (--loss)",
    "kto": "preference optimization from completions that are desirable or not: kto, bco, …",
    "rft": "rejection sampling: sample, score, keep the best, train on them",
    "distill": "distillation from a teacher's distribution, on given or on the student's own completions (GKD)",
    "ppo": "online reinforcement learning with a critic: ppo, ppo_max, vc_ppo, vapo (--algorithm)",
    "grpo": "online reinforcement learning with rewards: grpo, dr_grpo, rloo, dapo, … (--algorithm)",
    "generate": "completions of prompts, with log-probs, rewards and pairs if asked for",
    "critique": "a model's answers criticized and revised, or compared, under principles: data for sft and dpo",
    "eval": "pass@k and majority votes of a model on problems that a reward can judge, win rates by a judge, with intervals",
    "search": "better answers for more tokens: best-of-n, votes, beams and trees over steps, in one table",
    "serve": "an OpenAI-compatible server over the live engine: completions, chat, streams, log-probs",
    "run": "a pipeline of these commands from a YAML file, each from the model before; goes on where it stopped",
    "demo": "a small model learns arithmetic in minutes on a CPU: SFT, then GRPO",
    "algorithms": "the rows that --algorithm, --loss, --advantage and --aggregate name, command by command",
    "env": "what is in use: versions, devices, the backend of every operation",
}


def nearest(name: str, valid: Iterable[str], *, prefix: str = "") -> str:
    """The sentence about an unknown name: what TRL means by it, the nearest valid ones, or all of them where they are few."""
    valid = list(valid)
    if TRL_NAMES.get(name) in valid:
        return f"unknown {prefix}{name}; what TRL calls {name} is {TRL_NAMES[name]}."
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    if len(name) > 2:  # `batch_size` is not close to any flag, but it ends one
        near += [word for word in valid if word not in near and (word.startswith(name) or word.endswith(name))][: 3 - len(near)]
    sentence = f"unknown {prefix}{name or repr(name)}"
    sign = prefix if prefix == "--" else ""
    if near:
        return f"{sentence}; did you mean {' or '.join(sign + word for word in near)}?"
    return f"{sentence}; valid: {', '.join(valid)}." if len(valid) <= 12 else f"{sentence}."
