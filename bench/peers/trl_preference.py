"""Preference losses in TRL and in fastalign: the same model, reference, records and optimizer; losses and metrics step by step.

    python -m bench.peers.trl_preference

For every loss that both have: TRL's trainer, then the task that `fastalign dpo` or `fastalign kto` runs, from the same weights
and against the same other model as reference, so that no loss starts at its value for equal policies. Each case prints the
largest difference of the loss over the steps and of the metrics that mean the same on both sides, relative above 1, absolute
below. The reference is near the policy and steps are small, because fp32 rounds a sum of log-probs by its size, and forward KL
multiplies that by exp of the log-ratio: at 250 nats and a ratio of e^8 two right computations differ by 1e-4 of the loss.
Where TRL computes something else on purpose, the case leaves that number out and says so here; the docstring of the loss
in fastalign/losses says why.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import inputs
from .callback_in_trl import plain_config
from .turns import quiet_environment

TOLERANCE = 1e-4
STORIES = Path("..") / "shared" / "models" / "stories260k"
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGPS = ("logps/chosen", "logps/rejected")
WORDS = [f"{name} {verb}" for name in ("a dog", "the cat", "a bird", "her friend") for verb in ("ran", "sat", "saw a ball", "was happy")]


@dataclass(frozen=True)
class Case:
    """A loss on both sides.

    Attributes:
        trainer: dpo, kto, cpo or orpo.
        theirs: TRL's options.
        loss: our row.
        ours: its options.
        metrics: what is compared besides the loss.
        steps: optimizer steps; 1 where the gradients differ on purpose.
        batch_size: records a step.

        note: what differs on purpose.
    """

    trainer: str
    theirs: dict[str, Any]
    loss: str
    ours: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = (*REWARDS, *LOGPS)
    steps: int = 3
    batch_size: int = 4
    without_nll: bool = False
    note: str = ""


def dpo(name: str, loss: str, metrics: tuple[str, ...] = (*REWARDS, *LOGPS), **more: Any) -> Case:
    theirs = {"loss_type": [name], **more.pop("theirs", {})}
    return Case("dpo", theirs, loss, more.pop("ours", {}), metrics, **more)


SMOOTH = {"theirs": {"label_smoothing": 0.1}, "ours": {"label_smoothing": 0.1}}
CASES = [
    dpo("sigmoid", "dpo"),
    dpo("hinge", "hinge"),
    dpo("ipo", "ipo_avg", LOGPS, note="rewards: TRL's are of whole completions, ours a token's, as the loss compares them"),
    dpo("exo_pair", "exo_pair", **SMOOTH),
    dpo("nca_pair", "nca_pair"),
    dpo("robust", "robust", **SMOOTH),
    dpo("bco_pair", "bco_pair", ours={"shift": 0.0}, note="TRL has no reward shift here; ours is fixed to 0"),
    dpo("sppo_hard", "sppo_hard", ours={"beta": 0.1}, note="TRL's default beta is 0.1, ours the paper's 1e-3"),
    dpo("aot", "aot"),
    dpo("aot_unpaired", "aot_unpaired"),
    dpo("apo_zero", "apo_zero"),
    dpo("apo_down", "apo_down"),
    dpo("discopop", "discopop"),
    dpo("sft", "sft", LOGPS, batch_size=1, note="TRL averages over the batch's tokens, ours over pairs: one pair a step"),
    dpo("sigmoid_norm", "dpo_norm", LOGPS, ours={"beta": 0.1}, note="rewards as for ipo"),
    dpo("sigmoid", "dpo", theirs={"f_divergence_type": "js_divergence"}, ours={"f_divergence_type": "js"}),
    dpo("sigmoid", "dpo", theirs={"f_divergence_type": "forward_kl"}, ours={"f_divergence_type": "forward_kl"}),
    dpo("sigmoid", "dpo", theirs={"f_divergence_type": "alpha_divergence"}, ours={"f_divergence_type": "alpha"}),
    dpo("sigmoid", "dpo", theirs={"ld_alpha": 0.5}, ours={"ld_alpha": 0.5}),
    dpo("sigmoid", "dpo", theirs={"use_weighting": True}, ours={"use_weighting": True}),
    Case("kto", {"loss_type": "kto"}, "kto", metrics=(*REWARDS[:3], *LOGPS, "kl")),
    Case("kto", {"loss_type": "apo_zero_unpaired"}, "apo_zero_unpaired", metrics=(*REWARDS[:3], *LOGPS)),
    Case("cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.0}, "cpo", {"nll_coef": 0.0}),
    Case("cpo", {"loss_type": "sigmoid"}, "cpo", batch_size=1, note="NLL: as for sft"),
    Case("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}, "simpo", {"beta": 0.1, "gamma": 0.5}, REWARDS, note="TRL's logps are means"),
    Case("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.25}, "alphapo", {"beta": 0.1, "gamma": 0.5}, ()),
    Case("orpo", {}, "orpo", {}, (*REWARDS, "log_odds_ratio"), steps=1, without_nll=True, note="NLL: TRL's runs over the prompts too"),
]


def records(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of short stories with different prompts; completions begin with a space, so that both sides cut at the same token."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return [{"prompt": f"{text(4, 12)}", "chosen": f" {text(2, 7)}", "rejected": f" {text(2, 7)}"} for _ in range(count)]


def prepare(folder: Path, given: str, seed: int) -> dict[str, str]:
    """The model (a random tiny one where none is given), another one as its reference, and their tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    where = {"model": given, "tokenizer": given}
    if not given:
        texts = (" ".join(r.values()) for r in records(500, seed))
        where = inputs.write_model(folder, inputs.text_tokenizer(texts, inputs.TINY["vocab_size"]), inputs.TINY, seed)
    model = AutoModelForCausalLM.from_pretrained(where["model"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * p.std() * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder / "reference")
    return where | {"reference": str(folder / "reference")}


def in_trl(case: Case, options: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The numbers of each step of TRL's trainer."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    disable_progress_bars()
    kinds = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer), "cpo": (CPOConfig, CPOTrainer)}
    config_of, trainer_of = (kinds | {"orpo": (ORPOConfig, ORPOTrainer)})[case.trainer]
    shared = {**plain_config(options), "per_device_train_batch_size": case.batch_size, "train_sampling_strategy": "sequential"}
    config = config_of(**shared, max_length=512, **case.theirs)
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    given = {"model": model, "args": config, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    if case.trainer in ("dpo", "kto"):
        given["ref_model"] = AutoModelForCausalLM.from_pretrained(options["reference"], dtype=torch.float32)
    trainer = trainer_of(**given)
    trainer.remove_callback(PrinterCallback)
    losses: list[float] = []
    found: list[dict[str, float]] = []
    original = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        losses.append(float((result[0] if isinstance(result, tuple) else result).detach()))
        return result

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "grad_norm" in logs:
                found.append({**{k: float(v) for k, v in logs.items()}, "loss": losses[-1]})

    trainer.compute_loss = compute_loss
    trainer.add_callback(Log())
    trainer.train()
    return found


def in_fastalign(case: Case, options: dict[str, Any], data: str) -> list[dict[str, float]]:
    """The numbers of each step of the task that the command runs."""
    from fastalign.recipes import arguments as a
    from fastalign.recipes import offline_arguments as o
    from fastalign.recipes import preference, unpaired
    from fastalign.recipes.setup import load, seed_everything

    flags = {name: case.ours[name] for name in ("f_divergence_type", "ld_alpha", "use_weighting") if name in case.ours}
    args = a.Arguments(
        command="kto" if case.trainer == "kto" else "dpo",
        model=a.ModelArguments(options["model"], "float32", options["tokenizer"], device=options["device"]),
        data=a.DataArguments(dataset_name=data, max_length=512, shuffle=False),
        optim=a.OptimArguments(learning_rate=options["learning_rate"], lr_scheduler_type="constant", max_steps=case.steps),
        batch=a.BatchArguments(per_device_train_batch_size=case.batch_size),
        run=a.RunArguments(output_dir=options["output_dir"], seed=options["seed"]),
        preference=o.PreferenceArguments(loss=[case.loss], **flags),
        unpaired=o.UnpairedArguments(loss=case.loss),
        reference=o.ReferenceArguments(options["reference"], "none"),
        loss_options={name: value for name, value in case.ours.items() if name not in flags},
    )
    seed_everything(args.run.seed)
    loaded = load(args.model)
    if case.trainer == "kto":
        found = unpaired.completions_of(args, loaded, data, 0)
        task: Any = unpaired.build_task(args, loaded, found, type(found)([], [], []), case.steps)
    else:
        pairs = preference.pairs_of(args, loaded, data, 0)
        task = preference.build_task(args, loaded, pairs, type(pairs)([]), case.steps)
    return [task.step(index) for index in range(case.steps)]


def differences(case: Case, theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, float]:
    """The largest difference of each number over the steps."""
    if len(theirs) != len(ours):
        raise RuntimeError(f"{case.loss}: TRL made {len(theirs)} steps, fastalign {len(ours)}")
    if case.without_nll:
        theirs, ours = ([row | {"loss": row["loss"] - row["nll_loss"]} for row in side] for side in (theirs, ours))

    def gap(name: str) -> float:
        pairs = [(a[name], b[name]) for a, b in zip(theirs, ours, strict=True) if name in a]
        if not pairs:
            raise RuntimeError(f"{case.loss}: TRL reported no {name}")
        return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)

    return {name: gap(name) for name in ("loss", *case.metrics)}


def compare(case: Case, options: dict[str, Any], folder: Path) -> dict[str, float]:
    """Both sides of a case on records of its own."""
    rows: list[dict[str, Any]] = list(records(case.steps * case.batch_size, options["seed"]))
    if case.trainer == "kto":
        kinds = [("chosen", True) if i % 2 else ("rejected", False) for i in range(len(rows))]
        rows = [{"prompt": r["prompt"], "completion": r[kind], "label": good} for r, (kind, good) in zip(rows, kinds, strict=True)]
    data = inputs.write_records(folder / "records.jsonl", rows)
    told = options | {"max_steps": case.steps, "output_dir": str(folder / "out")}
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = in_trl(case, told, rows)
    return differences(case, theirs, in_fastalign(case, told, str(data)))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.peers.trl_preference", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--only", nargs="*", default=[], help="rows to compare; default: all")
    p.add_argument("--model", default=str(STORIES) if STORIES.exists() else "", help="a model folder; default: a random tiny Qwen2")
    p.add_argument("--learning_rate", type=float, default=1e-5)
    p.add_argument("--seed", type=int, default=0)
    return p


def main() -> None:
    args = parser().parse_args()
    quiet_environment(0)
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fastalign-peers-") as name:
        folder = Path(name)
        shared = {"learning_rate": args.learning_rate, "seed": args.seed, "device": "cpu", "dtype": "float32"}
        options = prepare(folder, args.model, args.seed) | shared
        print(f"{'TRL':58s}{'fastalign':20s}{'loss':>10s}{'metrics':>10s}")
        for case in (c for c in CASES if not args.only or c.loss in args.only):
            found = compare(case, options, folder)
            told = f"{case.trainer} " + " ".join(f"{k}={v[0] if isinstance(v, list) else v}" for k, v in case.theirs.items())
            metrics = max((v for k, v in found.items() if k != "loss"), default=0.0)
            print(f"{told:58s}{case.loss:20s}{found['loss']:10.1e}{metrics:10.1e}  {case.note}", flush=True)
            worst[told] = max(found.values())
    print(f"largest difference {max(worst.values()):.1e} over {len(worst)} cases")
    if max(worst.values()) > TOLERANCE:
        raise SystemExit(f"above {TOLERANCE:g}: {', '.join(k for k, v in worst.items() if v > TOLERANCE)}")


if __name__ == "__main__":
    main()
