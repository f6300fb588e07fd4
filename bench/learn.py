"""Learning, not only running: every offline method on the demo's additions, from one and the same SFT model; and tools.

    python -m bench.learn [--only dpo kto ...] [--seeds 0 1] [--json FILE] [--plot FILE] [--table FILE]

A seed's problems, untrained model and cold start are those of `fastalign demo`. Preference methods get correct answers against wrong
ones that the SFT model itself sampled; rejection sampling and reward models their own data from the same problems. What is reported is
the greedy accuracy on 400 held-out problems before and after, or for reward models the share of held-out pairs (steps) in the right order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import tool_task
from bench.harness import write_record
from fastalign.recipes import arithmetic, demo
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    DistillArguments,
    ModelArguments,
    OptimArguments,
    PreferenceArguments,
    RejectionArguments,
    RewardArguments,
    RunArguments,
    SamplingArguments,
    UnpairedArguments,
)

REWARD_STEPS = 400  # of reward models
DRAWS = 4  # how often each training problem gets other wrong answers
PAGE = """# What each offline method learns

<!-- written by make learn -->

On the demo's additions, from its cold start: held-out accuracy, in percent of 400 problems; of reward models the share of pairs (steps) in
order.

![before and after, method by method](learning.png)

"""
REWARD = f"{Path(arithmetic.__file__)}:correct"
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One seed's files and its SFT model, which every method starts from."""

    root: Path
    files: dict[str, Any]
    seed: int

    @property
    def start(self) -> Path:
        return self.root / "sft"

    def arguments(self, command: str, name: str, data: str, batch_size: int, **changes: Any) -> Arguments:
        """A training command's arguments on this seed's SFT model."""
        options = {
            "batch": BatchArguments(per_device_train_batch_size=batch_size),
            "model": ModelArguments(model_name_or_path=str(self.start), dtype="float32", device="cpu"),
            "data": DataArguments(dataset_name=data, max_length=64),
            "run": RunArguments(output_dir=str(self.root / name), overwrite_output_dir=True, seed=self.seed, logging_steps=10),
        }
        return Arguments(command=command, **(options | changes))

    def accuracy(self, model: Path) -> float:
        """Greedy accuracy of a model on the held-out problems."""
        return demo.accuracy_of(self.root, self.files, self.seed, model)


def optimizer(learning_rate: float, steps: int) -> OptimArguments:
    return OptimArguments(learning_rate=learning_rate, max_steps=steps, warmup_steps=5, lr_scheduler_type="linear")


def prepare(root: Path, seed: int) -> Setting:
    """The seed's problems, the cold start, and pairs of correct and wrong answers."""
    from fastalign.recipes import sft

    files = demo.prepare(root, seed)
    sft.run(demo.cold_start(root, files, seed, quick=False))
    setting = Setting(root, files, seed)
    files |= write_pairs(setting, max_pairs=16000)
    return setting


def write_pairs(setting: Setting, max_pairs: int) -> dict[str, str]:
    """Correct answers against every wrong one that the SFT model samples; the same as labelled completions."""
    import fastalign as fa
    from fastalign.models.load import load_causal_lm, load_tokenizer

    records = [json.loads(line) for line in Path(setting.files["train"]).read_text(encoding="utf-8").splitlines()][:max_pairs]
    engine = fa.Engine(load_causal_lm(str(setting.start), dtype="float32"), load_tokenizer(str(setting.start)))
    outputs = engine.generate([r["prompt"] for r in records], fa.SamplingParams(n=4, max_tokens=8, seed=setting.seed))
    pairs, labelled = [], []
    for record, output in zip(records, outputs, strict=True):
        answer, sampled = record["answer"], {o.text.strip() for o in output.outputs}
        for wrong in sorted(sampled - {answer, ""}):
            pairs.append({"prompt": record["prompt"], "chosen": answer, "rejected": wrong})
            for completion, label in ((answer, True), (wrong, False)):
                labelled.append({"prompt": record["prompt"], "completion": completion, "label": label})
    return {
        "pairs": _write(setting.root / "data" / "pairs.jsonl", pairs[:max_pairs]),
        "labelled": _write(setting.root / "data" / "labelled.jsonl", labelled[: 2 * max_pairs]),
    }


def _write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


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
    data = _write(setting.root / "data" / "all.jsonl", train)
    sft(setting.arguments("sft", "teacher", data, 256, optim=optimizer(1e-3, 450)))
    student = write_student(setting)
    args = setting.arguments("distill", "student", data, 256, optim=optimizer(2e-3, 700))
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


def tools(setting: Setting) -> Row:
    """GRPO with a calculator on sums of three digits, from a cold start of its own that seldom calls it."""
    from fastalign.recipes import online, sft

    root, seed, key = setting.root / "tools", setting.seed, "eval/rewards/correct/mean"
    files = tool_task.prepare(root, seed)
    sft.run(tool_task.cold_start(root, files, seed, replace(optimizer(1e-3, 400), lr_scheduler_type="constant")))
    found = online.run(tool_task.reinforce(root, files, seed, optimizer(2e-4, 60)))
    return {"before": found[f"{key}/before"], "after": found[key], "measure": "held-out greedy accuracy, three digits and a calculator"}


def rankings(loss: str, num_completions: int) -> Callable[[Setting], Row]:
    """A reward model of answers ordered by how far they are from the sum; held-out pairs in the right order."""

    def learn(setting: Setting) -> Row:
        from fastalign.recipes.reward import run

        name = f"{loss}-{num_completions}"
        files = [write_rankings(setting, part, name, num_completions) for part in ("train", "heldout")]
        args = setting.arguments("reward", name, files[0], 512 // num_completions, optim=optimizer(1e-3, REWARD_STEPS))
        summary = run(replace(args, data=replace(args.data, eval_dataset_name=files[1]), reward=RewardArguments(loss=loss)))
        return {"before": summary["eval/accuracy/before"], "after": summary["eval/accuracy"], "measure": "held-out pairs in order"}

    return learn


def records_of(setting: Setting, part: str) -> list[Row]:
    """The part's problems; those of training several times over, for every time other wrong answers are drawn to them."""
    records = [json.loads(line) for line in Path(setting.files[part]).read_text(encoding="utf-8").splitlines()]
    return records * (DRAWS if part == "train" else 1)


def write_rankings(setting: Setting, part: str, name: str, num_completions: int) -> str:
    """Completions best first: the sum, then numbers ever farther from it; held-out ones are always pairs."""
    draw, rows = random.Random(f"{setting.seed}{part}"), []
    for record in records_of(setting, part):
        answer, completions = int(record["answer"]), [int(record["answer"])]
        for far in range(1, num_completions if part == "train" else 2):
            away = draw.randint(10 * far - 9, 10 * far)
            completions.append(answer + away if answer < 100 or draw.random() < 0.5 else answer - away)
        rows.append({"prompt": record["prompt"], "completions": [f"{max(0, c):03d}" for c in completions]})
    return _write(setting.root / "data" / f"{name}-{part}.jsonl", rows)


def process(setting: Setting) -> Row:
    """A model of steps: each digit of an answer, right as long as all digits up to it are; held-out steps judged rightly."""
    from fastalign.recipes.reward import run

    files = [write_steps(setting, part) for part in ("train", "heldout")]
    args = setting.arguments("reward", "process", files[0], 256, optim=optimizer(1e-3, 2 * REWARD_STEPS))
    reward = RewardArguments(loss="process", step_separator="=")
    summary = run(replace(args, data=replace(args.data, eval_dataset_name=files[1]), reward=reward))
    return {"before": summary["eval/accuracy/before"], "after": summary["eval/accuracy"], "measure": "held-out steps judged rightly"}


def write_steps(setting: Setting, part: str) -> str:
    """The digits of an answer, of which one is replaced in two of three records; from there on the labels are false."""
    draw, rows = random.Random(f"{setting.seed}steps{part}"), []
    for record in records_of(setting, part):
        digits = list(record["answer"])
        wrong = draw.choice((1, 2, len(digits)))  # the last: none; the first digit is 0 or 1
        if wrong < len(digits):
            digits[wrong] = draw.choice([d for d in "0123456789" if d != digits[wrong]])
        rows.append({"prompt": record["prompt"], "completions": digits, "labels": [i < wrong for i in range(len(digits))]})
    return _write(setting.root / "data" / f"steps-{part}.jsonl", rows)


def accuracies(setting: Setting, model: Path) -> Row:
    return {"before": setting.accuracy(setting.start), "after": setting.accuracy(model), "measure": "held-out greedy accuracy"}


METHODS: dict[str, Callable[[Setting], Row]] = {
    "dpo": preference("dpo", 2e-4, beta=1.0),
    "ipo": preference("ipo", 2e-4),
    "simpo": preference("simpo", 2e-4, beta=10.0),
    "orpo": preference("orpo", 5e-4),
    "kto": kto,
    "rft": rft,
    "gkd": gkd,
    "tools": tools,
    "reward-pairs": rankings("bradley_terry", 2),
    "reward-rankings": rankings("bradley_terry", 4),
    "reward-plackett-luce": rankings("plackett_luce", 4),
    "reward-process": process,
}


def table(rows: list[Row]) -> str:
    """Markdown: one line a method and seed."""
    lines = ["| method | seed | measure | before | after | seconds |", "|---|---|---|---|---|---|"]
    for row in rows:
        teacher = f" (teacher {row['teacher']:.1%})" if "teacher" in row else ""
        numbers = f"{row['before']:.1%} | {row['after']:.1%} | {row['seconds']:.0f}"
        lines.append(f"| {row['method']} | {row['seed']} | {row['measure']}{teacher} | {numbers} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Before and after, a bar a method and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
    places = range(len(rows))
    axes.barh(places, [row["after"] for row in rows], color="#2563eb", label="after")
    axes.barh(places, [row["before"] for row in rows], color="#cbd5e1", label="before")
    axes.set_yticks(places, [f"{row['method']}, seed {row['seed']}" for row in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="held-out accuracy; of reward models: pairs in order")
    axes.margins(y=0.01)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.learn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="these methods alone")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--json", type=Path, help="write the rows to this file")
    p.add_argument("--table", type=Path, help="write the table to this file")
    p.add_argument("--plot", type=Path, help="write the picture to this file")
    return p


def main() -> None:
    args = parser().parse_args()
    rows = one_seed(args) if len(args.seeds) == 1 else side_by_side(args)
    print(table(rows))


def one_seed(args: argparse.Namespace) -> list[Row]:
    """Every method in turn; saved after each, so that what is measured outlives an interrupt."""
    (seed,), rows = args.seeds, []
    with tempfile.TemporaryDirectory(prefix="fastalign-learn-") as folder:
        setting = prepare(Path(folder), seed)
        for method in args.only:
            began = time.perf_counter()
            rows.append({"method": method, "seed": seed, **METHODS[method](setting), "seconds": time.perf_counter() - began})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            save(rows, args)
    return rows


def side_by_side(args: argparse.Namespace) -> list[Row]:
    """The seeds in processes of their own, which share the cores: small models gain little from a second thread."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(args.seeds)))}
    with tempfile.TemporaryDirectory(prefix="fastalign-learn-") as folder:
        parts = [Path(folder) / f"{seed}.json" for seed in args.seeds]
        commands = [
            [sys.executable, "-m", "bench.learn", "--only", *args.only, "--seeds", str(seed), "--json", str(part)]
            for seed, part in zip(args.seeds, parts, strict=True)
        ]
        children = [subprocess.Popen(command, env=environment) for command in commands]
        try:
            failed = [seed for seed, child in zip(args.seeds, children, strict=True) if child.wait()]
        finally:  # an interrupt reaches the children, too, and what they found until then is kept
            rows = [row for part in parts if part.exists() for row in json.loads(part.read_text(encoding="utf-8"))["rows"]]
            save(rows, args)
    if failed:
        raise SystemExit(f"seeds {failed} ended with an error; what was found until then is saved")
    return rows


def save(rows: list[Row], args: argparse.Namespace) -> None:
    """The rows in order of their method, wherever they were asked for."""
    rows = sorted(rows, key=lambda row: (list(METHODS).index(row["method"]), row["seed"]))
    if args.table:
        args.table.write_text(PAGE + table(rows) + "\n", encoding="utf-8")
    if args.plot:
        plot(rows, args.plot)
    if args.json:
        write_record(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
