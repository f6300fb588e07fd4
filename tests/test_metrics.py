"""Metrics: rows, their reductions, resuming, trackers, a full disk."""

from __future__ import annotations

import errno
import json
import math
import signal
import subprocess
import sys
import types

import pytest
import torch
import yaml

from fastalign.training import metrics as module
from fastalign.training.files import disk_errors, write_atomic
from fastalign.training.interrupt import interruptible
from fastalign.training.metrics import Metrics, read_metrics
from fastalign.training.progress import headline


def test_metrics_row_reduces_each_key_by_its_meaning(tmp_path):
    metrics = Metrics(tmp_path, logging_steps=2, progress=False)
    metrics.add("loss", 6.0, 3)
    metrics.put(epoch=0.1)
    metrics.lowest("completions/min_length", 3)
    metrics.highest("completions/max_length", 9)
    assert metrics.end_step(1) is None
    metrics.add("loss", torch.tensor(2.0, requires_grad=True), torch.tensor(1))
    metrics.put(epoch=0.2)
    metrics.lowest("completions/min_length", 5)
    metrics.highest("completions/max_length", 7)
    metrics.count_tokens(100)
    row = metrics.end_step(2)
    assert row["loss"] == 2.0
    assert row["epoch"] == 0.2
    assert row["completions/min_length"] == 3
    assert row["completions/max_length"] == 9
    assert row["num_tokens"] == 100
    assert row["tokens_per_second"] > 0
    assert row["peak_memory_mb"] > 1
    metrics.end_step(3)
    metrics.flush(3)
    metrics.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [2, 3]
    assert "loss" not in read_metrics(tmp_path)[1]


def test_metrics_timers_are_seconds_a_step_and_pauses_are_left_out(tmp_path, monkeypatch):
    clock = iter(float(i) for i in range(100))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    metrics = Metrics(tmp_path, logging_steps=2, progress=False)  # 0
    with metrics.timer("update"):  # 1, 2
        pass
    metrics.end_step(1)
    with metrics.timer("update"):  # 3, 4
        pass
    with metrics.paused():  # 5, 6
        pass
    row = metrics.end_step(2)  # 7
    assert row["timing_s/update"] == 1.0
    assert row["step_time"] == 3.0


def test_metrics_nan_is_null(tmp_path):
    metrics = Metrics(tmp_path, progress=False)
    metrics.add("kl", 0.0, 0)
    metrics.add("reward", math.nan)
    metrics.add("loss", math.inf)
    metrics.end_step(1)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["reward"] is None
    assert row["kl"] is None
    assert row["loss"] is None


def drive(metrics, first, last, save_at=0):
    state = None
    for step in range(first, last + 1):
        metrics.add("loss", step / 7, 2)
        metrics.highest("completions/max_length", -step)
        metrics.put(learning_rate=0.1 * step)
        metrics.count_tokens(step)
        if metrics.end_step(step) is None and step == 7:
            metrics.flush(step)
        if step == save_at:
            state = json.loads(json.dumps(metrics.state_dict()))
    return state


def test_metrics_resumed_run_writes_the_rows_of_an_unbroken_one(tmp_path):
    whole = Metrics(tmp_path / "whole", logging_steps=3, progress=False)
    drive(whole, 1, 7)
    broken = Metrics(tmp_path / "broken", logging_steps=3, progress=False)
    state = drive(broken, 1, 6, save_at=4)
    broken.close()
    resumed = Metrics(tmp_path / "broken", logging_steps=3, progress=False)
    resumed.resume(4, state)
    drive(resumed, 5, 7)
    timed = ("tokens_per_second", "step_time", "peak_memory_mb")
    kept = [[{k: v for k, v in row.items() if k not in timed} for row in m.rows()] for m in (resumed, whole)]
    assert kept[0] == kept[1]
    assert [row["step"] for row in kept[0]] == [3, 6, 7]


def test_metrics_line_cut_short_by_a_kill_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    metrics = Metrics(tmp_path, progress=False)
    metrics.write(2, {"loss": 2.0})
    assert [row["step"] for row in metrics.rows()] == [1, 2]


def test_metrics_config_and_summary_are_written(tmp_path):
    metrics = Metrics(tmp_path, config={"learning_rate": 1e-5, "stop": ["é"]}, progress=False)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["stop"] == ["é"]
    metrics.summary({"accuracy": 0.5, "worst": math.nan, "nested": {"list": [math.inf]}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"accuracy": 0.5, "worst": None, "nested": {"list": [None]}}


def test_metrics_evaluation_is_a_row_of_its_own(tmp_path, capsys):
    metrics = Metrics(tmp_path, total_steps=2)
    metrics.write(0, {"eval/reward": 0.25})
    metrics.write(1, {"loss": 1.0, "reward": 0.5})
    metrics.close()
    assert metrics.rows()[0] == {"step": 0, "eval/reward": 0.25}
    shown = capsys.readouterr().err
    assert "eval/reward 0.25" in shown
    assert "step 1/2" in shown
    assert "reward 0.5" in shown


def test_metrics_headline_shows_what_there_is():
    assert headline({"reward": 0.5, "tokens_per_second": 12345.6, "odd": 1.0}) == "reward 0.5  tok/s 12,346"


def test_metrics_logging_steps_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="--logging_steps must be >= 1, got 0"):
        Metrics(tmp_path, logging_steps=0)


def test_metrics_unknown_tracker_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean tensorboard"):
        Metrics(tmp_path, report_to="tensorbord")


def test_metrics_missing_tracker_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r'pip install "fastalign\[wandb\]"'):
        Metrics(tmp_path, report_to="wandb")


def test_metrics_rows_reach_the_trackers(tmp_path, monkeypatch):
    logged, finished = [], []
    run = types.SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: finished.append(True))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: logged.append(options) or run))
    metrics = Metrics(tmp_path, report_to="wandb", config={"seed": 1}, progress=False)
    metrics.write(1, {"loss": 1.0})
    metrics.close()
    metrics.close()
    assert logged[0]["config"] == {"seed": 1}
    assert logged[0]["name"] == tmp_path.name
    assert logged[1][0] == 1
    assert logged[1][1]["loss"] == 1.0
    assert finished == [True]


def test_metrics_full_disk_names_the_path_and_keeps_whole_lines(tmp_path):
    # a file size limit makes the kernel cut a write in the middle, as a full disk does
    code = """
import resource, sys
from fastalign.training.metrics import Metrics
metrics = Metrics(sys.argv[1], progress=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
try:
    for step in range(1, 20):
        metrics.write(step, {"loss": 0.123456789})
except OSError as error:
    print(error)
    metrics.close()
"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert "metrics.jsonl" in out
    assert "no space left" in out
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines
    assert all(json.loads(line)["loss"] for line in lines)


def test_files_full_disk_is_recognized_behind_other_exceptions(tmp_path):
    for error in (
        OSError(errno.ENOSPC, "x"),
        RuntimeError("[enforce fail at inline_container.cc:672]"),
        Exception("I/O error (os error 28)"),
    ):
        with pytest.raises(OSError, match="no space left") as caught, disk_errors(tmp_path / "model"):
            raise error
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / "model")
    with pytest.raises(RuntimeError, match="other"), disk_errors(tmp_path):
        raise RuntimeError("other")


def test_files_failed_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="no space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_interrupt_first_signal_asks_second_raises(capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupt:  # noqa: PT012 (the second signal is the last statement)
        assert not interrupt.requested
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested
        assert "SIGTERM" in capsys.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_peak_memory_is_in_mib():
    assert 1 < module.peak_memory_mb() < 2**20
