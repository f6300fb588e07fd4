"""The bench suite: one file measured again goes into the results of the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import harness, readme, suite

ROOT = Path(__file__).resolve().parent.parent


def record(commit, date, *cases, **changes):
    rows = [
        {"op": op, "shape": shape, "dtype": "float32", "backend": side, "ms": ms, "torch_ms": 2.0, "floor_ms": None}
        for op, shape, ms in cases
        for side in ("fastalign", "torch")
    ]
    return {"device": "A", "torch": "2.13", "date": date, "commit": commit, "note": "idle", "results": rows, **changes}


def test_suite_puts_cases_measured_again_into_the_others():
    before = record("aaa", "2026-01-01", ("gae", "T=1", 1.0), ("gae", "T=2", 2.0), ("policy", "B=1", 3.0))
    found = suite.merged(before, record("bbb", "2026-01-02", ("gae", "T=2", 5.0), ("kl", "V=1", 6.0)))
    rows = {(row["op"], row["shape"], row["backend"]): (row["ms"], row["commit"], row["date"]) for row in found["results"]}
    assert len(rows) == len(found["results"]) == 8
    for side in ("fastalign", "torch"):
        assert rows["gae", "T=1", side] == (1.0, "aaa", "2026-01-01")
        assert rows["gae", "T=2", side] == (5.0, "bbb", "2026-01-02")
        assert rows["policy", "B=1", side] == (3.0, "aaa", "2026-01-01")
        assert rows["kl", "V=1", side] == (6.0, "bbb", "2026-01-02")
    assert (found["commit"], found["date"], found["note"]) == ("aaa and bbb", "2026-01-02", "idle")
    again = suite.merged(found, record("ccc", "2026-01-03", ("kl", "V=1", 7.0), ("policy", "B=1", 1.0)))
    assert again["commit"] == "aaa and bbb and ccc"


@pytest.mark.parametrize("key", ["device", "torch"])
def test_suite_refuses_results_of_another_machine(key):
    with pytest.raises(ValueError, match=f"the results are of {key} .*, this run is of 'other'; give another file"):
        suite.merged(record("aaa", "2026-01-01"), record("bbb", "2026-01-02", **{key: "other"}))


def test_readme_names_the_commit_of_each_row_of_merged_results():
    before = record("aaa", "2026-01-01", ("gae", "T=1", 1.0))
    assert not any("aaa" in line for line in readme.kernels(before)[1:])  # one commit: in the head alone
    lines = readme.kernels(suite.merged(before, record("bbb", "2026-01-02", ("kl", "V=1", 1.0))))
    assert [line.split(" | ")[-1] for line in lines if line.startswith(("| gae", "| kl"))] == ["2026-01-01, aaa |", "2026-01-02, bbb |"]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_suite_runs_one_file_into_results_that_exist(tmp_path):
    whole = tmp_path / "kernels.json"
    other = record("aaa", "2026-01-01", ("other", "T=1", 1.0))["results"]
    harness.write_record(whole, {"results": other})
    options = ["--quick", "--only", "policy", "--rounds", "1", "--into", str(whole), "-k", "gspo and 16-64"]
    same = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # the number of threads is part of the device
    subprocess.run([sys.executable, "-m", "bench.suite", *options], cwd=ROOT, check=True, capture_output=True, env=same)
    found = json.loads(whole.read_text())["results"]
    assert [(row["op"], row["backend"]) for row in found] == [
        *(("other", side) for side in ("fastalign", "torch")),
        *(("policy gspo", side) for side in ("fastalign", "torch", "floor")),
    ]
    assert all({"commit", "date"} <= set(row) for row in found)


@pytest.mark.parametrize(
    "arguments, words", [(["--only", "polcy"], "invalid choice: 'polcy'"), (["--into", "none.json"], "no such file: none.json")]
)
def test_suite_errors_say_what_there_is(arguments, words):
    done = subprocess.run([sys.executable, "-m", "bench.suite", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr
