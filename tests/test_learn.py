"""bench.learn: every method goes from its data to its figures; the learning itself is for `make learn`."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import learn, learn_offline, learn_online, learn_reward, learn_setting
from fastalign.recipes import demo


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A cold start of a few steps, and its files with few held-out problems."""
    from fastalign.recipes import sft

    root = tmp_path_factory.mktemp("learn")
    files = demo.prepare(root, 0)
    for name, lines in (("train", 100), ("heldout", 20)):
        path = Path(files[name])
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    sft.run(demo.cold_start(root, files, 0, quick=True))
    found = learn_setting.Setting(root, files, 0)
    files |= learn_setting.write_pairs(found, max_pairs=30)
    return found


def always(completions, **_):
    """A reward that an untrained model gets, too."""
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    "method", [name if name in ("dpo", "reward-process") else pytest.param(name, marks=pytest.mark.slow) for name in learn.METHODS]
)
def test_learn_method_gives_its_figures(setting, monkeypatch, method):
    plan = learn_setting.optimizer
    for rows in (learn_offline, learn_online, learn_reward):
        monkeypatch.setattr(rows, "REWARD", f"{__file__}:always", raising=False)
        monkeypatch.setattr(rows, "optimizer", lambda learning_rate, steps: plan(learning_rate, 12 if steps == learn_online.STEPS else 4))
    monkeypatch.setattr(learn_online, "COMPLETIONS", 16)
    row = learn.METHODS[method](setting)
    assert 0 <= row["before"] <= 1
    assert 0 <= row["after"] <= 1
    assert row["measure"]


def test_learn_saves_rows_in_order(tmp_path):
    paths = {name: tmp_path / f"rows.{suffix}" for name, suffix in (("table", "md"), ("plot", "png"), ("json", "json"))}
    args = learn.parser().parse_args([word for name, path in paths.items() for word in (f"--{name}", str(path))])
    row = {"seed": 0, "measure": "accuracy", "before": 0.1, "after": 0.9, "seconds": 1.0}
    learn.save([row | {"method": "kto"}, row | {"method": "dpo", "teacher": 0.95}], args)
    assert [line.split()[1] for line in paths["table"].read_text().splitlines() if line.startswith("| ")][1:] == ["dpo", "kto"]
    assert len(json.loads(paths["json"].read_text())["rows"]) == 2
    assert paths["plot"].stat().st_size > 1000
    learn.save([row | {"method": "ipo"}, row | {"method": "kto", "after": 0.8}], args)
    kept = json.loads(paths["json"].read_text())["rows"]
    assert [(found["method"], found["after"]) for found in kept] == [("dpo", 0.9), ("ipo", 0.9), ("kto", 0.8)]
