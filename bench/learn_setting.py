"""What the rows of bench.learn begin with: a seed's problems, its SFT model, pairs of correct and wrong answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign.recipes import arithmetic, demo
from fastalign.recipes.arguments import Arguments, BatchArguments, DataArguments, ModelArguments, OptimArguments, RunArguments

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
        "pairs": write_rows(setting.root / "data" / "pairs.jsonl", pairs[:max_pairs]),
        "labelled": write_rows(setting.root / "data" / "labelled.jsonl", labelled[: 2 * max_pairs]),
    }


def write_rows(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def accuracies(setting: Setting, model: Path) -> Row:
    return {"before": setting.accuracy(setting.start), "after": setting.accuracy(model), "measure": "held-out greedy accuracy"}
