"""The command line: what it accepts, what it says when it does not, and that help needs no torch."""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import fastalign
from fastalign import catalogue, cli
from fastalign.recipes import flags
from fastalign.recipes.arguments import COMMANDS, Arguments, OnlineArguments

ROOT = Path(__file__).resolve().parents[1]


def fails(capsys, *argv):
    """The error line of a command that a user got wrong."""
    assert cli.main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("fastalign: error: ")
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_cli_every_flag_has_help_and_one_home(command):
    names = [f.name for section in COMMANDS[command] for f in fields(section)]
    assert len(names) == len(set(names))
    for section in COMMANDS[command]:
        texts = flags.flag_help(section)
        assert list(texts) == [f.name for f in fields(section)], f"{section.__name__}: the docstring and the fields differ"
        assert all(len(text) > 8 for text in texts.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_cli_help_lists_every_flag_with_its_default(command, capsys):
    assert cli.main([command, "-h"]) == 0
    shown = capsys.readouterr().out
    for name in flags.flag_types(command):
        assert f"--{name}" in shown
    if command == "grpo":
        assert "(default: 1e-05)" in shown
        assert "dr_grpo" in shown


def test_cli_overview_names_every_command(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("sft", "grpo", "generate", "demo", "algorithms", "env"))
    assert set(COMMANDS) <= set(catalogue.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastalign {fastalign.__version__}\n"


def test_cli_help_and_user_errors_need_no_torch():
    code = """
import sys, contextlib, io
from fastalign.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for argv in (["-h"], ["grpo", "-h"], ["demo", "-h"], ["algorithms"], ["--version"], ["grpo", "--lerning_rate", "1"], ["sft"]):
        main(argv)
print(sorted({"torch", "transformers", "matplotlib", "numpy", "datasets"} & set(sys.modules)))
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    print(f"seven invocations: {time.perf_counter() - start:.2f} s")
    assert done.stdout == "[]\n"


def test_cli_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fastalign", "gpro"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "fastalign: error: unknown command gpro; did you mean grpo?\n"


@pytest.mark.parametrize(
    "argv, words",
    [
        (("grpo", "--lerning_rate", "1e-5"), ["unknown --lerning_rate", "--learning_rate"]),
        (("sft", "--batch_size", "8"), ["--per_device_train_batch_size"]),
        (("sft", "--num_generations", "8"), ["unknown --num_generations"]),
        (("sft", "--max_steps", "ten"), ["--max_steps: expected an integer, got 'ten'"]),
        (("sft", "--max_steps", "1.5"), ["--max_steps: expected an integer, got '1.5'"]),
        (("sft", "--learning_rate", "nan"), ["--learning_rate: expected a number, got 'nan'"]),
        (("sft", "--use_peft", "maybe"), ["--use_peft: expected true or false, got 'maybe'"]),
        (("sft", "--max_steps"), ["--max_steps: expected one argument"]),
        (("sft", "--logging_steps", "0"), ["--logging_steps must be > 0, got 0"]),
        (("grpo", "--top_p", "1.5"), ["--top_p must be <= 1, got 1.5"]),
        (("grpo", "--beta", "-1"), ["--beta must be >= 0, got -1.0"]),
        (("sft", "--dtype", "bf16"), ["--dtype: unknown bf16", "bfloat16"]),
        (("sft", "--on_bad_record", "skp"), ["--on_bad_record", "did you mean skip?"]),
        (("grpo", "--algorithm", "gropo"), ["--algorithm: unknown gropo", "grpo"]),
        (("grpo", "--aggregate", "tokens"), ["--aggregate", "did you mean token?"]),
        (("grpo", "--loss", "zzz"), ["--loss: unknown zzz; valid: clip"]),
        (("grpo", "--loss.epsilon"), ["--loss.epsilon: expected a value"]),
        (("distill", "--loss.epsilon", "0.2"), ["unknown --loss.epsilon"]),
        (("sft", "stray"), ["unexpected argument 'stray'"]),
        (("sft",), ["needs --model_name_or_path and --dataset_name"]),
        (("grpo", "--model_name_or_path", "m", "--dataset_name", "d"), ["needs --reward"]),
        (("reward", "--model_name_or_path", "m", "--dataset_name", "d", "--max_chunk_bytes", "9"), ["reward does not read it"]),
        (("sft", "--config", "/none.yaml"), ["there is no file /none.yaml"]),
        (("algorithms", "extra"), ["takes no arguments, got extra"]),
        (("sft", "--model_name_or_path", "./missing", "--dataset_name", "d"), ["--model_name_or_path: there is no ./missing"]),
        (("sft", "--model_name_or_path", ".", "--dataset_name", "missing.jsonl"), ["--dataset_name: there is no missing.jsonl"]),
    ],
)
def test_cli_error_says_what_and_what_instead(argv, words, capsys):
    line = fails(capsys, *argv)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "text, words",
    [
        ("lerning_rate: 1", ["key lerning_rate; did you mean learning_rate?"]),
        ("max_steps: ten", ["max_steps: expected an integer, got 'ten'"]),
        ("shuffle: 3", ["shuffle: expected true or false, got 3"]),
        ("run_name: [a, b]", ["run_name: expected text, got ['a', 'b']"]),
        ("dtype: float16", ["dtype: unknown float16; did you mean bfloat16 or float32?"]),
        ("- a\n- b", ["expected flag: value lines, got list"]),
        ("a: [", ["is not valid YAML"]),
    ],
)
def test_cli_config_errors_name_file_and_key(tmp_path, text, words, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    line = fails(capsys, "sft", "--config", str(path))
    assert all(word in line for word in ["run.yaml", *words]), line


def parsed(command, *argv):
    return flags.build(command, flags.parse(command, list(argv)))


def test_cli_flags_override_the_config_which_overrides_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\nmax-steps: 7\nreward: [math, format]\nloss.epsilon: 0.3\nbeta: null\nshuffle: no\n")
    args = parsed("grpo", "--config", str(path), "--max-steps", "9", "--loss.epsilon_high=0.4", "--seed=3")
    assert (args.optim.learning_rate, args.optim.max_steps, args.optim.weight_decay) == (1e-4, 9, 0.0)
    assert args.online.reward == ["math", "format"]
    assert args.loss_options == {"epsilon": 0.3, "epsilon_high": 0.4}
    assert args.data.shuffle is False
    assert args.online.beta is None
    assert args.run.seed == 3
    assert args.command == "grpo"


def test_cli_lists_repeat_or_continue():
    one = parsed("grpo", "--reward", "a", "--reward", "b.py:f", "c", "--reward_weights", "1", "0.5", "-2")
    assert one.online.reward == ["a", "b.py:f", "c"]
    assert one.online.reward_weights == [1.0, 0.5, -2.0]
    assert parsed("generate", "--prompt", "2 - 2 =", "--stop", "\n").generate.prompt == ["2 - 2 ="]


def test_cli_values_of_every_kind():
    words = "--use_peft --shuffle false --beta none --max_steps -1 --run_name 7 --seed 9223372036854775809"
    args = parsed("grpo", *words.split())
    assert args.model.use_peft is True
    assert args.data.shuffle is False
    assert args.online.beta is None
    assert args.optim.max_steps == -1
    assert args.run.run_name == "7"
    assert args.run.seed == 2**63 + 1
    args = parsed("grpo", *["--advantage.eps", "1e-6", "--loss.flag", "true", "--loss.low", "-1", "--loss.x", "none"])
    assert args.advantage_options == {"eps": 1e-6}
    assert args.loss_options == {"flag": True, "low": -1, "x": None}


@pytest.mark.parametrize("command", ["sft", "grpo", "generate"])
def test_cli_resolved_config_reads_back(tmp_path, command):
    argv = ["--temperature", "0.7", "--stop", "a", "b"] if command != "sft" else ["--learning_rate", "3e-4"]
    args = parsed(command, *argv, *(["--loss.epsilon", "0.25"] if command == "grpo" else []))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(args.flat(), sort_keys=False))
    assert parsed(command, "--config", str(path)) == args
    assert set(flags.flag_types(command)) <= set(args.flat())


def stub(monkeypatch, name, run):
    module = type(sys)(f"fastalign.recipes.{name}")
    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(module.__name__, module, raising=False)


def test_cli_calls_the_recipe_with_the_arguments(monkeypatch, tmp_path, capsys):
    called = []
    for name in ("sft", "online", "generate", "demo"):
        stub(monkeypatch, name, lambda *args, **options: called.append((args, options)) or {"memory": 7, "backends": {"scan": "native"}})
    common = ["--model_name_or_path", str(tmp_path), "--dataset_name", str(tmp_path)]
    assert cli.main(["sft", *common, "--dry_run"]) == 0
    assert "memory" in capsys.readouterr().out
    assert cli.main(["grpo", *common, "--reward", "math", "--algorithm", "dapo"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert cli.main(["generate", *common[:2], "--prompt", "hello"]) == 0
    assert cli.main(["demo", "--output_dir", str(tmp_path), "--seed", "2", "--quick"]) == 0
    (sft, online, generate, demo) = called
    assert isinstance(sft[0][0], Arguments)
    assert sft[0][0].model.model_name_or_path == str(tmp_path)
    assert online[0][0].online == OnlineArguments(algorithm="dapo", reward=["math"])
    assert generate[0][3].prompt == ["hello"]
    assert demo == ((str(tmp_path), 2), {"quick": True})


def stub_sft(monkeypatch, error):
    def run(args):
        raise error

    stub(monkeypatch, "sft", run)


def test_cli_exit_codes(monkeypatch, tmp_path, capsys):
    argv = ["sft", "--model_name_or_path", str(tmp_path), "--dataset_name", str(tmp_path)]
    stub_sft(monkeypatch, KeyboardInterrupt("stopped; go on with --resume_from_checkpoint latest"))
    assert cli.main(argv) == 130
    assert "resume_from_checkpoint latest" in capsys.readouterr().err
    stub_sft(monkeypatch, OSError(28, "no space left", "/runs/x"))
    assert fails(capsys, *argv) == "fastalign: error: /runs/x: no space left"
    stub_sft(monkeypatch, ValueError("a library's own"))
    with pytest.raises(ValueError, match="a library's own"):  # raised outside fastalign: a traceback is worth more
        cli.main(argv)
    monkeypatch.setenv("FASTALIGN_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown --x"):
        cli.main(["sft", "--x"])


def test_cli_closed_pipe_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "fastalign", "grpo", "-h"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""


def test_cli_algorithms_prints_every_row(capsys):
    assert cli.main(["algorithms"]) == 0
    shown = capsys.readouterr().out
    for tables in catalogue.ROWS.values():
        assert all(name in shown for table in tables.values() for name in table)
    assert "--loss.epsilon_high" in shown


def test_catalogue_agrees_with_the_tables():
    from fastalign import algorithms
    from fastalign.advantages import ADVANTAGES, DENSE_ADVANTAGES, TOKEN_ADVANTAGES
    from fastalign.losses.policy import AGGREGATES, POLICY
    from fastalign.losses.preference import PREFERENCE
    from fastalign.losses.unpaired import UNPAIRED

    assert set(catalogue.ALGORITHMS) == set(algorithms.ALGORITHMS)
    assert set(catalogue.ACTOR_CRITICS) == set(algorithms.ACTOR_CRITICS)
    assert set(catalogue.ADVANTAGES) == set(ADVANTAGES)
    assert set(catalogue.TOKEN_ADVANTAGES) == set(TOKEN_ADVANTAGES)
    assert set(catalogue.DENSE_ADVANTAGES) == set(DENSE_ADVANTAGES)
    assert set(catalogue.POLICY_LOSSES) == set(POLICY)
    assert set(catalogue.PREFERENCE_LOSSES) == set(PREFERENCE)
    assert set(catalogue.UNPAIRED_LOSSES) == set(UNPAIRED)
    assert set(catalogue.AGGREGATES) == set(AGGREGATES)
    functions = [(ADVANTAGES[name], entry) for name, entry in catalogue.ADVANTAGES.items()]
    functions += [(TOKEN_ADVANTAGES[name], entry) for name, entry in catalogue.TOKEN_ADVANTAGES.items()]
    functions += [(DENSE_ADVANTAGES[name], entry) for name, entry in catalogue.DENSE_ADVANTAGES.items()]
    functions += [(POLICY[name].function, entry) for name, entry in catalogue.POLICY_LOSSES.items()]
    functions += [(PREFERENCE[name].function, entry) for name, entry in catalogue.PREFERENCE_LOSSES.items()]
    functions += [(UNPAIRED[name].function, entry) for name, entry in catalogue.UNPAIRED_LOSSES.items()]
    for function, entry in functions:
        parameters = inspect.signature(function).parameters.values()
        assert entry.options == tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY), function


def test_catalogue_nearest_names():
    assert catalogue.nearest("skp", ["error", "skip"]) == "unknown skp; did you mean skip?"
    assert catalogue.nearest("zz", ["error", "skip"]) == "unknown zz; valid: error, skip."
    assert catalogue.nearest("", ["a", "b"]) == "unknown ''; valid: a, b."


def test_package_public_names_load():
    assert fastalign.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in fastalign.__all__:
        assert getattr(fastalign, name) is not None, name
    assert set(fastalign.__all__) <= set(dir(fastalign))
    with pytest.raises(AttributeError, match="no attribute 'linear_logq'"):
        fastalign.linear_logq  # noqa: B018
    assert fastalign.losses.policy.POLICY


def test_package_import_is_light():
    code = (
        "import sys, fastalign; print('torch' in sys.modules); fastalign.losses; print('torch' in sys.modules); "
        "print({'torch._dynamo', 'transformers', 'triton'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "True", "set()"]


def test_cli_env_is_printed(capsys):
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "backends:" in shown
