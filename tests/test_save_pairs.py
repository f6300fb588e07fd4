"""fastalign generate with rewards and pairs: best against worst, the data's answer against samples, breaks, what users get wrong."""

import json

import pytest
from tiny_models import write_arithmetic_model

from fastalign import cli
from fastalign.recipes.feedback_arguments import PairArguments
from fastalign.recipes.pairs import best_and_worst, truth_and_samples, truth_of

ANY = PairArguments(save_pairs="best_worst", finished_only=False)


def completion(text, reward=0.0, finish_reason="stop"):
    return {"text": text, "finish_reason": finish_reason, "reward": reward}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    write_arithmetic_model(root / "model", num_hidden_layers=1)
    rows = [{"prompt": f"{n}+1=", "completion": f"{n + 1}", "answer": n + 1} for n in range(20, 28)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "reward.py").write_text(
        "def ones(completions, answer, **k):\n    return [c.count('1') + a / 100 for c, a in zip(completions, answer)]\n"
    )
    return root


def generate(task, output, *more):
    flags = ["--model_name_or_path", str(task / "model"), "--dataset_name", str(task / "data.jsonl"), "--max_completion_length", "6"]
    return cli.main(["generate", *flags, "--device", "cpu", "--num_samples", "4", "--output_file", str(output), *more])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_best_and_worst_of_each_prompt_become_a_pair(task, tmp_path, capsys):
    flags = ["--reward", f"{task / 'reward.py'}:ones", "--save_pairs", "best_worst", "--finished_only", "false"]
    assert generate(task, tmp_path / "c.jsonl", *flags) == 0
    rows, pairs = lines_of(tmp_path / "c.jsonl"), lines_of(tmp_path / "c.pairs.jsonl")
    assert f"{len(pairs)} pairs of 8 prompts" in capsys.readouterr().err
    expected = []
    for row in rows:
        counts = [c["text"].count("1") for c in row["completions"]]
        assert [c["reward"] for c in row["completions"]] == [pytest.approx(n + row["answer"] / 100) for n in counts]
        if max(counts) > min(counts):
            best, worst = (row["completions"][counts.index(choose(counts))]["text"] for choose in (max, min))
            expected.append((row["prompt"], best, worst))
    assert len(expected) >= 2
    assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs] == [each for each in expected if each[1] and each[2]]
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)


def test_the_datas_answer_is_preferred_to_every_sample(task, tmp_path):
    assert generate(task, tmp_path / "c.jsonl", "--save_pairs", "truth", "--finished_only", "false") == 0
    rows, pairs = lines_of(tmp_path / "c.jsonl"), lines_of(tmp_path / "c.pairs.jsonl")
    assert {pair["chosen"] for pair in pairs} == {row["completion"] for row in rows}
    for row in rows:
        own = [pair["rejected"] for pair in pairs if pair["prompt"] == row["prompt"]]
        assert own == [t for t in dict.fromkeys(c["text"] for c in row["completions"]) if t and t != row["completion"]]


def test_pairs_of_a_broken_off_run_are_those_of_a_whole_one(task, tmp_path):
    flags = ["--reward", f"{task / 'reward.py'}:ones", "--save_pairs", "best_worst", "--finished_only", "false"]
    generate(task, tmp_path / "whole.jsonl", *flags)
    kept = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(kept[:3]) + kept[3][:30])
    generate(task, tmp_path / "part.jsonl", *flags)
    assert (tmp_path / "part.pairs.jsonl").read_text() == (tmp_path / "whole.pairs.jsonl").read_text()


def test_what_was_cut_is_no_side_unless_asked_for():
    item = {"prompt": "p", "completions": [completion("a", 3.0, "length"), completion("b", 2.0), completion("", 0.0), completion("c", 1.0)]}
    (pair,) = best_and_worst(item, PairArguments(), "here")
    assert (pair["chosen"], pair["rejected"]) == ("b", "c")
    (pair,) = best_and_worst(item, ANY, "here")
    assert (pair["chosen"], pair["rejected"]) == ("a", "c")
    assert best_and_worst(item, PairArguments(min_margin=1.5), "here") == []
    none = {"prompt": "p", "completions": [completion("a", None), completion("b", 2.0), completion("c", None)]}
    assert best_and_worst(none, ANY, "here") == []


def test_the_truth_is_a_completion_or_the_last_turns():
    ask, say = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert truth_of({"prompt": [ask], "messages": [ask, say]}) == [say]
    assert truth_of({"prompt": [ask], "completion": "a"}) == [say]
    assert truth_of({"prompt": [ask], "messages": [ask]}) is None
    item = {"prompt": [ask], "completion": [say], "completions": [completion("a"), completion("b"), completion("b")]}
    (pair,) = truth_and_samples(item, PairArguments(), "here")
    assert pair == {"prompt": [ask], "chosen": [say], "rejected": [{"role": "assistant", "content": "b"}]}


def test_what_pairs_need_is_told(task, tmp_path, capsys):
    out = tmp_path / "c.jsonl"
    assert generate(task, out, "--save_pairs", "best_worst") == 2
    assert "--reward says which completion is the best" in capsys.readouterr().err
    assert generate(task, out, "--save_pairs", "best") == 2
    assert "did you mean best_worst" in capsys.readouterr().err
    assert generate(task, out, "--reward", f"{task / 'reward.py'}:ones", "--dataset_map", "answer=other") == 2
    assert "expected a column 'answer'" in capsys.readouterr().err
    assert generate(task, out) == 0
    assert generate(task, out, "--save_pairs", "best_worst", "--reward", f"{task / 'reward.py'}:ones") == 2
    assert "line 1: the completions were sampled without --reward; name another --output_file" in capsys.readouterr().err
    assert cli.main(["generate", "--model_name_or_path", str(task / "model"), "--prompt", "1+1=", "--save_pairs", "truth"]) == 2
    assert "give one" in capsys.readouterr().err
    assert generate(task, tmp_path / "d.jsonl", "--dataset_map", "completion=other", "--save_pairs", "truth") == 2
    assert "expected the data's answer in a column completion" in capsys.readouterr().err
