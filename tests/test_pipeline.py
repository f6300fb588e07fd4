"""fastalign run: stages in turn on a tiny model, going on after a break, restarts, and what is told before anything runs."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_models import write_arithmetic_model

from fastalign import cli
from fastalign.recipes import arithmetic, pipeline
from fastalign.recipes.flags import parse

R1 = Path(__file__).resolve().parent.parent / "examples" / "pipelines" / "r1.yaml"
SMALL = {"max_steps": 2, "per_device_train_batch_size": 4, "max_completion_length": 4, "num_generations": 2, "max_length": 48}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    write_arithmetic_model(root / "model", num_hidden_layers=1)
    (problems,) = arithmetic.problems(0)
    arithmetic.write_jsonl(root / "data.jsonl", problems[:16], ("prompt", "completion", "answer"))
    (root / "reward.py").write_text("def digits(completions, **k):\n    return [float(sum(c.isdigit() for c in t)) for t in completions]\n")
    return root


def stages_of(task) -> list[dict]:
    data = str(task / "data.jsonl")
    online = {"dataset_name": data, "reward": f"{task / 'reward.py'}:digits", "num_generations": 2, "max_completion_length": 4}
    return [
        {"name": "warm", "command": "sft", "model_name_or_path": str(task / "model"), "dataset_name": data, "max_steps": 2},
        {"name": "reason", "command": "grpo", **online, "max_steps": 3, "save_steps": 1},
        {"name": "sample", "command": "generate", "dataset_name": data, "num_samples": 2, "max_completion_length": 4},
        {"name": "measure", "command": "eval", "model_name_or_path": "{warm}", "dataset_name": data, "reward": "math", "num_samples": 2},
    ]


DEFAULTS = {"per_device_train_batch_size": 4, "max_length": 48, "device": "cpu", "dtype": "float32", "max_completion_length": 4}


def write(path: Path, task, stages=None, **more) -> Path:
    told = {"output_dir": str(path.parent / "out"), "defaults": DEFAULTS, "stages": stages or stages_of(task)}
    path.write_text(yaml.safe_dump(told | more))
    return path


def test_stages_hand_their_model_on_and_are_not_run_twice(task, tmp_path, capsys):
    path = write(tmp_path / "p.yaml", task)
    assert cli.main(["run", str(path)]) == 0
    out = tmp_path / "out"
    assert "model_name_or_path: " + str(out / "1-warm") in (out / "2-reason" / "config.yaml").read_text()
    assert len((out / "3-sample" / "completions.jsonl").read_text().splitlines()) == 16
    assert json.loads((out / "4-measure" / "settings.json").read_text())["model_name_or_path"] == str(out / "1-warm")
    assert json.loads((out / "4-measure" / "summary.json").read_text())["num_samples"] == 32
    weights = (out / "2-reason" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert cli.main(["run", str(path)]) == 0
    assert capsys.readouterr().out.count("finished") == 4
    assert (out / "2-reason" / "model.safetensors").read_bytes() == weights


def test_a_broken_off_stage_goes_on_from_its_checkpoint(task, tmp_path, monkeypatch):
    path, ran = write(tmp_path / "p.yaml", task, stages_of(task)[:2]), []
    cli.main(["run", str(path)])
    whole = (tmp_path / "out/2-reason/model.safetensors").read_bytes()
    other = write(tmp_path / "q" / "p.yaml", task, stages_of(task)[:2]) if (tmp_path / "q").mkdir() is None else None

    def start(command, values):
        ran.append((command, values.get("resume_from_checkpoint"), values.get("overwrite_output_dir")))
        if command == "grpo" and len(ran) == 2:  # what a kill leaves: a checkpoint, no end
            cli._start(command, values | {"max_steps": 3, "save_steps": 1})
            for name in ("model.safetensors", "summary.json"):
                (Path(values["output_dir"]) / name).unlink()
            for step in (2, 3):
                folder = Path(values["output_dir"]) / f"checkpoint-{step}"
                for file in folder.glob("*") if folder.exists() else ():
                    file.unlink()
                folder.rmdir() if folder.exists() else None
            raise KeyboardInterrupt
        cli._start(command, values)

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(other, start)
    pipeline.run(other, start)
    assert ran == [("sft", "latest", None), ("grpo", "latest", None), ("grpo", "latest", None)]
    assert (tmp_path / "q/out/2-reason/model.safetensors").read_bytes() == whole


def test_changed_flags_are_told_and_restart_runs_what_follows_anew(task, tmp_path):
    stages, ran = stages_of(task), []
    path = write(tmp_path / "p.yaml", task, stages)

    def start(command, values):
        ran.append((command, values.get("overwrite_output_dir", False)))
        Path(values.get("output_dir", "") or Path(values["output_file"]).parent).mkdir(parents=True, exist_ok=True)

    pipeline.run(path, start)
    stages[1]["max_steps"] = 4
    write(path, task, stages)
    with pytest.raises(ValueError, match="stage reason: it was run with other max_steps; add --restart reason"):
        pipeline.run(path, start)
    ran.clear()
    pipeline.run(path, start, restart="reason")
    assert ran == [("grpo", True), ("generate", False), ("eval", True)]
    ran.clear()
    pipeline.run(path, start)
    assert ran == []


def test_a_stage_that_was_broken_off_with_other_flags_keeps_what_it_has(task, tmp_path):
    stages, ran = stages_of(task)[:1], []
    path = write(tmp_path / "p.yaml", task, stages)

    def start(command, values):
        ran.append((values.get("resume_from_checkpoint"), values.get("overwrite_output_dir")))
        (Path(values["output_dir"]) / "checkpoint-1").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="stopped in stage warm; the same fastalign run goes on"):
        pipeline.run(path, start)
    stages[0]["max_steps"] += 1
    write(path, task, stages)
    with pytest.raises(
        ValueError, match="stage warm: it was broken off with other max_steps; put them back to go on, or add --restart warm"
    ):
        pipeline.run(path, start)
    kept = tmp_path / "out" / "1-warm" / "checkpoint-1"
    assert kept.is_dir()

    def ended_early(command, values):
        ran.append((values.get("resume_from_checkpoint"), values.get("overwrite_output_dir")))
        raise ValueError("before it began")

    with pytest.raises(ValueError, match="before it began"):
        pipeline.run(path, ended_early, restart="warm")
    assert not kept.exists(), "checkpoints of other flags than the note has"
    assert ran == [("latest", None), (None, True)]


def test_a_default_is_given_where_the_command_means_the_same(task, tmp_path):
    stages = [*stages_of(task)[:1], {"name": "find", "command": "search", "dataset_name": "d.jsonl", "method": ["greedy"]}]
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "defaults": {"save_steps": 5}, "stages": stages}))
    first, second = pipeline.read(path)
    assert first.values["save_steps"] == 5
    assert "save_steps" not in second.values, "there it names a file"
    path.write_text(yaml.safe_dump({"defaults": {"output_dir": "x"}, "stages": stages}))
    with pytest.raises(ValueError, match="defaults: output_dir is the pipeline's own to give"):
        pipeline.read(path)


def test_a_commands_own_braces_are_left_alone(task, tmp_path):
    checker = {"name": "rl", "command": "grpo", "dataset_name": "d", "reward": "command:run=check {file} {record}"}
    stages = [*stages_of(task)[:1], checker]
    assert pipeline.read(write(tmp_path / "p.yaml", task, stages))[1].values["reward"] == ["command:run=check {file} {record}"]


def test_dry_run_tells_and_runs_nothing(task, tmp_path, capsys):
    assert cli.main(["run", str(write(tmp_path / "p.yaml", task)), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "stage 2/4 reason: fastalign grpo" in shown
    assert f"model_name_or_path: {tmp_path / 'out' / '1-warm'}" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("stages"), "expected stages, a list of flags each"),
        (lambda p: p.update(outputdir="x"), "did you mean output_dir"),
        (lambda p: p["defaults"].update(sed=1), "defaults: unknown key sed; did you mean seed"),
        (lambda p: p["stages"][1].update(command="grop"), "stage 2 (reason): unknown command grop; did you mean grpo"),
        (lambda p: p["stages"][1].update(name="warm"), "the name is taken by an earlier stage"),
        (lambda p: p["stages"][0].update(name="1 two"), "expected a name of letters, digits, - and _, got '1 two'"),
        (lambda p: p["stages"][3].update(model_name_or_path="{later}"), "{later} is no earlier stage; there are warm, reason, sample"),
        (lambda p: p["stages"][0].pop("model_name_or_path"), "the first model is named nowhere"),
        (lambda p: p["stages"][0].update(output_dir="x"), "output_dir is the pipeline's own to give"),
        (lambda p: p["stages"][1].update(max_stpes=3), "did you mean max_steps"),
        (lambda p: p["stages"][1].update(max_steps="many"), "max_steps: expected an integer, got 'many'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(task, tmp_path, capsys, change, message):
    path = write(tmp_path / "p.yaml", task)
    told = yaml.safe_load(path.read_text())
    change(told)
    path.write_text(yaml.safe_dump(told))
    assert cli.main(["run", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_run_says_what_it_needs(capsys, tmp_path):
    assert cli.main(["run"]) == 2
    assert "see fastalign run -h" in capsys.readouterr().err
    assert cli.main(["run", str(tmp_path / "none.yaml")]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert cli.main(["run", "-h"]) == 0
    assert "--restart STAGE" in capsys.readouterr().out


def test_the_r1_example_runs_on_a_tiny_model(task, tmp_path):
    told = yaml.safe_load(R1.read_text())
    told["output_dir"] = str(tmp_path / "r1")
    told["defaults"] |= DEFAULTS
    for stage in told["stages"]:
        flags = pipeline.flag_types(stage["command"])
        stage |= {name: value for name, value in SMALL.items() if name in flags}
        stage |= {"dataset_name": str(task / "data.jsonl"), "dataset_map": ""}
        stage.pop("min_reward", None)
        if stage["command"] == "rft":
            stage["min_reward"] = "none"
        if stage["command"] == "grpo":
            stage["algorithm"] = "dr_grpo"  # DAPO would look for groups with different rewards in vain
    told["stages"][0]["model_name_or_path"] = str(task / "model")
    path = tmp_path / "r1.yaml"
    path.write_text(yaml.safe_dump(told))
    assert cli.main(["run", str(path)]) == 0
    assert json.loads((tmp_path / "r1" / "5-measure" / "summary.json").read_text())["num_problems"] == 16


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_a_later_stage_that_lacks_a_flag_is_named_before_the_first_begins(task, tmp_path, dry_run, capsys):
    stages = stages_of(task)[:2]
    del stages[1]["reward"]
    assert cli.main(["run", str(write(tmp_path / "p.yaml", task, stages)), *dry_run]) != 0
    assert "stage reason: fastalign grpo needs --reward" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset_name": "no/such/file.jsonl"}, "stage measure: --dataset_name: there is no no/such/file.jsonl"),
        ({"model_name_or_path": "./none"}, "stage measure: --model_name_or_path: there is no ./none"),
        ({"reward": "mth"}, "stage measure: unknown reward 'mth'; did you mean 'math'?"),
        ({"reward": "none.py:score"}, "stage measure: reward 'none.py:score': no such file 'none.py'"),
    ],
)
def test_what_a_later_stage_names_is_looked_for_before_the_first_begins(task, tmp_path, flags, message, capsys):
    stages = stages_of(task)
    stages[3] |= flags
    assert cli.main(["run", str(write(tmp_path / "p.yaml", task, stages)), "--dry_run"]) == 2
    assert message in capsys.readouterr().err
    stages[3] |= {"dataset_name": "{sample}/completions.jsonl", "model_name_or_path": "{reason}", "reward": "math"}  # are made before
    assert cli.main(["run", str(write(tmp_path / "p.yaml", task, stages)), "--dry_run"]) == 0


def test_searchs_save_steps_is_a_file():
    assert parse("search", ["--save_steps", "steps.jsonl"])["save_steps"] == "steps.jsonl"
