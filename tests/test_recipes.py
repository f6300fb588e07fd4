"""Recipes end to end on tiny models: outputs, resume to the bit, a killed run, what users break."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastalign import cli
from fastalign.algorithms import ALGORITHMS
from fastalign.generation import Engine, SamplingParams
from fastalign.models.load import load_causal_lm, load_tokenizer
from fastalign.recipes import arithmetic, online, sft
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OnlineArguments,
    OptimArguments,
    RunArguments,
    SamplingArguments,
)

REWARD = """
def parity(prompts, completions, **columns):
    return [float(len(c) % 2) for c in completions]
"""
VOLATILE = ("timing_s/", "tokens_per_second", "step_time", "peak_memory_mb")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A model, demonstrations, prompts and a reward file."""
    root = tmp_path_factory.mktemp("task")
    tokenizer = arithmetic.build_tokenizer()
    arithmetic.build_model(0, len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    demonstrations, heldout, train = arithmetic.problems(0, demonstrations=40, heldout=8)
    arithmetic.write_jsonl(root / "sft.jsonl", demonstrations, ("prompt", "completion"))
    arithmetic.write_jsonl(root / "train.jsonl", train[:40], ("prompt", "answer"))
    arithmetic.write_jsonl(root / "heldout.jsonl", heldout, ("prompt", "completion", "answer"))
    (root / "reward.py").write_text(REWARD)
    return root


def arguments(task: Path, output: Path, command: str, **changes) -> Arguments:
    data = "sft.jsonl" if command == "sft" else "train.jsonl"
    args = Arguments(
        command=command,
        model=ModelArguments(model_name_or_path=str(task / "model"), dtype="float32", device="cpu"),
        data=DataArguments(dataset_name=str(task / data), eval_dataset_name=str(task / "heldout.jsonl"), max_length=48),
        optim=OptimArguments(learning_rate=1e-3, max_steps=4, lr_scheduler_type="constant"),
        batch=BatchArguments(per_device_train_batch_size=8),
        run=RunArguments(output_dir=str(output)),
        sampling=SamplingArguments(max_completion_length=6),
        online=OnlineArguments(num_generations=4, reward=[f"{task / 'reward.py'}:parity"]),
    )
    return replace(args, **{name: replace(getattr(args, name), **values) for name, values in changes.items()})


def rows_of(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def test_sft_writes_everything_and_the_model_loads_in_transformers(task, tmp_path):
    from transformers import AutoModelForCausalLM

    summary = sft.run(arguments(task, tmp_path, "sft"))
    rows = rows_of(tmp_path)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    assert summary["eval/loss/before"] == rows[0]["eval/loss"]
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report.html", "config.json", "model.safetensors"} <= set(os.listdir(tmp_path))
    assert "fastalign" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer("12+34=").input_ids
    expected = plain.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    engine = Engine(load_causal_lm(str(tmp_path)), tokenizer)
    got = engine.generate([ids], SamplingParams(temperature=0.0, max_tokens=8))[0].outputs[0].token_ids
    assert got == expected[: len(got)]
    assert len(got) == 8 or got[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_resume_continues_to_the_bit(task, tmp_path, command):
    recipe = sft if command == "sft" else online
    whole = arguments(task, tmp_path / "whole", command, optim={"max_steps": 4, "lr_scheduler_type": "cosine"})
    recipe.run(whole)
    saving = arguments(task, tmp_path / "part", command, optim={"max_steps": 4, "lr_scheduler_type": "cosine"}, run={"save_steps": 2})
    recipe.run(saving)
    for name in ("model.safetensors", "summary.json"):
        (tmp_path / "part" / name).unlink()
    recipe.run(replace(saving, run=replace(saving.run, resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))))
    assert rows_of(tmp_path / "part") == rows_of(tmp_path / "whole")
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_grpo_kill_9_and_resume_equals_an_undisturbed_run(task, tmp_path):
    flags = {"optim": {"max_steps": 6}, "run": {"save_steps": 1, "save_total_limit": 2}, "online": {"beta": 0.1}}
    online.run(arguments(task, tmp_path / "whole", "grpo", **flags))
    killed = arguments(task, tmp_path / "killed", "grpo", **flags)
    command = [sys.executable, "-m", "fastalign", "grpo"]
    for name, value in killed.flat().items():
        if value not in ("", [], None) and not isinstance(value, bool):
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    command += ["--shuffle", "true"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / "checkpoint-2").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert (tmp_path / "killed" / "checkpoint-2").exists() or (tmp_path / "killed" / "checkpoint-3").exists(), errors
    online.run(replace(killed, run=replace(killed.run, resume_from_checkpoint="latest")))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def test_grpo_sampler_and_trainer_agree_and_metrics_are_named_as_documented(task, tmp_path):
    online.run(arguments(task, tmp_path, "grpo", online={"beta": 0.04}))
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert len(rows) == 4
    expected = (
        "loss grad_norm learning_rate epoch num_tokens reward reward_std frac_reward_zero_std rewards/parity/mean rewards/parity/std "
    )
    expected += "completions/mean_length completions/min_length completions/max_length completions/clipped_ratio kl entropy "
    expected += "clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean sampling/sampling_logp_difference/mean"
    assert set(expected.split()) <= set(rows[0])
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-5
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] > 0


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "grpo"])
def test_every_row_of_the_table_trains(task, tmp_path, algorithm):
    steps = {"step_reward": f"{task / 'reward.py'}:parity"} if algorithm == "process_grpo" else {}
    changes = {"online": {"algorithm": algorithm, "num_iterations": 2}, "optim": {"max_steps": 2}, "data": {"eval_dataset_name": ""}}
    online.run(arguments(task, tmp_path, "grpo", **changes, process=steps))
    rows = rows_of(tmp_path)
    assert len(rows) == 2
    assert all(row["grad_norm"] is not None for row in rows)


def test_grpo_lora_saves_an_adapter_and_uses_the_base_as_reference(task, tmp_path):
    args = arguments(task, tmp_path, "grpo", model={"use_peft": True, "lora_r": 4}, online={"beta": 0.04})
    online.run(args)
    assert (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "adapter_model.safetensors").exists()
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] > 0


def test_sft_bf16_and_gradient_checkpointing_train(task, tmp_path):
    args = arguments(task, tmp_path, "sft", model={"dtype": "bfloat16", "gradient_checkpointing": True}, optim={"max_steps": 6})
    sft.run(args)
    rows = rows_of(tmp_path)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]


def test_lora_output_loads_merged_into_its_base(task, tmp_path):
    sft.run(arguments(task, tmp_path / "lora", "sft", model={"use_peft": True, "lora_r": 4}))
    merged = load_causal_lm(str(tmp_path / "lora"))
    base = load_causal_lm(str(task / "model"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert list(merged.state_dict()) == list(base.state_dict())
    assert not torch.equal(merged.state_dict()[name], base.state_dict()[name])


def test_resume_refuses_another_learning_rate(task, tmp_path):
    sft.run(arguments(task, tmp_path, "sft", run={"save_steps": 2}))
    with pytest.raises(ValueError, match="learning_rate was"):
        sft.run(arguments(task, tmp_path, "sft", run={"resume_from_checkpoint": "latest"}, optim={"learning_rate": 0.5, "max_steps": 6}))


def test_a_finished_run_is_not_resumed_from_nothing(task, tmp_path):
    sft.run(arguments(task, tmp_path, "sft", optim={"max_steps": 1}))
    with pytest.raises(FileExistsError, match="nothing to resume"):
        sft.run(arguments(task, tmp_path, "sft", run={"resume_from_checkpoint": "latest"}))


def test_dry_run_trains_nothing(task, tmp_path):
    plan = online.run(arguments(task, tmp_path / "none", "grpo", run={"dry_run": True}, online={"beta": 0.0}))
    assert plan["optimizer steps"] == 4
    assert "parameters" in plan
    assert "memory: reference, MiB" not in plan
    assert not (tmp_path / "none").exists()
    beside = online.run(arguments(task, tmp_path / "none", "grpo", run={"dry_run": True}, online={"beta": 0.04}))
    assert beside["memory: reference, MiB"] == beside["memory: weights, MiB"]
    shared = arguments(task, tmp_path / "none", "grpo", run={"dry_run": True}, online={"beta": 0.04}, model={"use_peft": True})
    assert online.run(shared)["memory: reference, MiB"] == 0


def test_a_folder_with_a_model_or_a_run_is_not_written_over(task, tmp_path, caplog):
    model = shutil.copytree(task / "model", tmp_path / "model")
    args = arguments(task, model, "sft")
    weights = (model / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a model; name another, or add --overwrite_output_dir"):
        sft.run(args)
    sft.run(replace(args, run=replace(args.run, dry_run=True)))
    assert "the run itself would be refused: --output_dir" in caplog.text
    assert (model / "model.safetensors").read_bytes() == weights
    sft.run(replace(args, run=replace(args.run, overwrite_output_dir=True)))
    with pytest.raises(FileExistsError, match="already holds a run; add --resume_from_checkpoint latest"):
        sft.run(args)


def test_a_run_that_nobody_rewards_ends(task, tmp_path):
    (tmp_path / "silent.py").write_text("def silent(completions, **columns):\n    return [None] * len(completions)\n")
    silent = {"reward": [f"{tmp_path / 'silent.py'}:silent"]}
    with pytest.raises(RuntimeError, match=r"no completion had a reward in 10 rollouts in a row \(silent\)"):
        online.run(arguments(task, tmp_path / "run", "grpo", online=silent, optim={"max_steps": 12}))
    online.run(arguments(task, tmp_path / "short", "grpo", online=silent, optim={"max_steps": 9}))


def test_stop_at_ends_the_run_at_the_first_evaluation_for_which_it_holds(task, tmp_path):
    args = arguments(task, tmp_path, "sft", run={"eval_steps": 1, "stop_at": "eval/loss<100"})
    sft.run(args)
    assert rows_of(tmp_path)[-1]["step"] == 1
    assert (tmp_path / "model.safetensors").exists()
    with pytest.raises(ValueError, match="no metric 'eval/los'"):
        sft.run(arguments(task, tmp_path / "b", "sft", run={"eval_steps": 1, "stop_at": "eval/los<1"}))
    with pytest.raises(ValueError, match="needs held-out data"):
        sft.run(arguments(task, tmp_path / "d", "sft", run={"stop_at": "eval/loss<1"}, data={"eval_dataset_name": ""}))
    with pytest.raises(ValueError, match="expected a held-out metric"):
        sft.run(arguments(task, tmp_path / "c", "sft", run={"stop_at": "loss=3"}))


def test_run_refuses_to_write_over_another(task, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(FileExistsError, match="--overwrite_output_dir"):
        sft.run(arguments(task, tmp_path, "sft"))
    (tmp_path / "metrics.jsonl").write_text("")  # of a run that ended before its first step
    sft.run(arguments(task, tmp_path, "sft", optim={"max_steps": 1}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"online": {"num_generations": 3}}, "multiple of --num_generations 3"),
        ({"online": {"num_generations": 1}}, "of a group of 1 is 0"),
        ({"sampling": {"temperature": 0.0}}, "--temperature must be > 0"),
        ({"online": {"algorithm": "gprpo"}}, "did you mean"),
        ({"online": {"reward": []}}, "--reward is required"),
        ({"online": {"reward": ["lenght"]}}, "length"),
        ({"online": {"beta": -1.0}}, "--beta must be >= 0"),
        ({"optim": {"learning_rate": 0.0}}, "--learning_rate must be > 0"),
        ({"optim": {"lr_scheduler_type": "cosin"}}, "cosine"),
        ({"optim": {"max_steps": 0}}, "nothing to do"),
        ({"model": {"model_name_or_path": ""}}, "--model_name_or_path is required"),
        ({"model": {"device": "cuda"}} if not torch.cuda.is_available() else {"model": {"device": "gpu"}}, "--device"),
        ({"data": {"dataset_map": "promt=prompt"}}, "prompt"),
    ],
)
def test_grpo_bad_arguments_are_named(task, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        online.run(arguments(task, tmp_path, "grpo", **changes))


def test_grpo_survives_a_reward_that_raises_for_some(task, tmp_path):
    (tmp_path / "r.py").write_text("def odd(completions, **k):\n    return [1.0 / (len(c) % 2) for c in completions]\n")
    online.run(arguments(task, tmp_path / "out", "grpo", online={"reward": [f"{tmp_path / 'r.py'}:odd"]}, optim={"max_steps": 2}))
    rows = [row for row in rows_of(tmp_path / "out") if "loss" in row]
    assert len(rows) == 2
    assert rows[0].get("rewards/odd/missing", 0) > 0


@pytest.mark.parametrize("kind", ["sft", "streamed", "dpo", "kto", "reward"])
def test_a_record_over_the_models_positions_is_named(task, tmp_path, kind, capsys):
    """It would end in an IndexError where positions are learned, and train silently where they are rotary."""
    model, positions = task / "model", load_causal_lm(str(task / "model")).config.max_position_embeddings
    long = "1" * (positions + 5)
    sides = {
        "dpo": {"chosen": long, "rejected": "1"},
        "kto": {"completion": long, "label": True},
        "reward": {"chosen": long, "rejected": "1"},
    }
    rows = [{"prompt": "1+1=", **sides.get(kind, {"completion": long})}] * 2
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "out")]
    flags += ["--max_length", "100000", "--max_steps", "1", *(["--streaming"] if kind == "streamed" else [])]
    assert cli.main([{"streamed": "sft"}.get(kind, kind), *flags]) == 2
    assert f"data.jsonl:1: expected at most {positions} tokens, got" in (told := capsys.readouterr().err)
    assert "at most to the model's positions" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("sft --lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type: expected one of linear, "),
        ("sft --adam_beta1 1", "--adam_beta1: expected a number in [0, 1), got 1.0"),
        ("sft --seed 99999999999999999999999", "--seed: expected an integer in [0, 2**63), got 99999999999999999999999"),
        ("sft --use_peft --lora_alpha 0", "--lora_alpha: expected at least 1, got 0"),
        ("dpo --loss sft --loss_weights -1", "--loss_weights: expected finite numbers >= 0, not all of them 0, got -1.0"),
        ("dpo --loss dpo --loss_weights 0", "--loss_weights: expected finite numbers >= 0, not all of them 0, got 0.0"),
    ],
)
def test_values_that_undo_learning_are_refused(task, tmp_path, flags, message, capsys):
    command, *rest = flags.split()
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "1+1=", "completion": "2", "chosen": "2", "rejected": "3"}) + "\n")
    common = ["--model_name_or_path", str(task / "model"), "--dataset_name", str(tmp_path / "data.jsonl"), "--max_steps", "1"]
    assert cli.main([command, *common, "--output_dir", str(tmp_path / "out"), "--max_length", "8", *rest]) == 2
    assert message in capsys.readouterr().err
    assert cli.main([command, *common, "--output_dir", ""]) == 2
    assert "--output_dir: expected a folder, got an empty text" in capsys.readouterr().err
