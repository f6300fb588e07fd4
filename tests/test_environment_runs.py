"""Commands with an environment: training end to end, metrics, agreement of sampler and trainer, resume, evaluation, errors."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from preference_runs import rows_of
from safetensors.torch import load_file
from tiny_models import write_arithmetic_model

from fastalign import cli
from fastalign.recipes import arithmetic, online, ppo, rejection
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OptimArguments,
    RejectionArguments,
    RunArguments,
    SamplingArguments,
)
from fastalign.recipes.online_arguments import EnvironmentArguments, OnlineArguments
from fastalign.recipes.rejection_task import Kept

FILE = """
class Echo:
    stop = "+"

    def __init__(self, fails=""):
        self.fails = fails

    def reset(self, answer, prompt):
        self.answer, self.prompt = answer, prompt
        if self.fails[:1] == "!" and prompt.startswith(self.fails[1:]):
            raise RuntimeError("no such world")

    def step(self, text):
        if self.fails and self.prompt.startswith(self.fails):
            raise RuntimeError("the tool is broken")
        return self.answer, float(text.count("7")), len(text) % 5 == 0

def length(completions, **columns):
    return [len(text) / 10 for text in completions]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("environments")
    write_arithmetic_model(root / "model")
    (train,) = arithmetic.problems(0)
    arithmetic.write_jsonl(root / "train.jsonl", train[:24], ("prompt", "answer"))
    arithmetic.write_jsonl(root / "heldout.jsonl", train[24:32], ("prompt", "answer"))
    (root / "echo_of_the_test.py").write_text(FILE)
    return root


def arguments(task, output, **changes) -> Arguments:
    args = Arguments(
        command="grpo",
        model=ModelArguments(model_name_or_path=str(task / "model"), dtype="float32", device="cpu"),
        data=DataArguments(dataset_name=str(task / "train.jsonl"), eval_dataset_name=str(task / "heldout.jsonl"), max_length=60),
        optim=OptimArguments(learning_rate=3e-3, max_steps=4, lr_scheduler_type="constant"),
        batch=BatchArguments(per_device_train_batch_size=16),
        run=RunArguments(output_dir=str(output)),
        sampling=SamplingArguments(max_completion_length=30),
        online=OnlineArguments(num_generations=4),
        environment=EnvironmentArguments(environment=f"{task / 'echo_of_the_test.py'}:Echo", max_turns=4),
    )
    return replace(args, **{name: replace(getattr(args, name), **values) for name, values in changes.items()})


def test_grpo_trains_on_turns_and_tells_of_them(task, tmp_path):
    changes = {"optim": {"max_steps": 12}, "online": {"reward": [f"{task / 'echo_of_the_test.py'}:length"], "reward_weights": [0.0]}}
    summary = online.run(arguments(task, tmp_path, **changes, environment={"environment_weight": 2.0}))
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    first, last = rows[0], rows[-1]
    assert {"turns/mean", "turns/max", "tool_calls/frac", "tool_calls/mean_tokens", "rewards/length/mean"} <= set(first)
    assert first["reward"] == pytest.approx(2 * first["rewards/environment/Echo/mean"])
    assert 1 < first["turns/mean"] <= first["turns/max"] <= 4
    assert 0 < first["tool_calls/frac"] <= 1
    assert first["tool_calls/failed"] == 0
    assert first["completions/mean_length"] + first["tool_calls/mean_tokens"] <= 30
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) <= 1e-4
    assert all(row["grad_norm"] > 0 for row in rows)
    assert sum(row["reward"] for row in rows[-3:]) > sum(row["reward"] for row in rows[:3]) + 3  # it learns to write 7s
    assert "eval/rewards/environment/Echo/mean" in summary
    assert last["num_tokens"] > first["num_tokens"]


def test_turns_hand_their_forward_passes_to_the_update(task, tmp_path):
    """Observations and what was computed anew behind a turn, too; the weights are those of a forward pass of the update's own."""
    found = {}
    for reuse in (True, False):
        args = arguments(task, tmp_path / str(reuse), online={"reuse_forward": reuse, "beta": 0.05}, optim={"max_steps": 4})
        online.run(args)
        rows = [row for row in rows_of(tmp_path / str(reuse)) if "loss" in row]
        found[reuse] = load_file(tmp_path / str(reuse) / "model.safetensors"), rows
    (weights, rows), (again, plain) = found[True], found[False]
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert all(row["turns/mean"] > 1 and row["forward_reused"] > 0.8 for row in rows)
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    assert {row["forward_reused"] for row in plain} == {0}


def test_resume_continues_to_the_bit(task, tmp_path):
    args = arguments(task, tmp_path / "whole", run={"save_steps": 2}, online={"num_iterations": 2, "beta": 0.05})
    online.run(args)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for stale in ("model.safetensors", "summary.json"):
        (tmp_path / "part" / stale).unlink()
    part = replace(args.run, output_dir=str(tmp_path / "part"), resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    online.run(replace(args, run=part))
    assert rows_of(tmp_path / "part") == rows_of(tmp_path / "whole")
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_broken_environment_costs_its_samples_alone(task, tmp_path, caplog):
    prompts = [json.loads(line)["prompt"] for line in (task / "train.jsonl").read_text().splitlines()]
    digit = prompts[0][0]
    changes = {"environment": {"environment": f"{task / 'echo_of_the_test.py'}:Echo:fails={digit}"}, "data": {"eval_dataset_name": ""}}
    reward = {"reward": [f"{task / 'echo_of_the_test.py'}:length"]}
    online.run(arguments(task, tmp_path, **changes, online=reward, optim={"max_steps": 6}))
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    missing = sum(row.get("rewards/length/missing", 0) for row in rows)
    assert missing == sum(row["tool_calls/failed"] for row in rows) == 4 * sum(p.startswith(digit) for p in prompts)
    assert "the tool is broken" in caplog.text
    assert all(math.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("algorithm", ["grpo", "process_grpo", "prime", "ppo"])
def test_a_world_that_does_not_begin_costs_its_samples_alone(task, tmp_path, algorithm):
    digit = json.loads((task / "train.jsonl").read_text().splitlines()[0])["prompt"][0]
    own, reward = f"{task / 'echo_of_the_test.py'}:Echo:fails=!{digit}", f"{task / 'echo_of_the_test.py'}:length"
    given = {"environment": {"environment": own}, "data": {"eval_dataset_name": ""}, "optim": {"max_steps": 6}}
    given["process"] = {"step_reward": reward if algorithm == "process_grpo" else ""}
    args = arguments(task, tmp_path, **given, online={"algorithm": algorithm, "reward": [reward]})
    (ppo if algorithm == "ppo" else online).run(args)
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert len(rows) == 6
    assert algorithm == "prime" or sum(row["tool_calls/failed"] for row in rows) > 0, "prime samples other prompts in their place"
    assert all(math.isfinite(row["loss"]) for row in rows if row["loss"] is not None)


def test_a_reward_that_is_not_finite_costs_its_sample_alone(task, tmp_path, caplog):
    (tmp_path / "world.py").write_text(FILE.replace('float(text.count("7"))', 'float("inf") if self.prompt[0] in "12345" else 1.0'))
    online.run(arguments(task, tmp_path / "out", environment={"environment": f"{tmp_path / 'world.py'}:Echo"}, optim={"max_steps": 2}))
    assert "its reward is not finite" in caplog.text


def test_an_environment_that_rewards_needs_no_reward_flag(task, tmp_path):
    flags = ["--model_name_or_path", str(task / "model"), "--dataset_name", str(task / "train.jsonl")]
    flags += ["--environment", f"{task / 'echo_of_the_test.py'}:Echo"]
    small = ["--device", "cpu", "--dtype", "float32", "--max_completion_length", "20"]
    trained = ["--per_device_train_batch_size", "4", "--num_generations", "4", "--max_steps", "1", "--max_length", "60"]
    assert cli.main(["grpo", *flags, *small, *trained, "--output_dir", str(tmp_path / "grpo")]) == 0
    assert cli.main(["rft", *flags, *small, *trained, "--prompts_per_round", "4", "--output_dir", str(tmp_path / "rft")]) == 0
    own = ["--max_samples", "4", "--num_samples", "2", "--min_reward", "0", "--output_dir", str(tmp_path / "eval")]
    assert cli.main(["eval", *flags, *small, *own]) == 0
    assert "pass@1" in (tmp_path / "eval" / "summary.json").read_text()


def test_the_greedy_baseline_and_a_critic_take_turns_too(task, tmp_path):
    online.run(arguments(task, tmp_path / "remax", online={"algorithm": "remax", "num_generations": 1}, optim={"max_steps": 2}))
    args = arguments(task, tmp_path / "ppo", online={"algorithm": "ppo", "num_generations": 1}, optim={"max_steps": 2})
    ppo.run(replace(args, command="ppo"))
    for name in ("remax", "ppo"):
        rows = [row for row in rows_of(tmp_path / name) if "loss" in row]
        assert all(row["turns/mean"] > 1 and row["sampling/sampling_logp_difference/max"] <= 1e-4 for row in rows)


def test_eval_takes_turns(task, tmp_path, capsys):
    flags = {
        "model_name_or_path": task / "model",
        "dataset_name": task / "heldout.jsonl",
        "dtype": "float32",
        "reward": f"{task / 'echo_of_the_test.py'}:length",
        "environment": f"{task / 'echo_of_the_test.py'}:Echo",
        "max_turns": 3,
        "num_samples": 2,
        "max_completion_length": 30,
        "output_dir": tmp_path,
    }
    status = cli.main(["eval", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])
    assert status == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    answered = [row for row in rows for one in row["completions"] if f"+{row['answer']}" in one["text"]]
    assert len(rows) == 8
    assert answered


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": ""}, "--reward is required"),
        ({"environment": "calculator"}, "--reward is required"),
        ({"environment": "calculatr"}, "did you mean 'calculator'"),
        ({"max_turns": 0}, "at least one turn"),
    ],
)
def test_what_cannot_be_run_is_an_error(task, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        online.run(arguments(task, tmp_path, environment=changes))


def test_a_missing_column_is_an_error_before_anything_is_sampled(task, tmp_path):
    with pytest.raises(ValueError, match="environment 'Echo': expected a column 'answer'"):
        online.run(arguments(task, tmp_path, data={"dataset_map": "answer=sum"}))


def test_generate_writes_turns_with_their_masks_and_goes_on(task, tmp_path, capsys):
    lines = []
    for name, max_samples in (("whole", 6), ("part", 3), ("part", 6)):
        output = tmp_path / f"{name}.jsonl"
        flags = {
            "model_name_or_path": task / "model",
            "dataset_name": task / "heldout.jsonl",
            "dtype": "float32",
            "environment": f"{task / 'echo_of_the_test.py'}:Echo",
            "max_completion_length": 30,
            "num_samples": 2,
            "logprobs": "true",
            "max_samples": max_samples,
            "output_file": output,
        }
        status = cli.main(["generate", *(word for flag, value in flags.items() for word in (f"--{flag}", str(value)))])
        assert status == 0, capsys.readouterr().err
        lines.append(output.read_text().splitlines())
    assert lines[0] == lines[2]
    samples = [sample for line in lines[0] for sample in json.loads(line)["completions"]]
    assert len(samples) == 12
    assert any(not all(sample["scored"]) for sample in samples)
    assert all(len(sample["scored"]) == len(sample["token_ids"]) == len(sample["logprobs"]) for sample in samples)


def test_rft_trains_on_what_the_model_wrote_alone(task, tmp_path):
    args = arguments(task, tmp_path, online={"reward": []})
    kept = RejectionArguments(num_generations=4, num_kept=2, reward=[f"{task / 'echo_of_the_test.py'}:length"])
    rejection.run(replace(args, command="rft", rejection=kept))
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert rows[0]["turns/mean"] > 1
    assert all(row["grad_norm"] > 0 for row in rows)


def test_what_rft_keeps_is_scored_where_the_model_wrote_it():
    found = Kept(0, [[1, 2, 3], [4, 5]], [1.0, 0.5], [[True, False, True], None])
    assert found.masks == [[True, False, True], [True, True]]
    assert Kept(0, [[1]], [1.0]).masks == [[True]]
