"""Win rates: the estimator against a direct fit, fastalign eval with a judge, what it says of lengths, reruns, errors."""

import json
import math
import random

import pytest
from fake_chat_server import chat_server
from tiny_models import write_arithmetic_model

from fastalign import cli
from fastalign.evaluation.comparisons import RIDGE, Compared, length_controlled, win_rate


def test_a_win_rate_counts_prompts_once_and_ties_as_half():
    found = win_rate([Compared(0, 1.0, 5, 3), Compared(0, 0.0, 5, 4), Compared(1, 0.5, 2, 4), Compared(2, 1.0, 4, 1)])
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.value == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert (found.mean_length, found.mean_baseline_length) == (4.0, 3.0)
    assert found.low <= found.value <= found.high
    with pytest.raises(ValueError, match="expected at least one comparison"):
        win_rate([])


def test_at_equal_lengths_the_controlled_rate_is_the_rate():
    compared = [Compared(i, float(i % 4 == 0), 7, 7) for i in range(40)]
    assert length_controlled(compared) == pytest.approx(0.25, abs=1e-6)
    assert length_controlled([Compared(i, 1.0, i, 2 * i) for i in range(1, 9)]) > 0.99


def test_the_controlled_rate_is_the_regressions_maximum():
    draw = random.Random(2)
    compared = [Compared(i, draw.choice([0.0, 0.5, 1.0]), draw.randrange(50), draw.randrange(40)) for i in range(60)]
    gaps = [c.length - c.baseline_length for c in compared]
    scale = math.sqrt(sum(g * g for g in gaps) / len(gaps))
    features = [math.tanh(g / scale) for g in gaps]

    def objective(theta, phi):
        logits = [theta + phi * x for x in features]
        fit = sum(c.score * z - math.log1p(math.exp(z)) for c, z in zip(compared, logits, strict=True))
        return fit - RIDGE * phi * phi / 2

    theta = math.log(length_controlled(compared) / (1 - length_controlled(compared)))
    best = max((objective(theta, phi / 1000), phi / 1000) for phi in range(-3000, 3001))
    for other in (theta - 0.01, theta + 0.01):
        assert max(objective(other, best[1] + d / 1000) for d in range(-50, 51)) < best[0]


def test_a_judge_that_likes_length_is_seen_through():
    """Answers as good as the baseline's but longer: a judge with a taste for length prefers them, the controlled rate does not."""
    draw, compared = random.Random(0), []
    for i in range(4000):
        gap = draw.gauss(30, 40)
        chance = 1 / (1 + math.exp(-1.5 * math.tanh(gap / 50)))
        compared.append(Compared(i, float(draw.random() < chance), int(200 + gap), 200))
    found = win_rate(compared)
    assert found.value > 0.6
    assert found.length_controlled == pytest.approx(0.5, abs=0.03)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("win_rate")
    write_arithmetic_model(root / "model", num_hidden_layers=1)
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(20, 28)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    baseline = [{"prompt": row["prompt"], "completion": "x" * (i % 4)} for i, row in enumerate(rows)]
    (root / "baseline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in baseline))
    return root


def evaluate(task, output, *more):
    flags = ["--model_name_or_path", str(task / "model"), "--dataset_name", str(task / "data.jsonl"), "--output_dir", str(output)]
    return cli.main(["eval", *flags, "--device", "cpu", "--max_completion_length", "5", "--num_samples", "2", *more])


def by_length(body):
    """The longer answer wins; a question with a 3 in it is refused."""
    text = body["messages"][-1]["content"]
    if "[Question]\n23" in text:
        return "I would rather not say."
    a, b = (text.partition(f"[Answer {x}]\n")[2].partition("\n[End")[0] for x in "AB")
    return "[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "[[C]]"


def test_eval_compares_with_a_baseline_and_asks_nothing_twice(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with chat_server(by_length) as server:
        judge = ["--judge", f"judge:model={server.url}", "--baseline", str(task / "baseline.jsonl")]
        assert evaluate(task, tmp_path, *judge) == 0
        asked = len(server.bodies)
        shown = capsys.readouterr().out
        first = json.loads((tmp_path / "summary.json").read_text())
        assert evaluate(task, tmp_path, *judge) == 0
        assert len(server.bodies) == asked
    assert json.loads((tmp_path / "summary.json").read_text()) == first
    assert "pass@1" not in first
    found = first["win_rate"]
    lines = [json.loads(line) for line in (tmp_path / "comparisons.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    read = [line for line in lines if line["prompt"] != "23+1="]
    expected = [
        1.0 if len(x["completion"]) > len(x["baseline"]) else 0.0 if len(x["completion"]) < len(x["baseline"]) else 0.5 for x in read
    ]
    assert [line["score"] for line in read] == expected
    assert found["value"] == pytest.approx(sum(expected) / 14)
    assert (found["wins"], found["ties"], found["losses"]) == tuple(expected.count(score) for score in (1.0, 0.5, 0.0))
    assert (found["unread"], found["agreement"]) == (2, 1.0)
    assert found["mean_length"] == pytest.approx(sum(len(line["completion"]) for line in read) / 14)
    assert "at equal lengths" in shown
    assert "2 not to be read" in shown


def test_a_run_compared_with_itself_ties(task, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert evaluate(task, tmp_path / "one", "--reward", "math") == 0
    with chat_server(lambda body: "[[A]]") as server:  # whatever stands first
        assert evaluate(task, tmp_path / "two", "--judge", f"judge:model={server.url}", "--baseline", str(tmp_path / "one")) == 0
    found = json.loads((tmp_path / "two" / "summary.json").read_text())["win_rate"]
    assert (found["value"], found["ties"], found["agreement"], found["length_controlled"]) == (0.5, 16, 0.0, pytest.approx(0.5))


def test_the_model_may_judge_by_its_choice_beside_a_reward(task, tmp_path):
    (tmp_path / "short.yaml").write_text("kind: choose\nturns: '{first}-{second}+'\n")
    judge = f"judge:model=self,template={tmp_path / 'short.yaml'}"
    flags = ["--reward", "math", "--judge", judge, "--baseline", str(task / "baseline.jsonl")]
    assert evaluate(task, tmp_path / "out", *flags) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "pass@2" in found
    assert 0 < found["win_rate"]["value"] < 1


def test_a_judge_that_never_answers_takes_nothing_of_the_rest(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with chat_server(lambda body: "I would rather not say.") as server:
        flags = ["--reward", "math", "--judge", f"judge:model={server.url}", "--baseline", str(task / "baseline.jsonl")]
        assert evaluate(task, tmp_path, *flags) == 2
    told = capsys.readouterr()
    assert "none of the 16 comparisons could be read" in told.err
    assert "pass@2" in told.out
    found = json.loads((tmp_path / "summary.json").read_text())
    assert "pass@2" in found
    assert "win_rate" not in found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "judge:model=self"], "give both, or neither"),
        (["--reward", "math", "--baseline", "b.jsonl"], "give both, or neither"),
        (["--judge", "judge:model=self", "--baseline", "no.jsonl"], "there is no such file or folder"),
        (["--judge", "judge:model=self", "--baseline", "."], "the folder has none of samples.jsonl"),
        (["--judge", "self", "--baseline", "b.jsonl"], "expected a judge as judge:model=FOLDER_OR_URL, got 'self'"),
        (["--judge", "judge:model=self", "--baseline", "b.jsonl"], "line 1 is no object with a prompt and its completions"),
        (["--judge", "judge:model=self", "--baseline", "c.jsonl"], "has no completion of any of the 8 prompts"),
    ],
)
def test_a_comparison_that_cannot_be_made_says_why(task, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"prompt": "p"}\n')
    (tmp_path / "c.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert evaluate(task, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
