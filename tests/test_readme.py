"""The README says what was measured."""

from pathlib import Path

import pytest

from bench import readme

ROOT = Path(__file__).resolve().parent.parent


def test_readme_figures_are_those_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.written(text) == text, "run python -m bench.readme"


def test_readme_without_its_marks_is_an_error():
    with pytest.raises(SystemExit, match="no section between"):
        readme.written("# fastalign\n")


def test_readme_takes_the_newest_file_of_a_device(tmp_path, monkeypatch):
    for date, device in (("2026-01-02", "A"), ("2026-01-03", "A"), ("2026-01-01", "B")):
        (tmp_path / f"kernels-{device}-{date}.json").write_text(f'{{"device": "{device}", "date": "{date}"}}')
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert [(r["device"], r["date"]) for r in readme.records("kernels-*.json")] == [("A", "2026-01-03"), ("B", "2026-01-01")]
