"""`make gpu` where there is no GPU: its plan, its errors, its time limits; and that the gpu tests ask for nothing a bare machine lacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import bench_decode, gpu

ROOT = gpu.ROOT


def campaign(*arguments, **env):
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "WHEELS": "", **env})


def test_gpu_dry_run_prints_every_command():
    done = campaign("--dry_run")
    assert done.returncode == 0, done.stderr
    for words in ("-DFASTALIGN_CUDA=on", "--build", "pytest -q -m gpu", "tests/test_logits.py", "bench_scan.py --results"):
        assert words in done.stdout
    assert "pip" not in done.stdout


def test_gpu_dry_run_installs_given_wheels_offline_and_beside_the_build(tmp_path):
    (tmp_path / "peer-1.0-py3-none-any.whl").touch()
    done = campaign("--dry_run", WHEELS=str(tmp_path))
    assert re.search(r"pip install --no-index --no-deps .*--target \S*build/gpu/peers \S*peer-1\.0", done.stdout), done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--wheels", "no/such/folder"], "expected a folder with .whl files, there are none in no/such/folder"),
        (["--budget_s", "5"], "expected at least 30 seconds, got 5"),
        (["--bugdet_s", "50"], "unrecognized arguments"),
    ],
)
def test_gpu_says_what_is_wrong_with_its_arguments(arguments, message):
    done = campaign(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_stops_without_a_device(tmp_path):
    out = tmp_path / "gpu.json"
    done = campaign("--out", str(out))
    assert done.returncode == 2
    assert "missing here: a CUDA device" in done.stderr
    assert not out.exists()


def test_gpu_run_ends_a_command_and_its_children_at_the_limit(tmp_path):
    child = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    outcome = gpu.run([sys.executable, "-c", child], 3.0, tmp_path / "log")
    assert outcome.status == "out of time"
    assert outcome.seconds < 30
    assert outcome.lines == ["begun"]
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 30.0, tmp_path / "log").status == "failed"
    assert "tail" not in gpu.run([sys.executable, "-c", "print('all')"], 30.0, tmp_path / "log").record()


def test_gpu_run_lets_a_command_end_by_itself_at_the_limit(tmp_path):
    """pytest writes its report when it is interrupted; killed it would leave none of what it has found."""
    (tmp_path / "test_slow.py").write_text("import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(60)\n")
    report = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(tmp_path)]
    outcome = gpu.run(command, 8.0, tmp_path / "log", interrupt_s=20.0)
    assert outcome.status == "out of time"
    assert outcome.seconds < 40
    assert gpu.counts(report)["passed"] >= 1


def test_gpu_leaves_what_was_measured_before_a_failure(tmp_path, monkeypatch):
    """The whole campaign over stand-ins: a build that fails, tests of which one fails, a bench that measures and one that hangs."""
    benches = {
        "bench_good.py": "import json, sys\n# run_file(\nopen(sys.argv[2], 'w').write(json.dumps({'results': [{'ms': 1.5}]}))\n",
        "bench_hung.py": "import time\nprint('a line', flush=True)\ntime.sleep(600)\n",
    }
    for name, text in benches.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_right(): pass\ndef test_wrong(): assert False\ndef test_left(): pytest.skip('why')\n"
    )
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu, "bench_files", lambda: sorted(tmp_path.glob("bench_*.py")))
    monkeypatch.setattr(gpu, "build_commands", lambda _: [[sys.executable, "-c", "raise SystemExit('no compiler')"]])
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        f"--junitxml={tmp_path}/work/tests.xml",
    ]
    tests.append(str(tmp_path))  # the root is said: it names the tests in the report, and would be guessed from the working directory
    monkeypatch.setattr(gpu, "test_command", lambda: tests)
    monkeypatch.setattr(gpu, "missing", list)
    monkeypatch.setattr(gpu, "device", lambda: ("NVIDIA Stand-in 1", "90"))
    monkeypatch.setattr(gpu.Campaign, "left", lambda _: 40.0 if not (tmp_path / "work/bench_good.json").exists() else 3.0)
    out = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(out)]) == 1
    record = json.loads(out.read_text())
    assert record["device"] == "NVIDIA Stand-in 1"
    assert record["phases"]["build"]["status"] == "failed"
    assert record["phases"]["build"]["tail"] == ["no compiler"]
    assert record["tests"] == {"passed": 1, "failed": ["test_some::test_wrong"], "skipped": {"why": 1}}
    assert record["benches"]["bench_good"]["results"] == [{"ms": 1.5}]
    assert record["benches"]["bench_hung"]["status"] == "out of time"
    assert record["benches"]["bench_hung"]["lines"] == ["a line"]


def test_gpu_gives_the_decode_bench_more_time_and_asks_for_its_results():
    decode = next(path for path in gpu.bench_files() if path.stem == "bench_decode")
    assert gpu.shares(decode) > 1 == gpu.shares(decode.with_name("bench_scan.py"))
    assert gpu.bench_command(decode, 90.0)[-4:] == ["--budget_s", "60", "--results", str(gpu.WORK / "bench_decode.json")]


def test_gpu_leaves_out_the_benches_that_measure_a_cpu():
    listed = {path.stem for path in gpu.bench_files()}
    assert not listed & gpu.OF_CPUS
    everything = {path.stem: path.read_text() for path in (gpu.ROOT / "bench").glob("bench_*.py")}
    assert everything.keys() == listed | gpu.OF_CPUS
    assert all("cuda" in everything[name] or "device" in everything[name] for name in listed)


def test_decode_bench_reads_weights_once_and_every_context():
    """The floor of generation.md, for Qwen2.5-0.5B at batch 256 and context 1024: 292k tokens/s at 4.8 TB/s."""
    model = bench_decode.random_model("0.5B", "meta")
    moved = bench_decode.step_bytes(model, 256, 1024)
    assert moved - bench_decode.step_bytes(model, 0, 1024) == 256 * 1024 * 2 * 24 * 2 * 64 * 2
    assert bench_decode.step_bytes(model, 0, 0) == 2 * model.num_parameters()
    assert 256 / (moved / 4.8e12) == pytest.approx(292_000, rel=5e-3)


def test_gpu_file_is_named_after_the_device():
    assert re.fullmatch(r"gpu-h200-\d{4}-\d\d-\d\d\.json", gpu.default_out("NVIDIA H200").name)


def test_gpu_tests_are_collected_without_datasets_trl_and_plugins():
    """On a bare machine: these modules raise ImportError, and pytest has no plugin but its own."""
    absent = ("datasets", "trl", "liger_kernel", "pytest_timeout", "pytest_benchmark", "hypothesis", "math_verify", "matplotlib")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); import pytest; "
        "sys.exit(pytest.main(['-q', '-m', 'gpu', '--collect-only', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    files = gpu.gpu_test_files()
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in files:
        assert f"{file}::" in done.stdout, f"{file} has no gpu test that is collected"


def test_benches_run_without_pytest_benchmark(tmp_path):
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    results = tmp_path / "scan.json"
    command = [sys.executable, "bench/bench_scan.py", "--quick", "--rounds", "1", "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["backend"] for row in json.loads(results.read_text())["results"]} == {"fastalign", "torch", "floor"}
