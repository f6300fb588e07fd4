"""A reward model trained by TRL's RewardTrainer and by fastalign: the same model, pairs, order and optimizer, fp32, step by step.

    python -m bench.peers.trl_reward --model ../shared/models/stories260k

Both sides start from the same score head and read the same whole texts in the file's order. TRL pads every batch to its longest text
and forwards what chosen and rejected begin with twice; fastalign forwards it once and pads nothing. Loss, accuracy, margin and the
gradient norm before clipping must agree at every step; the largest differences are printed. It is a check of equality, not a timing.

Deliberate differences, which the data of this check do not show: where a record has a `prompt`, TRL tokenizes prompt and completion
joined, fastalign apart, as generation sees them; and where padding token and EOS are the same, TRL reads the score before the EOS,
fastalign chooses another padding token and reads it at the EOS.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness import write_record

from . import inputs
from .machine import describe
from .turns import quiet_environment

TOLERANCE = 1e-4
KEYS = ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "grad_norm")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin and centring": {"margin": True, "center_rewards_coefficient": 0.1},
}


class Start(NamedTuple):
    """The folders that both sides load."""

    model: str
    tokenizer: str


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.peers.trl_reward", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--model", default="", help="a local folder of a causal model; default: a random 0.1M-parameter Qwen2 made on the spot")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--batch_size", type=int, default=8, help="pairs an optimizer step")
    p.add_argument("--learning_rate", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=0, help="compute threads; 0: torch's choice")
    p.add_argument("--json", default="", help="also write everything measured to this file")
    return p


def pairs(count: int, seed: int, margin: bool) -> list[dict[str, Any]]:
    """Whole texts that begin alike: the chosen one goes on happily."""
    rng = random.Random(seed)
    names, places = ("Lily", "Tom", "Ben", "Mia"), ("in the park", "at home", "near the big tree", "on a boat")
    good = ("She was very happy.", "They all smiled and played together.")
    bad = ("It was sad and dark.", "He cried. No one came to help him.")
    found = []
    for _ in range(count):
        begin = f"Once upon a time, {rng.choice(names)} was {rng.choice(places)} with a {rng.choice(('red', 'small', 'funny'))} ball. "
        record: dict[str, Any] = {"chosen": begin + rng.choice(good), "rejected": begin + rng.choice(bad)}
        if margin:
            record["margin"] = rng.choice((0.0, 0.5, 1.0))
        found.append(record)
    return found


def prepare(args: argparse.Namespace, folder: Path) -> Start:
    """A reward model that both sides start from: the causal model with a random score head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    where = {"model": args.model, "tokenizer": args.model}
    if not args.model:
        texts = (record["chosen"] + record["rejected"] for record in pairs(400, args.seed, False))
        where = inputs.write_model(folder / "causal", inputs.text_tokenizer(texts, inputs.TINY["vocab_size"]), inputs.TINY, args.seed)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(where["tokenizer"])
    model = AutoModelForSequenceClassification.from_pretrained(where["model"], num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "start")
    return Start(str(folder / "start"), where["tokenizer"])


def train_in_trl(start: Start, data: Path, output: Path, args: argparse.Namespace, options: dict[str, Any]) -> list[dict[str, float]]:
    """Loss and metrics of every step of a RewardTrainer."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback
    from trl import RewardConfig, RewardTrainer

    disable_progress_bars()
    config = RewardConfig(
        output_dir=str(output),
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        center_rewards_coefficient=options.get("center_rewards_coefficient"),
        max_length=512,
    )
    model = AutoModelForSequenceClassification.from_pretrained(start.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(start.tokenizer)
    trainer = RewardTrainer(model, args=config, train_dataset=Dataset.from_list(inputs.read_records(data)), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    losses: list[float] = []
    original = trainer.compute_loss

    def compute_loss(*given: Any, **named: Any) -> Any:
        loss = original(*given, **named)
        losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    logs = [row for row in trainer.state.log_history if "margin" in row]
    return [{**{key: float(row[key]) for key in KEYS}, "loss": loss} for row, loss in zip(logs, losses, strict=True)]


def train_in_fastalign(start: Start, data: Path, output: Path, args: argparse.Namespace, options: dict[str, Any]) -> list[dict[str, float]]:
    """The same of `fastalign reward`."""
    from fastalign.recipes import reward
    from fastalign.recipes.arguments import (
        Arguments,
        BatchArguments,
        DataArguments,
        ModelArguments,
        OptimArguments,
        RewardArguments,
        RunArguments,
    )
    from fastalign.training.metrics import read_metrics

    reward.run(
        Arguments(
            command="reward",
            model=ModelArguments(model_name_or_path=start.model, tokenizer_name_or_path=start.tokenizer, dtype="float32", device="cpu"),
            data=DataArguments(dataset_name=str(data), max_length=512, shuffle=False),
            optim=OptimArguments(learning_rate=args.learning_rate, lr_scheduler_type="constant", max_steps=args.steps),
            batch=BatchArguments(per_device_train_batch_size=args.batch_size),
            run=RunArguments(output_dir=str(output)),
            reward=RewardArguments(center_rewards_coefficient=options.get("center_rewards_coefficient", 0.0)),
        )
    )
    return [{key: row[key] for key in KEYS} for row in read_metrics(output) if "loss" in row]


def compare(theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, float]:
    """The largest difference of each number over all steps.

    Raises:
        RuntimeError: the sides took different numbers of steps, or a difference is over the tolerance.
    """
    if len(theirs) != len(ours):
        raise RuntimeError(f"TRL took {len(theirs)} steps, fastalign {len(ours)}")
    gaps = {key: max(abs(a[key] - b[key]) for a, b in zip(theirs, ours, strict=True)) for key in KEYS}
    for key in ("loss", "accuracy", "margin"):
        if not gaps[key] <= TOLERANCE:
            raise RuntimeError(f"{key} differs by {gaps[key]:.1e}, over {TOLERANCE}: TRL {theirs}, fastalign {ours}")
    return gaps


def main() -> None:
    args = parser().parse_args()
    quiet_environment(args.threads)
    found: dict[str, Any] = {"machine": describe("trl", "transformers", "torch", "fastalign")}
    print(f"{found['machine']}\nreward model, {args.batch_size} pairs a step, float32, {args.steps} steps", flush=True)
    with tempfile.TemporaryDirectory(prefix="fastalign-peers-") as name:
        folder = Path(name)
        start = prepare(args, folder)
        for variant, options in VARIANTS.items():
            own = folder / variant.replace(" ", "_")
            own.mkdir()
            data = inputs.write_records(own / "pairs.jsonl", pairs(args.steps * args.batch_size, args.seed, options.get("margin", False)))
            theirs = train_in_trl(start, data, own / "trl", args, options)
            ours = train_in_fastalign(start, data, own / "fastalign", args, options)
            gaps = compare(theirs, ours)
            found[variant] = {"trl": theirs, "fastalign": ours, "largest_difference": gaps}
            losses = " ".join(f"{row['loss']:.4f}" for row in ours)
            print(f"{variant}: loss by step {losses}")
            print("  largest difference: " + ", ".join(f"{key} {gap:.1e}" for key, gap in gaps.items()), flush=True)
    if args.json:
        write_record(Path(args.json), found)


if __name__ == "__main__":
    main()
