"""The README and tables.md say what was measured."""

import json
from pathlib import Path

import pytest

from bench import readme

ROOT = Path(__file__).resolve().parent.parent


def test_readme_figures_are_those_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.written(text) == text, "run python -m bench.readme"


def test_tables_are_those_of_the_results():
    assert (ROOT / readme.TABLES).read_text(encoding="utf-8") == readme.tables(), "run python -m bench.readme"


def test_readme_shows_one_cpu_and_the_ratios_of_the_others(tmp_path, monkeypatch):
    (op, shape), what = next(iter(readme.OPERATIONS.items()))
    for folder, times in {"": (40.0, 10.0), readme.SHOWN: (30.0, 10.0)}.items():
        result = {"op": op, "shape": shape, "dtype": "float32", "backend": "fastalign", "torch_ms": times[0], "ms": times[1]}
        record = {"device": "A", "date": "2026-01-02", "commit": "abc", "results": [result, {**result, "dtype": "bfloat16", "ms": 1.0}]}
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "kernels-a.json").write_text(json.dumps(record))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    row = f"| {what} | torch 30 ms | 10 ms | **3.00×** | 4.00× AVX-512 | 2026-01-02, abc | `make bench` |"
    assert readme.shown_operations() == [row]


def test_readme_without_its_marks_is_an_error():
    with pytest.raises(SystemExit, match="no section between"):
        readme.written("# fastalign\n")


def test_readme_takes_the_newest_file_of_a_device(tmp_path, monkeypatch):
    for date, device in (("2026-01-02", "A"), ("2026-01-03", "A"), ("2026-01-01", "B")):
        (tmp_path / f"kernels-{device}-{date}.json").write_text(f'{{"device": "{device}", "date": "{date}"}}')
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert [(r["device"], r["date"]) for r in readme.records("kernels-*.json")] == [("A", "2026-01-03"), ("B", "2026-01-01")]
