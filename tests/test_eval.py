"""fastalign eval: the estimators against enumeration, the run, going on after a break, what users get wrong."""

import json
import math
import os
import random
import shutil
import statistics
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from tiny_models import write_arithmetic_model
from transformers import AutoModelForSequenceClassification

from fastalign import cli
from fastalign.evaluation import best_at_k, estimators, interval, maj_at_k, pass_at_k
from fastalign.recipes import arithmetic, evaluate
from fastalign.recipes.arguments import Arguments, DataArguments, EvalArguments, ModelArguments, SamplingArguments


@pytest.mark.parametrize("right", [[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0], [1, 1]])
def test_pass_at_k_is_the_share_of_subsets_that_pass(right):
    for k in range(1, len(right) + 1):
        subsets = list(combinations(right, k))
        assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)


def test_maj_at_k_is_the_majority_over_subsets_and_ties_share():
    answers, truth = ["7", "7", "8", None, "9", "8"], "7"
    right = [a == truth for a in answers]
    for k in range(1, 7):
        scores = []
        for subset in combinations(answers, k):
            votes = [a for a in subset if a is not None]
            leaders = statistics.multimode(votes)
            scores.append(sum(a == truth for a in leaders) / len(leaders) if leaders else 0.0)
        assert maj_at_k(answers, right, k) == pytest.approx(statistics.mean(scores), abs=1e-12)
    assert maj_at_k([None, None], [False, False], 2) == 0.0


def test_best_at_k_and_weighted_votes_are_those_of_all_subsets():
    draw = random.Random(3)
    scores = [draw.choice([-1.0, 0.0, 0.5, 0.5, 2.0, math.nan]) for _ in range(7)]
    right = [draw.random() < 0.5 for _ in range(7)]
    answers, weights = [draw.choice(["1", "2", "3", None]) for _ in range(7)], [draw.random() for _ in range(7)]
    level = [-math.inf if math.isnan(s) else s for s in scores]
    for k in range(1, 8):
        best, voted = [], []
        for subset in combinations(range(7), k):
            top = max(level[i] for i in subset)
            best.append(statistics.mean(right[i] for i in subset if level[i] == top))
            votes = {a: sum(weights[i] for i in subset if answers[i] == a) for a in {answers[i] for i in subset} - {None}}
            winner = max(votes, key=votes.get) if votes else None
            voted.append(bool(votes) and right[next(i for i in subset if answers[i] == winner)])
        assert best_at_k(scores, right, k) == pytest.approx(statistics.mean(best), abs=1e-12)
        assert maj_at_k(answers, right, k, weights) == pytest.approx(statistics.mean(voted), abs=1e-12)


def test_maj_at_k_of_many_subsets_is_close_and_repeats(monkeypatch):
    answers = [str(i % 4) for i in range(16)]
    right = [a == "1" for a in answers]
    exact = maj_at_k(answers, right, 3)
    monkeypatch.setattr(estimators, "EXACT_SUBSETS", 500)
    drawn = maj_at_k(answers, right, 3)
    assert drawn == maj_at_k(answers, right, 3)
    assert abs(drawn - exact) < 0.06


@pytest.mark.parametrize(
    "function", [lambda k: pass_at_k(4, 1, k), lambda k: best_at_k([0.0] * 4, [True] * 4, k), lambda k: maj_at_k(["1"] * 4, [True] * 4, k)]
)
@pytest.mark.parametrize("k", [0, 5])
def test_k_is_checked(function, k):
    with pytest.raises(ValueError, match=f"k must be between 1 and the 4 samples, got {k}"):
        function(k)


def test_interval_covers_the_mean_as_the_normal_one_does():
    draw = random.Random(1)
    values = [float(draw.random() < 0.3) for _ in range(400)]
    low, high = interval(values)
    mean, error = statistics.mean(values), math.sqrt(statistics.pvariance(values) / 400)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.01)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.01)
    assert interval([0.5]) == (0.5, 0.5)
    assert math.isnan(interval([])[0])


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    write_arithmetic_model(root / "model", num_hidden_layers=1)
    (problems,) = arithmetic.problems(0)
    arithmetic.write_jsonl(root / "problems.jsonl", problems[:12], ("prompt", "answer"))
    (root / "judge.py").write_text(
        "def even(completions, **k):\n    return [None if len(c) == 4 else float(len(c) % 2 == 0) for c in completions]\n"
    )
    return root


def arguments(task, output, **changes) -> Arguments:
    args = Arguments(
        command="eval",
        model=ModelArguments(model_name_or_path=str(task / "model"), device="cpu"),
        data=DataArguments(dataset_name=str(task / "problems.jsonl")),
        sampling=SamplingArguments(max_completion_length=5),
        evaluate=EvalArguments(output_dir=str(output), num_samples=4, reward=[f"{task / 'judge.py'}:even"], vote="text"),
    )
    return replace(args, **{name: replace(getattr(args, name), **values) for name, values in changes.items()})


def lines_of(output):
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def test_eval_measures_what_its_samples_say(task, tmp_path, capsys):
    summary = evaluate.run(arguments(task, tmp_path, evaluate={"k": [1, 2, 4]}))
    rows = lines_of(tmp_path)
    assert len(rows) == 12
    right = [[c["reward"] == 1.0 for c in row["completions"]] for row in rows]
    for k in (1, 2, 4):
        assert summary[f"pass@{k}"]["value"] == pytest.approx(statistics.mean(pass_at_k(4, sum(r), k) for r in right))
    votes = [[c["text"].strip() or None for c in row["completions"]] for row in rows]
    assert summary["maj@4"]["value"] == pytest.approx(statistics.mean(maj_at_k(v, r, 4) for v, r in zip(votes, right, strict=True)))
    missing = sum(c["reward"] is None for row in rows for c in row["completions"])
    assert missing == summary["num_without_reward"] > 0
    assert summary["pass@1"]["low"] <= summary["pass@1"]["value"] <= summary["pass@1"]["high"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    shown = capsys.readouterr().out
    assert "pass@2" in shown
    assert f"{missing} samples have no reward and count as wrong" in shown


def test_a_broken_off_evaluation_goes_on_to_the_same_result(task, tmp_path):
    whole = evaluate.run(arguments(task, tmp_path / "whole"))
    evaluate.run(arguments(task, tmp_path / "part"))
    path = tmp_path / "part" / "samples.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:5]) + kept[5][:20])  # killed in the middle of a line
    assert evaluate.run(arguments(task, tmp_path / "part")) == whole
    again = evaluate.run(arguments(task, tmp_path / "part", evaluate={"k": [2]}))  # other k: nothing is sampled anew
    assert set(again) - set(whole) == {"pass@2", "maj@2"}


def test_a_reward_model_ranks_the_samples(task, tmp_path):
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_pretrained(task / "model", num_labels=1).save_pretrained(tmp_path / "rm")
    arithmetic.build_tokenizer().save_pretrained(tmp_path / "rm")
    summary = evaluate.run(arguments(task, tmp_path / "out", evaluate={"ranker": str(tmp_path / "rm"), "k": [1, 2, 4]}))
    rows = lines_of(tmp_path / "out")
    ranks = [[c["rank"] for c in row["completions"]] for row in rows]
    right = [[c["reward"] == 1.0 for c in row["completions"]] for row in rows]
    assert len({rank for row in ranks for rank in row}) > 4
    assert {"best@2", "best@4", "wmaj@2", "wmaj@4"} <= set(summary)
    expected = statistics.mean(own[max(range(4), key=scores.__getitem__)] for own, scores in zip(right, ranks, strict=True))
    assert summary["best@4"]["value"] == pytest.approx(expected, abs=0.13)  # a tie of equal samples shares
    with pytest.raises(FileExistsError, match="other ranker"):
        evaluate.run(arguments(task, tmp_path / "out"))


def test_a_corrected_answer_is_judged_anew(task, tmp_path):
    rows = [{"prompt": f"{a}+1=", "answer": str(a), "completions": "theirs"} for a in range(20, 26)]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = arguments(task, tmp_path / "out", data={"dataset_name": str(path)}, evaluate={"reward": ["math"]})
    evaluate.run(args)
    kept = lines_of(tmp_path / "out")[1:]
    rows[0]["answer"] = "21"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate.run(args)["num_problems"] == 6
    found = lines_of(tmp_path / "out")
    assert found[1:6] == kept
    assert [row["answer"] for row in found if row["prompt"] == "20+1="] == ["20", "21"]


def test_eval_refuses_another_evaluations_folder(task, tmp_path):
    evaluate.run(arguments(task, tmp_path))
    with pytest.raises(FileExistsError, match="holds an evaluation with other seed; add --overwrite_output_dir"):
        evaluate.run(arguments(task, tmp_path, evaluate={"seed": 1}))
    first = lines_of(tmp_path)
    evaluate.run(arguments(task, tmp_path, evaluate={"seed": 1, "overwrite_output_dir": True}))
    trained = tmp_path / "trained"
    shutil.copytree(task / "model", trained)
    args = arguments(task, tmp_path / "again")
    args = replace(args, model=replace(args.model, model_name_or_path=str(trained)))
    evaluate.run(args)
    os.utime(trained / "model.safetensors", ns=(1, 1))
    with pytest.raises(FileExistsError, match="holds an evaluation with other weights"):
        evaluate.run(args)
    assert lines_of(tmp_path) != first
    config = (trained / "config.json").read_text()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"holds a model or a training run \(config.json\), which stays as it is; name another"):
            evaluate.run(arguments(task, trained, evaluate={"overwrite_output_dir": overwrite}))
    assert (trained / "config.json").read_text() == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"k": [8]}}, "--k 8: expected numbers between 1 and --num_samples 4"),
        ({"sampling": {"temperature": 0.0}}, "--num_samples 4: greedy samples are all the same"),
        (
            {"evaluate": {"reward": ["math"]}, "data": {"dataset_map": "answer=other"}},
            "expected the reference answer in one of the columns",
        ),
    ],
)
def test_eval_says_what_is_wrong(task, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate.run(arguments(task, tmp_path, **changes))


def test_equal_numbers_are_one_vote():
    vote = evaluate.VOTES["answer"]
    assert vote("so it is 1,000") == vote(r"<think>7</think> \boxed{1000.0}")
    assert vote("no number") is None
    assert vote(r"\boxed{x+1}") == vote(r"the answer is $x + 1$.")


def test_eval_command(task, tmp_path, capsys):
    common = ["--model_name_or_path", str(task / "model"), "--dataset_name", str(task / "problems.jsonl"), "--device", "cpu"]
    assert cli.main(["eval", *common, "--output_dir", str(tmp_path)]) == 2
    assert "fastalign eval needs --reward" in capsys.readouterr().err
    flags = ["--reward", "math", "--temperature", "0", "--max_completion_length", "4", "--output_dir", str(tmp_path)]
    assert cli.main(["eval", *common, *flags]) == 0
    assert "pass@1" in capsys.readouterr().out
