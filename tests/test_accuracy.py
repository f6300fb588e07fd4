"""The accuracy table on small shapes: every op is in it, every row holds, and a row that does not is noticed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import accuracy
from fastalign.ops.backend import load_native

accuracy.load_cases()


LONG = {"sample_tokens"}  # interpreted, a minute or more
OPS = sorted({name for _, name, _, _ in accuracy.CASES})


@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.slow) if op in LONG else op for op in OPS])
def test_accuracy_every_row_holds(op):
    found = list(accuracy.rows("cpu", quick=True, ops=[op]))
    assert found
    assert not [row.line() for row in found if not row.holds]
    assert "reference" in {row.backend for row in found}
    if load_native()[0] is not None:
        assert any(row.backend.startswith("native") for row in found)


def test_accuracy_has_every_op_of_the_engine():
    assert {op for op, _, _, _ in accuracy.CASES} >= {"linear_logp", "scan", "attention", "sample", "adamw"}


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_accuracy_notices_a_wrong_value(wrong, monkeypatch, capsys):
    exact = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64)
    bad = exact.float() + torch.tensor([0.0] * 8 + [wrong])

    def case(at):
        return accuracy.Case(lambda: {"value": bad}, {"value": exact.float()}, {"value": exact})

    monkeypatch.setattr(accuracy, "CASES", [("scan", "case", (torch.float32,), case)])
    monkeypatch.setattr(accuracy, "load_cases", lambda: None)
    monkeypatch.setattr(sys, "argv", ["accuracy"])
    assert accuracy.main() == 1
    assert "FAIL" in capsys.readouterr().out
    bad.copy_(exact)
    assert accuracy.main() == 0


def test_accuracy_names_an_unknown_op(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accuracy", "--op", "scam"])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert "unknown scam; valid: " in capsys.readouterr().err


def test_suite_names_a_bench_that_is_not_there(monkeypatch, capsys):
    from bench import suite

    monkeypatch.setattr(sys, "argv", ["suite", "bench/bench_scam.py"])
    with pytest.raises(SystemExit):
        suite.main()
    assert "no such bench: bench/bench_scam.py; there are bench_adamw.py" in capsys.readouterr().err
