"""A task for tools: sums of three-digit numbers, too hard for the demo's model in its head, and a calculator that it may call.

The cold start has seen a few calls among many answers without one, most of which it gets wrong; what pays is for it to find out.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from fastalign.recipes import arithmetic
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OptimArguments,
    RunArguments,
    SamplingArguments,
)
from fastalign.recipes.online_arguments import EnvironmentArguments, OnlineArguments

CALL, RESULT = "[{}]", "({})"
ENVIRONMENT = f"calculator:call={CALL},result={RESULT}"
REWARD = f"{Path(__file__)}:correct"
DEMONSTRATIONS, HELDOUT, TRAIN = 1200, 400, 8000  # problems
CALLS = 0.3  # share of the demonstrations that show a call
Problem = tuple[int, int]


def correct(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1 where what follows the last result is the sum, else 0."""
    return [float(text.rpartition(RESULT[-1])[2] == wanted) for text, wanted in zip(completions, answer, strict=True)]


def prepare(root: Path, seed: int) -> dict[str, str]:
    """Writes tokenizer, untrained model, demonstrations, problems to train on and held-out ones."""
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = arithmetic.build_tokenizer(arithmetic.CHARACTERS + "[]()")
    arithmetic.build_model(seed, len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    draw = random.Random(seed)
    every = draw.sample(range(900 * 900), DEMONSTRATIONS + HELDOUT + TRAIN)
    problems = [(100 + number // 900, 100 + number % 900) for number in every]
    cuts = {"sft": DEMONSTRATIONS, "heldout": HELDOUT, "train": TRAIN}
    files = {}
    for name, size in cuts.items():
        own, problems = problems[:size], problems[size:]
        rows = [row for p in own for row in demonstrations(p, draw)] if name == "sft" else [question(p) for p in own]
        files[name] = str(root / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def question(problem: Problem) -> dict[str, str]:
    """`347+285=`, the sum for the reward."""
    return {"prompt": f"{problem[0]}+{problem[1]}=", "answer": str(sum(problem))}


def demonstrations(problem: Problem, draw: random.Random) -> list[dict[str, str]]:
    """A sum in the head, or a call and, behind its result, the sum: what the model writes is a completion, a record a turn."""
    prompt, answer = question(problem).values()
    if draw.random() >= CALLS:
        return [{"prompt": prompt, "completion": answer}]
    call = CALL.format(prompt[:-1])
    return [{"prompt": prompt, "completion": call}, {"prompt": prompt + call + RESULT.format(answer), "completion": answer}]


def cold_start(root: Path, files: dict[str, str], seed: int, optim: OptimArguments) -> Arguments:
    """Supervised learning of the demonstrations."""
    return Arguments(
        command="sft",
        model=ModelArguments(model_name_or_path=str(root / "model"), dtype="float32", device="cpu"),
        data=DataArguments(dataset_name=files["sft"], max_length=64),
        optim=optim,
        batch=BatchArguments(per_device_train_batch_size=64),
        run=RunArguments(output_dir=str(root / "sft"), overwrite_output_dir=True, seed=seed, logging_steps=10),
    )


def reinforce(root: Path, files: dict[str, str], seed: int, optim: OptimArguments) -> Arguments:
    """GRPO with the calculator, rewarded for right sums alone."""
    start = cold_start(root, files, seed, optim)
    return replace(
        start,
        command="grpo",
        model=replace(start.model, model_name_or_path=str(root / "sft")),
        data=DataArguments(dataset_name=files["train"], eval_dataset_name=files["heldout"], max_length=64),
        optim=optim,
        batch=BatchArguments(per_device_train_batch_size=256),
        run=RunArguments(output_dir=str(root / "grpo"), overwrite_output_dir=True, seed=seed, logging_steps=10),
        sampling=SamplingArguments(max_completion_length=32),
        online=OnlineArguments(algorithm="grpo", num_generations=8, beta=0.0, reward=[REWARD]),
        environment=EnvironmentArguments(environment=ENVIRONMENT, max_turns=3),
    )
