"""fastalign search: the table against its files, going on after a break, the data it writes, what users get wrong."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import write_arithmetic_judge, write_arithmetic_model

from bench import bench_search, learn_setting
from fastalign import cli
from fastalign.data import load_records, step_examples
from fastalign.generation import Engine
from fastalign.judges import RewardModel
from fastalign.models.load import load_tokenizer
from fastalign.recipes import arithmetic, search
from fastalign.recipes.arguments import Arguments, DataArguments, ModelArguments, SamplingArguments, SearchArguments
from fastalign.recipes.search_arguments import SearchArguments as Own
from fastalign.recipes.search_records import save_pairs, save_sft
from fastalign.recipes.search_scorers import outcome_guide, step_guide

METHODS = ["greedy", "best_of_n", "majority", "weighted", "beam", "mcts"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    write_arithmetic_model(root / "model", num_hidden_layers=1)
    write_arithmetic_judge(root / "steps", step_separator="=", step_aggregation="min")
    write_arithmetic_judge(root / "outcome")
    (problems,) = arithmetic.problems(0)
    arithmetic.write_jsonl(root / "problems.jsonl", problems[:10], ("prompt", "answer"))
    (root / "judge.py").write_text(
        "def even(completions, **k):\n    return [float(len(c) % 2 == 0) for c in completions]\n"
        "def needs(completions, gold, **k):\n    return [0.0 for c in completions]\n"
    )
    return root


def arguments(task, output, data=None, **changes) -> Arguments:
    own = SearchArguments(output_dir=str(output), method=METHODS, scorer=str(task / "steps"), step_separator="", max_step_tokens=2)
    own = replace(own, vote="text", reward=[f"{task / 'judge.py'}:even"], num_samples=5, num_beams=2, num_expansions=2, num_simulations=3)
    return Arguments(
        command="search",
        model=ModelArguments(model_name_or_path=str(task / "model"), device="cpu"),
        data=DataArguments(dataset_name=str(data or task / "problems.jsonl")),
        sampling=SamplingArguments(max_completion_length=6),
        search=replace(own, **changes),
    )


def lines_of(output):
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_search_prints_what_its_results_say(task, tmp_path, capsys):
    summary = search.run(arguments(task, tmp_path))
    rows, shown = lines_of(tmp_path), capsys.readouterr().out
    assert list(summary) == METHODS
    for method, own in summary.items():
        mine = [row["search"] for row in rows if row["search"]["method"] == method]
        assert len(mine) == own["num_prompts"] == 10
        for found in mine:
            best = found["candidates"][found["best"]]
            assert (best["text"], best["score"], best["reward"]) == (found["completion"], found["score"], found["reward"])
            assert found["reward"] == float(len(found["completion"]) % 2 == 0)
        assert own["accuracy"]["value"] == pytest.approx(sum(found["reward"] for found in mine) / 10)
        assert own["any_right"] == pytest.approx(sum(any(c["reward"] for c in found["candidates"]) for found in mine) / 10)
        assert own["num_tokens"] == pytest.approx(sum(found["num_tokens"] for found in mine) / 10)
        assert f"{method:<11}{own['accuracy']['value']:>9.1%}" in shown
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    by_score = [row["search"] for row in rows if row["search"]["method"] in ("best_of_n", "beam", "mcts")]
    assert all(found["score"] == max(c["score"] for c in found["candidates"] if c["score"] is not None) for found in by_score)
    drawn = {m: [[c["text"] for c in r["search"]["candidates"]] for r in rows if r["search"]["method"] == m] for m in METHODS}
    assert drawn["best_of_n"] == drawn["majority"] == drawn["weighted"], "one draw serves all three"


def test_search_goes_on_after_a_break(task, tmp_path, monkeypatch):
    args = arguments(task, tmp_path / "whole")
    search.run(args)
    path = tmp_path / "broken" / "results.jsonl"
    small = replace(args, sampling=replace(args.sampling, max_num_seqs=5), search=replace(args.search, output_dir=str(path.parent)))
    calls, generate = [], Engine.generate

    def breaking(self, *given, **named):
        calls.append(len(given[0]))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(self, *given, **named)

    monkeypatch.setattr(search, "BATCHES_A_CHUNK", 2)
    monkeypatch.setattr(Engine, "generate", breaking)
    with pytest.raises(KeyboardInterrupt):
        search.run(small)
    monkeypatch.setattr(Engine, "generate", generate)
    lines = path.read_text().splitlines(keepends=True)
    assert 0 < len(lines) < 60
    path.write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])  # the last line was not written whole
    search.run(small)

    def found(folder):
        rows = sorted(lines_of(folder), key=lambda row: (row["prompt"], row["search"]["method"]))
        candidates = [candidate for row in rows for candidate in row["search"]["candidates"]]
        exact = [(row["prompt"], row["search"]["method"], row["search"]["completion"], row["search"]["num_tokens"]) for row in rows]
        return exact, [c["text"] for c in candidates], [c["score"] or 0.0 for c in candidates]

    broken, whole = found(path.parent), found(tmp_path / "whole")
    assert broken[:2] == whole[:2]
    assert broken[2] == pytest.approx(whole[2], abs=1e-6)  # a judge's sums may depend on its batch


def test_search_adds_a_method_and_refuses_another_search(task, tmp_path):
    search.run(arguments(task, tmp_path, method=["greedy"], scorer=""))
    before = (tmp_path / "results.jsonl").read_text()
    summary = search.run(arguments(task, tmp_path, method=["greedy", "majority"], scorer=""))
    assert (tmp_path / "results.jsonl").read_text().startswith(before)
    assert {method: own["num_prompts"] for method, own in summary.items()} == {"greedy": 10, "majority": 10}
    with pytest.raises(FileExistsError, match="holds a search with other num_samples"):
        search.run(arguments(task, tmp_path, scorer="", method=["majority"], num_samples=6))
    again = search.run(arguments(task, tmp_path, scorer="", method=["majority"], num_samples=6, overwrite_output_dir=True))
    assert list(again) == ["majority"]


def test_search_saves_data_that_training_reads(task, tmp_path):
    names = {name: str(tmp_path / f"{name}.jsonl") for name in ("save_sft", "save_pairs", "save_steps")}
    options = {"num_simulations": 4, "num_expansions": 4, "step_labels": "soft", "tree_value": "rollouts"}
    search.run(arguments(task, tmp_path, method=["majority", "mcts"], scorer=f"{task / 'judge.py'}:even", **names, **options))
    rows = lines_of(tmp_path)
    reward = {(row["prompt"], c["text"]): c["reward"] for row in rows for c in row["search"]["candidates"]}

    def read(name):
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    chosen = {(row["prompt"], row["search"]["completion"]) for row in rows if row["search"]["completion"]}
    assert {(r["prompt"], r["completion"]) for r in read("save_sft")} == {key for key in chosen if reward[key] == 1.0}
    pairs = read("save_pairs")
    assert pairs
    assert all((reward[p["prompt"], p["chosen"]], reward[p["prompt"], p["rejected"]]) == (1.0, 0.0) for p in pairs)
    mixed = (
        {prompt for prompt, text in reward if text}
        & {p for (p, t), r in reward.items() if r and t}
        & {p for (p, t), r in reward.items() if not r and t}
    )
    assert {p["prompt"] for p in pairs} == mixed
    chains = [(row["prompt"], chain) for row in rows for chain in row["search"].get("chains", ())]
    steps = read("save_steps")
    assert steps
    for record in steps:
        ours = [[(t, m) for t, m, _ in chain if t] for prompt, chain in chains if prompt == record["prompt"]]
        assert list(zip(record["completions"], record["labels"], strict=True)) in ours
    examples = step_examples(load_records(names["save_steps"]), load_tokenizer(str(task / "steps")), max_length=64, separator="=")
    assert len(examples) == len(steps)


def test_pairs_by_the_score_and_conversations_keep_their_form(tmp_path):
    prompt = [{"role": "user", "content": "?"}]
    own = {"method": "beam", "completion": "a", "candidates": [{"text": t, "score": s} for t, s in (("a", 0.9), ("b", 0.1), ("c", None))]}
    found = {"beam": [{"prompt": prompt, "search": own}], "majority": [{"prompt": "?", "search": own}]}
    assert "1 records" in save_pairs(tmp_path / "pairs.jsonl", found)
    turn = {text: [{"role": "assistant", "content": text}] for text in "ab"}
    assert json.loads((tmp_path / "pairs.jsonl").read_text()) == {"prompt": prompt, "chosen": turn["a"], "rejected": turn["b"]}
    assert "2 records" in save_sft(tmp_path / "sft.jsonl", found, 1.0)
    assert json.loads((tmp_path / "sft.jsonl").read_text().splitlines()[0]) == {"prompt": prompt, "completion": turn["a"]}


def test_scorers_of_models_are_those_models(task):
    from fastalign.data import Prompt
    from fastalign.search import Path

    tokenizer = load_tokenizer(str(task / "model"))
    prompts = [Prompt(tokenizer(text).input_ids, text, {}, i) for i, text in enumerate(("1+2=", "1+2=", "30+4=", "5+5="))]
    paths = [Path((1,), steps=steps, text="".join(steps)) for steps in (("1", "0"), ("12", "", "3"), ("34",), ("",))]
    judge = RewardModel.load(str(task / "steps"))
    alone = [judge([prompt.prompt], ["=".join(path.steps)])[0] for prompt, path in zip(prompts, paths, strict=True)]
    found = step_guide(judge, "min").scorer(prompts, paths)
    assert found[:3] == pytest.approx(alone[:3], abs=1e-6)
    assert math.isnan(found[3])
    assert alone[3] is None
    values = judge.step_values(["1+2="], [["1", "0"]])[0]
    assert step_guide(judge, "product").scorer(prompts[:1], paths[:1]) == pytest.approx([values[0] * values[1]])
    outcome = RewardModel.load(str(task / "outcome"))
    guide = outcome_guide(outcome)
    raw = guide.scorer(prompts[:3], paths[:3])
    assert guide.bounded(prompts[:3], paths[:3]) == pytest.approx(torch.tensor(raw).sigmoid().tolist())
    with pytest.raises(ValueError, match="--loss process"):
        outcome.step_values(["1+2="], [["1"]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": ""}, "--method best_of_n needs --scorer"),
        ({"scorer": "outcome"}, "--method beam: --scorer .*outcome judges finished solutions alone"),
        ({"scorer": "outcome", "method": ["mcts"], "tree_value": "scorer"}, "--tree_value scorer"),
        ({"scorer": "outcome", "method": ["mcts"], "score_aggregation": "min"}, "--score_aggregation min"),
        ({"scorer": "model"}, "--scorer .*model: expected the folder of a reward model"),
        ({"temperature": 0.0}, "--temperature 0: --method best_of_n chooses among draws"),
        ({"max_step_tokens": 0}, "--method beam: nothing ends a step"),
        ({"save_steps": "x.jsonl"}, "--save_steps needs --method mcts with --tree_value rollouts"),
        ({"save_pairs": "x.jsonl", "method": ["majority"], "reward": []}, "--save_pairs needs --reward"),
        ({"reward": ["judge.py:needs"]}, "expected a column 'gold'"),
    ],
)
def test_search_says_what_is_missing(task, tmp_path, changes, message):
    changes, named = dict(changes), changes.get("scorer")
    if named:
        changes = changes | {"scorer": str(task / named)}
    if changes.get("reward"):
        changes = changes | {"reward": [f"{task}/{changes['reward'][0]}"]}
    sampling = SamplingArguments(temperature=changes.pop("temperature", 1.0))
    with pytest.raises(ValueError, match=message):
        search.run(replace(arguments(task, tmp_path / "out", **changes), sampling=sampling))
    assert not (tmp_path / "out").exists(), "nothing is written before everything is checked"


def test_search_from_the_command_line(task, tmp_path, capsys):
    flags = ["--model_name_or_path", str(task / "model"), "--dataset_name", str(task / "problems.jsonl"), "--max_samples", "3"]
    own = ["--output_dir", str(tmp_path / "out"), "--num_samples", "2", "--max_completion_length", "4", "--vote", "text"]
    assert cli.main(["search", *flags, *own]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()] == ["method", "greedy", "majority", "3"]
    assert {row["search"]["method"] for row in lines_of(tmp_path / "out")} == {"greedy", "majority"}
    assert cli.main(["search", *flags, *own, "--method", "bem"]) == 2
    assert "beam" in capsys.readouterr().err


def test_the_bench_goes_from_models_to_its_table(task, tmp_path):
    write_arithmetic_model(tmp_path / "sft", num_hidden_layers=1)
    write_arithmetic_judge(tmp_path / "process", step_separator="=")
    setting = learn_setting.Setting(tmp_path, {"heldout": str(task / "problems.jsonl")}, 0)
    options = {"num_samples": 2, "num_beams": 1, "num_simulations": 2}
    text = bench_search.markdown(search.run(bench_search.arguments(setting, 8, **options)))
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == [f"| {method}" for method in METHODS]


def test_no_method_named_means_greedy_and_majority():
    assert Own().methods == ["greedy", "majority"]
    assert Own(method=["beam", "beam"]).methods == ["beam"]
