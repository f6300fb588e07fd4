"""Policy-gradient losses in TRL and in fastalign: the same completions, rewards and models; loss, metrics, advantages and gradient.

    python -m bench.peers.trl_policy

A policy, another one that sampled, and a third as reference are given to both sides with fixed completions and rewards, so that no
ratio is 1: on-policy these losses are near 0 whatever their gradient is, and it is the gradient that is compared, as a whole:
|ours - TRL's| / |TRL's| over all parameters. TRL's side is its trainer with nothing replaced but sampling: masks, log-probs of the
policy that sampled and of the reference, advantages, loss. Ours is what the flags of `fastalign grpo` name: advantages, token trees cut
into micro-batches of 128 tokens. Differences of loss, metrics and advantages are relative above 1, absolute below.

Where the two differ on purpose, options make them agree:

- cispo: TRL's epsilon_high is the bound of the ratio, ours the paper's distance from 1, which is 1 less.
- KL: TRL weighs k3 by the ratio unless use_bias_correction_kl is off; ours is the published term.
- bnpo: TRL divides by the tokens of each micro-batch, so the result depends on the cut; here its batch is one micro-batch. Ours divides by
  those of the whole batch, always, which is TRL's dapo.
- luspo: TRL adds tokens up and divides by nothing. That is gspo under --aggregate budget, which divides by --max_completion_length: a
  constant, by which our loss and gradient are multiplied here.
- scale_rewards="batch" divides by the deviation of all rewards: --advantage lite_ppo; reinforce_pp_baseline divides by that of the
  centred ones.
- RLOO: TRL's completion is one action: its ratio is the product over tokens, and k1 is taken from the reward before the baseline. Our
  row `rloo` adds up log-probs too, but clips token by token, and has k3 in the loss as our other rows of groups do. The flags below make
  it off-policy by the product of ratios; nothing is clipped on either side, the losses are of different forms (A times the ratio, and
  A log p weighted by it) and are not compared, and where beta is not 0 the rewards are given to us with the KL taken off.
- vllm_importance_sampling_mode is --importance_correction: TRL's clip_max and clip_min are its high and low. The engine's log-probs are the
  third model's here; TRL reads them under use_vllm, which is set once the trainer is built.
- Clip ratios of sequence-level ratios: TRL counts sequences, ours tokens; they are left out.
- Samples of advantage 0, such as groups of equal rewards, are not forwarded on our side where no KL or entropy needs them, so that clip
  ratios and entropy are means over the rest; loss and gradient are those of all.
- entropy_coef: TRL's bonus is the mean over tokens under every loss type, ours is aggregated as the loss is: equal under `token`.

TRL's vespo has no counterpart here. TRL 1.16 has no PPO trainer to compare with.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import policy_in_fastalign, policy_in_trl
from .policy_batch import MAX_COMPLETION_LENGTH, Batch, Found, batch_of, prepare
from .turns import quiet_environment

TOLERANCE = 1e-4
STORIES = Path("..") / "shared" / "models" / "stories260k"
CLIPS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
TOKENS = (*CLIPS, "entropy")


@dataclass(frozen=True)
class Case:
    """A loss on both sides.

    Attributes:
        kind: TRL's trainer: grpo, rloo or gmpo.
        theirs: its options.
        ours: flags of `fastalign grpo`.
        metrics: what is compared besides loss, advantages and gradient; a pair where the names differ, TRL's first.
        compares_loss: whether the loss means the same.
        times: what our loss and gradient are multiplied by.
        engine: whether the tokens came from an engine whose log-probs are not those of the policy that it served.
        kl_in_reward: coefficient of the KL that is taken off the rewards that fastalign is given.
        constant_group: all rewards of one group are equal.
        note: what differs on purpose.
    """

    kind: str
    theirs: dict[str, Any]
    ours: str
    metrics: tuple[str | tuple[str, str], ...] = TOKENS
    compares_loss: bool = True
    times: float = 1.0
    engine: bool = False
    kl_in_reward: float = 0.0
    constant_group: bool = False
    note: str = ""


def grpo(loss_type: str, ours: str, metrics: tuple[str | tuple[str, str], ...] = TOKENS, *, theirs: Any = None, **more: Any) -> Case:
    return Case("grpo", {"loss_type": loss_type} | (theirs or {}), ours, metrics, **more)


K3 = {"beta": 0.04, "use_bias_correction_kl": False}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03}
IN_SEQUENCE = "--epsilon 0.02 --epsilon_high 0.03"
ONE_ACTION = "--algorithm rloo --beta 0 --loss reinforce --importance_correction sequence_truncate"
ONE_ACTION += " --importance_correction_high 1e8"
CISPO_CLIP = ("cispo_clip_ratio", "clip_ratio/high_mean")
CASES = [
    grpo("grpo", "--algorithm grpo --beta 0"),
    grpo("grpo", "--algorithm grpo", (*TOKENS, "kl"), theirs=K3),
    grpo("grpo", "--algorithm grpo --beta 0", (), constant_group=True, note="a group of equal rewards: metrics are of the others"),
    grpo("grpo", "--algorithm grpo --beta 0 --advantage dr_grpo", theirs={"scale_rewards": "none"}),
    grpo("grpo", "--algorithm grpo --beta 0 --advantage lite_ppo", theirs={"scale_rewards": "batch"}),
    grpo("grpo", "--algorithm grpo --beta 0 --epsilon 0.1 --epsilon_high 0.3", theirs={"epsilon": 0.1, "epsilon_high": 0.3}),
    grpo("grpo", "--algorithm grpo --beta 0 --loss.dual_clip 1.3", theirs={"delta": 1.3}),
    grpo("dr_grpo", "--algorithm dr_grpo", theirs={"scale_rewards": "none"}),
    grpo("dapo", "--algorithm dapo", theirs={"epsilon_high": 0.28}),
    grpo("dapo", "--algorithm dapo --beta 0.04", (*TOKENS, "kl"), theirs={"epsilon_high": 0.28} | K3),
    grpo("dapo", "--algorithm dapo --entropy_coef 0.01", theirs={"epsilon_high": 0.28, "entropy_coef": 0.01}),
    grpo("bnpo", "--algorithm grpo --beta 0 --aggregate token", note="one micro-batch"),
    grpo("cispo", "--algorithm cispo --loss.epsilon_high 0.2", (CISPO_CLIP, "entropy"), theirs={"epsilon_high": 1.2}, note="1.2 = 1 + 0.2"),
    grpo("sapo", "--algorithm grpo --beta 0 --loss sapo", ("entropy",)),
    grpo("grpo", f"--algorithm gspo {IN_SEQUENCE}", ("entropy",), theirs=SEQUENCE),
    grpo("grpo", f"--algorithm gspo --beta 0.04 {IN_SEQUENCE}", ("entropy", "kl"), theirs=SEQUENCE | K3),
    grpo("grpo", f"--algorithm gspo --loss gspo_token {IN_SEQUENCE}", ("entropy",), theirs=SEQUENCE),
    grpo("luspo", f"--algorithm gspo --aggregate budget {IN_SEQUENCE}", ("entropy",), theirs=SEQUENCE, times=MAX_COMPLETION_LENGTH),
    Case("gmpo", {"epsilon": 0.1}, "--algorithm grpo --beta 0 --loss gmpo --loss.epsilon 0.1"),
]
for level, low, high in (("token_", 0.9, 1.1), ("sequence_", 0.2, 5.0)):
    seen = (*TOKENS, "sampling/importance_sampling_ratio/mean") if level == "token_" else TOKENS
    for mode, least in (("truncate", None), ("mask", low)):
        theirs = {f"vllm_importance_sampling_{k}": v for k, v in (("mode", level + mode), ("clip_min", least), ("clip_max", high))}
        named = f"--algorithm dapo --importance_correction {level.removeprefix('token_')}{mode} --importance_correction_high {high}"
        named += f" --importance_correction_low {least}" if least else ""
        CASES.append(grpo("dapo", named, seen, theirs={"epsilon_high": 0.28} | theirs, engine=True))
for coefficient in (0.0, 0.05):
    unclipped = {"beta": coefficient, "epsilon": 1.0, "epsilon_high": 1e8}
    one_action: dict[str, Any] = {"compares_loss": False, "times": MAX_COMPLETION_LENGTH, "kl_in_reward": coefficient}
    CASES.append(Case("rloo", unclipped, ONE_ACTION, ("entropy",), **one_action, note="losses of different forms"))


def differences(case: Case, theirs: Found, ours: Found) -> dict[str, float]:
    """Of loss, metrics and advantages the largest `gap`, of the gradient the norm of the difference, relative."""
    import torch

    if theirs.gradients.keys() != ours.gradients.keys():
        raise RuntimeError(f"{case.ours}: other parameters: {sorted(theirs.gradients.keys() ^ ours.gradients.keys())}")
    pairs = [(name, name) if isinstance(name, str) else name for name in case.metrics]
    apart = torch.stack([(case.times * ours.gradients[name] - g).norm() for name, g in theirs.gradients.items()]).norm()
    whole = torch.stack([g.norm() for g in theirs.gradients.values()]).norm()
    if not whole > 0:
        raise RuntimeError(f"{case.ours}: TRL's gradient is {float(whole)}: nothing to compare; does everything lie outside the bounds?")
    return {
        "loss": gap(theirs.loss, case.times * ours.loss) if case.compares_loss else 0.0,
        "metrics": max((gap(theirs.metrics[a], ours.metrics[b]) for a, b in pairs), default=0.0),
        "advantages": max(gap(a, b) for a, b in zip(theirs.advantages, ours.advantages, strict=True)),
        "gradient": float(apart / whole),
    }


def gap(theirs: float, ours: float) -> float:
    """The difference, relative to TRL's number where that is above 1."""
    return abs(theirs - ours) / max(1.0, abs(theirs))


def compare(case: Case, batch: Batch, options: dict[str, Any], states: dict[str, Any], policy: Any) -> tuple[Found, Found]:
    """Both sides of a case, TRL's first."""
    if case.constant_group:
        batch = batch._replace(rewards=[[1.0] * len(batch.rewards[0]), *batch.rewards[1:]])
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = policy_in_trl.measure(case.kind, case.theirs, batch, states, options, engine=case.engine)
    ours = policy_in_fastalign.measure(case.ours, batch, policy, options, engine=case.engine, kl_in_reward=case.kl_in_reward)
    return theirs, ours


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.peers.trl_policy", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--only", nargs="*", default=[], help="words that the rows to compare have in their options or flags; default: all rows")
    p.add_argument("--model", default=str(STORIES) if STORIES.exists() else "", help="a model folder; default: a random tiny Qwen2")
    p.add_argument("--seed", type=int, default=1, help="of models, completions and rewards; 1 has sequences outside both bounds")
    return p


def main() -> None:
    args = parser().parse_args()
    quiet_environment(0)
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fastalign-peers-") as name:
        folder = Path(name)
        options: dict[str, Any] = {"learning_rate": 1e-5, "seed": args.seed, "device": "cpu", "dtype": "float32", "max_steps": 1}
        options |= prepare(folder, args.model, args.seed) | {"output_dir": str(folder / "out")}
        policy, states = policy_in_fastalign.load_policy(options), policy_in_trl.load_states(options)
        batch = batch_of(options, args.seed)
        print(f"{'loss':>8s}{'metrics':>9s}{'advant.':>9s}{'gradient':>9s}  TRL | fastalign | note")
        for case in CASES:
            told = f"{case.kind} " + " ".join(f"{k}={v}" for k, v in case.theirs.items())
            if args.only and not any(word in f"{told} {case.ours}" for word in args.only):
                continue
            theirs, ours = compare(case, batch, options, states, policy)
            found = differences(case, theirs, ours)
            row = " | ".join(filter(None, (told, case.ours, case.note)))
            print(f"{found['loss']:8.1e}{found['metrics']:9.1e}{found['advantages']:9.1e}{found['gradient']:9.1e}  {row}", flush=True)
            worst[row] = max(found.values())
    print(f"largest difference {max(worst.values()):.1e} over {len(worst)} cases")
    failed = [row for row, value in worst.items() if not value <= TOLERANCE]  # NaN too
    if failed:
        raise SystemExit(f"above {TOLERANCE:g}: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
