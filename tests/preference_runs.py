"""What the tests of `fastalign dpo` and `kto` share: tiny models, their data, and arguments."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.recipes import arithmetic, preference, samples, training, unpaired
from fastalign.recipes.arguments import Arguments, BatchArguments, DataArguments, ModelArguments, OptimArguments, RunArguments
from fastalign.recipes.offline_arguments import PreferenceArguments, ReferenceArguments, UnpairedArguments

VOLATILE = ("timing_s/", "tokens_per_second", "step_time", "peak_memory_mb")
RECIPES = {"dpo": preference, "kto": unpaired}


def without_report(monkeypatch) -> None:
    """Charts and samples take most of a tiny run; `monkeypatch.undo()` brings them back."""
    monkeypatch.setattr(training, "write_report", lambda *a, **k: None)
    monkeypatch.setattr(samples, "NUM_SHOWN", 0)


def write_task(root: Path) -> Path:
    """A policy, another model as its reference, pairs, and labelled completions."""
    tokenizer = arithmetic.build_tokenizer()
    for seed, name in enumerate(("model", "reference")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rng = random.Random(0)
    rows = []
    for _ in range(20):
        a, b = rng.randrange(100), rng.randrange(100)
        rows.append({"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": "".join(rng.choices("0123456789", k=rng.randint(1, 6)))})
    write(root / "pairs.jsonl", rows)
    write(root / "margins.jsonl", [row | {"margin": i / 10} for i, row in enumerate(rows)])
    sides = [(row, row["chosen"], True) if i % 3 else (row, row["rejected"], False) for i, row in enumerate(rows)]
    write(root / "labelled.jsonl", [{"prompt": r["prompt"], "completion": c, "label": good} for r, c, good in sides])
    return root


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(task: Path, output: Path, command: str = "dpo", **changes) -> Arguments:
    data = str(task / ("pairs.jsonl" if command == "dpo" else "labelled.jsonl"))
    args = Arguments(
        command=command,
        model=ModelArguments(model_name_or_path=str(task / "model"), dtype="float32", device="cpu"),
        data=DataArguments(dataset_name=data, eval_dataset_name=data, max_length=48, shuffle=False),
        optim=OptimArguments(learning_rate=1e-2, max_steps=4, lr_scheduler_type="constant"),
        batch=BatchArguments(per_device_train_batch_size=10),
        run=RunArguments(output_dir=str(output)),
        preference=PreferenceArguments(),
        unpaired=UnpairedArguments(),
        reference=ReferenceArguments(),
    )
    options = changes.pop("options", {})
    args = replace(args, loss_options=options)
    return replace(args, **{name: replace(getattr(args, name), **values) for name, values in changes.items()})


def rows_of(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def finite(rows: list[dict]) -> bool:
    return all(value is not None and math.isfinite(value) for row in rows for value in row.values())
