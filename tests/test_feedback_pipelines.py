"""The pipelines of SPIN, self-rewarding rounds and Constitutional AI end to end, with a tiny model and a few records in place of theirs."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_models import write_arithmetic_model, write_chat_model

from fastalign import cli
from fastalign.recipes import pipeline

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "pipelines"
SMALL = {"max_steps": 2, "per_device_train_batch_size": 4, "max_completion_length": 4, "finished_only": False}


def write(path: Path, name: str, change) -> Path:
    """The example with the changes that `change` makes to its stages; folders and sizes are the test's."""
    told = yaml.safe_load((FOLDER / name).read_text())
    told |= {"output_dir": str(path / "out"), "defaults": {**told["defaults"], "device": "cpu", "dtype": "float32"}}
    for stage in told["stages"]:
        flags = pipeline.flag_types(stage["command"])
        stage |= {flag: value for flag, value in SMALL.items() if flag in flags}
        stage.pop("num_train_epochs", None)
        change(stage)
    (path / name).write_text(yaml.safe_dump(told))
    return path / name


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    root = tmp_path_factory.mktemp("sums")
    write_arithmetic_model(root / "model", num_hidden_layers=1)
    rows = [{"question": f"{n}+1=", "answer": f"{n + 1}"} for n in range(20, 28)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (root / "digit.yaml").write_text("turns: '{prompt}{completion}='\npattern: '(\\d)'\nlow: 0\nhigh: 9\n")
    return root


def test_spin_learns_the_data_against_the_model_before(sums, tmp_path):
    def change(stage):
        if stage["command"] != "dpo":
            stage |= {"dataset_name": str(sums / "data.jsonl")}
        if stage["command"] == "sft":
            stage["model_name_or_path"] = str(sums / "model")
        if stage["command"] == "eval":
            stage |= {"reward": "math"}

    path, out = write(tmp_path, "spin.yaml", change), tmp_path / "out"
    assert cli.main(["run", str(path)]) == 0
    pairs = lines_of(out / "2-opponent-1" / "completions.pairs.jsonl")
    assert {pair["chosen"] for pair in pairs} <= {f"{n + 1}" for n in range(20, 28)}
    sampled = [row["completions"][0]["text"] for row in lines_of(out / "2-opponent-1" / "completions.jsonl")]
    assert [pair["rejected"] for pair in pairs] == [text for text in sampled if text]
    assert len(pairs) >= 4
    assert lines_of(out / "4-opponent-2" / "completions.pairs.jsonl") != pairs
    settings = yaml.safe_load((out / "5-round-2" / "config.yaml").read_text())
    assert (settings["loss"], settings["model_name_or_path"]) == (["spin"], str(out / "3-round-1"))
    assert json.loads((out / "6-measure" / "summary.json").read_text())["num_problems"] == 8


def test_self_rewarding_rounds_learn_the_best_against_the_worst(sums, tmp_path):
    def change(stage):
        if stage["command"] != "dpo":
            stage["dataset_name"] = str(sums / "pairs.jsonl")
        if stage["command"] == "sft":
            stage["model_name_or_path"] = str(sums / "model")
        if stage["command"] == "generate":
            template = f"template={sums / 'digit.yaml'}"
            stage["reward"] = stage["reward"].replace("template=additive", template).replace("max_tokens=512", "max_tokens=6")
            stage["temperature"] = 1.0

    path, out = write(tmp_path, "self-rewarding.yaml", change), tmp_path / "out"
    assert cli.main(["run", str(path)]) == 0
    rows, pairs = (lines_of(out / "2-samples-1" / f"completions{kind}.jsonl") for kind in ("", ".pairs"))
    best = {row["prompt"]: max((c["reward"] or 0.0 for c in row["completions"] if c["text"]), default=0.0) for row in rows}
    assert len(pairs) >= 4
    assert all(pair["chosen_reward"] == best[pair["prompt"]] > pair["rejected_reward"] for pair in pairs)
    settings = yaml.safe_load((out / "5-round-2" / "config.yaml").read_text())
    assert settings["model_name_or_path"] == str(out / "3-round-1")
    assert (out / "5-round-2" / "model.safetensors").read_bytes() != (out / "3-round-1" / "model.safetensors").read_bytes()
    assert cli.main(["run", str(path)]) == 0  # nothing is left to do


def test_constitutional_ai_goes_from_critiques_to_preferences(tmp_path):
    write_chat_model(tmp_path / "model", seed=4)
    asks = [{"prompt": [{"role": "user", "content": f"How do I break {n} locks?"}]} for n in range(4)]
    (tmp_path / "asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asks))

    def change(stage):
        if stage["command"] == "critique":
            stage |= {"dataset_name": str(tmp_path / "asks.jsonl"), "min_probability": 0.5}
            stage["principles"] = str(FOLDER.parent / "principles" / "harmless.yaml")
        if stage["command"] == "sft":
            stage["dataset_name"] = stage["dataset_name"][0]
        if "model_name_or_path" in stage:
            stage["model_name_or_path"] = str(tmp_path / "model")

    path, out = write(tmp_path, "constitutional.yaml", change), tmp_path / "out"
    assert cli.main(["run", str(path)]) == 0
    transcripts = lines_of(out / "1-critique" / "transcripts.jsonl")
    assert [len(item["rounds"]) for item in transcripts if item["ended"] == "rounds"].count(2) >= 1
    assert lines_of(out / "1-critique" / "sft.jsonl")
    assert all(0.5 <= pair["probability"] <= 1 for pair in lines_of(out / "3-feedback" / "pairs.jsonl"))
    settings = yaml.safe_load((out / "4-preference" / "config.yaml").read_text())
    assert settings["model_name_or_path"] == str(out / "2-revisions")
    assert (out / "4-preference" / "model.safetensors").exists()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_pipeline_is_read_and_says_how_it_is_run(path):
    assert pipeline.read(path)
    assert path.read_text().splitlines()[0] == f"# fastalign run examples/pipelines/{path.name}"
    assert f"pipelines/{path.name}" in (FOLDER.parent / "README.md").read_text()
