"""The offline methods of bench.learn: what each is trained on, with which numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.learn_setting import REWARD, Row, Setting, accuracies, optimizer, write_rows
from fastalign.recipes import arithmetic
from fastalign.recipes.arguments import (
    DistillArguments,
    PreferenceArguments,
    RejectionArguments,
    RewardArguments,
    SamplingArguments,
    UnpairedArguments,
)

RANKED = 4  # completions of a ranking; "reward-pairs" is told of two of them
RANKING_STEPS, RANKINGS = 600, 192  # of reward models, and problems a step, whatever they are told of each
PROCESS_STEPS, SOLUTIONS = 1600, 128
DRAWS = 4  # how often a problem gets other wrong answers


def preference(loss: str, learning_rate: float, **options: Any) -> Callable[[Setting], Row]:
    """DPO's command with a row of its table."""

    def learn(setting: Setting) -> Row:
        from fastalign.recipes.preference import run

        args = setting.arguments("dpo", loss, setting.files["pairs"], 64, optim=optimizer(learning_rate, 250))
        run(replace(args, preference=PreferenceArguments(loss=[loss], **options)))
        return accuracies(setting, setting.root / loss)

    return learn


def kto(setting: Setting) -> Row:
    """KTO of the same answers, labelled instead of paired."""
    from fastalign.recipes.unpaired import run

    args = setting.arguments("kto", "kto", setting.files["labelled"], 128, optim=optimizer(2e-4, 250))
    run(replace(args, unpaired=UnpairedArguments(beta=1.0)))
    return accuracies(setting, setting.root / "kto")


def rft(setting: Setting) -> Row:
    """Rejection sampling: rounds of eight samples a problem, the correct ones trained on."""
    from fastalign.recipes.rejection import run

    args = setting.arguments("rft", "rft", setting.files["train"], 128, optim=optimizer(5e-4, 240))
    kept = RejectionArguments(num_generations=8, num_kept=1, min_reward=1.0, num_rounds=4, reward=[REWARD])
    data = replace(args.data, max_samples=2000)
    run(replace(args, data=data, sampling=SamplingArguments(max_completion_length=8), rejection=kept))
    return accuracies(setting, setting.root / "rft")


def gkd(setting: Setting) -> Row:
    """A student of a quarter of the teacher's parameters, trained on the teacher's distribution; the teacher comes from SFT to the end."""
    from fastalign.recipes.distill import run as distill
    from fastalign.recipes.sft import run as sft

    everything = [arithmetic.record((a, b)) for a in range(100) for b in range(100)]
    held_out = {json.loads(line)["prompt"] for line in Path(setting.files["heldout"]).read_text(encoding="utf-8").splitlines()}
    train = [{k: r[k] for k in ("prompt", "completion")} for r in everything if r["prompt"] not in held_out]
    random.Random(setting.seed).shuffle(train)
    data = write_rows(setting.root / "data" / "all.jsonl", train)
    sft(setting.arguments("sft", "teacher", data, 256, optim=optimizer(1e-3, 450)))
    student = write_student(setting)
    args = setting.arguments("distill", "student", data, 256, optim=optimizer(2e-3, 1000))
    args = replace(args, model=replace(args.model, model_name_or_path=str(student)))
    own = DistillArguments(teacher_model_name_or_path=str(setting.root / "teacher"), lmbda=0.2)
    distill(replace(args, sampling=SamplingArguments(max_completion_length=8), distill=own))
    folders = {"teacher": setting.root / "teacher", "before": student, "after": setting.root / "student"}
    return {name: setting.accuracy(folder) for name, folder in folders.items()} | {"measure": "accuracy of the student"}


def write_student(setting: Setting) -> Path:
    """An untrained model of half the teacher's width."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(setting.seed)
    config = AutoConfig.from_pretrained(setting.root / "model")
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = 64, 192, 2, 2
    config.head_dim = 32
    folder = setting.root / "small"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(setting.root / "model").save_pretrained(folder)
    return folder


def rankings(loss: str, num_trained: int) -> Callable[[Setting], Row]:
    """A reward model of answers ordered by how far they are from the sum; every pair of the held-out rankings in the right order."""

    def learn(setting: Setting) -> Row:
        from fastalign.recipes.reward import run

        name = f"{loss}-{num_trained}"
        files = [write_rankings(setting, part, name, kept) for part, kept in (("train", num_trained), ("heldout", RANKED))]
        args = setting.arguments("reward", name, files[0], RANKINGS, optim=optimizer(1e-3, RANKING_STEPS))
        summary = run(replace(args, data=replace(args.data, eval_dataset_name=files[1]), reward=RewardArguments(loss=loss)))
        return {"before": summary["eval/accuracy/before"], "after": summary["eval/accuracy"], "measure": "held-out pairs in order"}

    return learn


def records_of(setting: Setting, part: str, draws: int) -> list[Row]:
    """The part's problems, several times over: every time other wrong answers are drawn to them."""
    return [json.loads(line) for line in Path(setting.files[part]).read_text(encoding="utf-8").splitlines()] * draws


def write_rankings(setting: Setting, part: str, name: str, kept: int) -> str:
    """Rankings of the sum and of numbers ever farther from it, the same for every method, which is told of as many completions as kept."""
    draw, choice, rows = random.Random(f"{setting.seed}{part}"), random.Random(f"{setting.seed}kept{part}"), []
    for record in records_of(setting, part, DRAWS if part == "train" else 1):
        answer, completions = int(record["answer"]), [int(record["answer"])]
        for far in range(1, RANKED):
            away = draw.randint(10 * far - 9, 10 * far)
            completions.append(answer + away if answer < 100 or draw.random() < 0.5 else answer - away)
        told = [completions[i] for i in sorted(choice.sample(range(RANKED), kept))]
        rows.append({"prompt": record["prompt"], "completions": [f"{c:03d}" for c in told]})
    return write_rows(setting.root / "data" / f"{name}-{part}.jsonl", rows)


def process(setting: Setting) -> Row:
    """A model of steps: each digit of an answer, right as long as all digits up to it are; held-out steps judged rightly."""
    from fastalign.recipes.reward import run

    files = [write_steps(setting, part) for part in ("train", "heldout")]
    args = setting.arguments("reward", "process", files[0], SOLUTIONS, optim=optimizer(1e-3, PROCESS_STEPS))
    reward = RewardArguments(loss="process", step_separator="=")
    summary = run(replace(args, data=replace(args.data, eval_dataset_name=files[1]), reward=reward))
    return {"before": summary["eval/accuracy/before"], "after": summary["eval/accuracy"], "measure": "held-out steps judged rightly"}


def write_steps(setting: Setting, part: str) -> str:
    """The digits of an answer, of which one is replaced in two of three records; from there on the labels are false."""
    draw, rows = random.Random(f"{setting.seed}steps{part}"), []
    for record in records_of(setting, part, DRAWS if part == "train" else 1):
        digits = list(record["answer"])
        wrong = draw.choice((1, 2, len(digits)))  # the last: none; the first digit is 0 or 1
        if wrong < len(digits):
            digits[wrong] = draw.choice([d for d in "0123456789" if d != digits[wrong]])
        rows.append({"prompt": record["prompt"], "completions": digits, "labels": [i < wrong for i in range(len(digits))]})
    return write_rows(setting.root / "data" / f"steps-{part}.jsonl", rows)


OFFLINE: dict[str, Callable[[Setting], Row]] = {
    "dpo": preference("dpo", 2e-4, beta=1.0),
    "ipo": preference("ipo", 2e-4),
    "simpo": preference("simpo", 2e-4, beta=10.0),
    "orpo": preference("orpo", 5e-4),
    "kto": kto,
    "rft": rft,
    "gkd": gkd,
    "reward-pairs": rankings("bradley_terry", 2),
    "reward-rankings": rankings("bradley_terry", RANKED),
    "reward-plackett-luce": rankings("plackett_luce", RANKED),
    "reward-process": process,
}
