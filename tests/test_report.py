"""The report: one page, no network, nothing unescaped."""

from __future__ import annotations

import base64
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from fastalign.training import charts
from fastalign.training.report import number, write_report


def rows(count):
    return [
        {"step": 0, "eval/reward": 0.1},
        *(
            {
                "step": i,
                "loss": math.sin(i),
                "reward": i / count,
                "kl": None if i == 2 else 0.01 * i,
                "completions/mean_length": 8.0,
                "completions/min_length": 2.0,
                "completions/max_length": 9.0 + i,
                "rewards/exact/mean": 0.5,
                "rewards/format/mean": 1.0,
                "timing_s/rollout": 0.2,
                "timing_s/update": 0.1,
                "tokens_per_second": 21000.0,
            }
            for i in range(1, count + 1)
        ),
        {"step": count, "eval/reward": 0.9},
    ]


def write(folder, **changes):
    options = {
        "title": "A <run>",
        "config": {"learning_rate": 1e-5, "reward": ["exact", "format"], "seed": 123456, "shuffle": True, "beta": None},
        "metrics": rows(6),
        "summary": {"eval/reward": 0.9, "eval/reward/before": 0.1, "num_tokens": 1_834_000, "odd": "text"},
        "samples": [{"prompt": "<b>2 + 2</b>", "before": "", "after": "<script>alert(1)</script>", "reward_after": 1.0}],
        "tables": [{"title": "Accuracy", "columns": ["model", "accuracy"], "rows": [["base", None], ["tuned", 0.934]]}],
    }
    return write_report(folder, **(options | changes)).read_text(encoding="utf-8")


def test_report_is_one_page_without_network(tmp_path):
    page = write(tmp_path)
    images = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == 7
    for image in images:
        ElementTree.fromstring(base64.b64decode(image))
    outside = re.sub(r'src="data:[^"]+"', "", page)
    assert not re.search(r"https?:|src=|@import|url\(", outside)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_report_escapes_texts_and_shows_everything_given(tmp_path):
    page = write(tmp_path)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<title>A &lt;run&gt;</title>" in page
    assert "&lt;b&gt;2 + 2&lt;/b&gt;" in page
    for text in ("Before", "After", "nothing", "reward after", "0.934", "123456", "exact format", "1.83 M", "6 steps", "0.1 →"):
        assert text in page
    for title in ("Reward", "Rewards by name", "KL to the reference", "Completion length", "Throughput", "Where the time goes"):
        assert f"<h3>{title}" in page
    assert "Entropy" not in page


def test_report_of_the_same_run_is_the_same_file(tmp_path):
    assert write(tmp_path) == write(tmp_path)


def test_report_of_a_run_with_no_rows_says_so(tmp_path):
    page = write(tmp_path, metrics=[], samples=[], tables=[], summary={})
    assert "Fewer than two steps" in page
    assert "Samples" not in page


def test_report_stages_have_curves_each(tmp_path):
    page = write(tmp_path, metrics={"SFT": rows(3), "GRPO": rows(4)})
    assert "<h2>SFT</h2>" in page
    assert "<h2>GRPO</h2>" in page
    assert "SFT: 3 steps · GRPO: 4 steps" in page


def test_report_table_with_a_row_too_short_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"table 'T' has 2 columns, got a row of 1: \['x'\]"):
        write(tmp_path, tables=[{"title": "T", "columns": ["a", "b"], "rows": [["x"]]}])


def test_charts_skip_missing_values_and_average_long_runs():
    steps, values = charts.points([{"step": 1, "x": 2.0}, {"step": 2, "x": None}, {"step": 3, "x": math.nan}, {"step": 4}], "x")
    assert (steps, values) == ([1.0], [2.0])
    steps, values = charts.points([{"step": i, "x": float(i % 2)} for i in range(10_000)], "x")
    assert len(steps) <= charts.MAX_POINTS
    assert all(0.4 < value < 0.6 for value in values)
    assert charts.smoothed([1.0] * 50) == [1.0] * 50


@pytest.mark.parametrize(
    "value, text",
    [
        *((21_000, "21k"), (22_500, "22.5k"), (2.5e6, "2.5M"), (1500, "1500"), (0.25, "0.25"), (0.0, "0")),
        *((2e-5, "2e-5"), (0.00075, "7.5e-4"), (-0.06, "-0.06")),
    ],
)
def test_charts_ticks_are_short(value, text):
    assert charts.tick(value) == text


@pytest.mark.parametrize(
    "value, text",
    [(0.93412, "0.9341"), (1_834_000, "1,834,000"), (None, "–"), (True, "True"), ([1, "a"], "1, a"), (21012.3, "21,012")],
)
def test_report_numbers_are_readable(value, text):
    assert number(value) == text
