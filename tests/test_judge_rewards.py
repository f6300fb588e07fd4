"""Judges that flags name: how a specification is read, grades as rewards of every online command, columns, caches, p(Yes)."""

import json
import math

import pytest
from fake_chat_server import chat_server
from tiny_models import write_arithmetic_model, write_chat_model

from fastalign import cli
from fastalign.judges import Question, Verifier
from fastalign.judges.templates import TEMPLATES
from fastalign.recipes.arguments import ModelArguments
from fastalign.recipes.judging import JudgeOptions, build_comparer, build_grader
from fastalign.recipes.model_rewards import with_reward_models
from fastalign.recipes.setup import load
from fastalign.rewards import load_rewards


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    write_arithmetic_model(root / "model", num_hidden_layers=1)
    write_chat_model(root / "chat", seed=4)
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(20, 28)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "digit.yaml").write_text("turns: '{prompt}{completion}='\npattern: '(\\d)'\nlow: 0\nhigh: 9\n")
    (root / "rubric.yaml").write_text("turns: '{completion} {rubric}'\n")
    return root


@pytest.fixture
def policy(task):
    return load(ModelArguments(str(task / "model"), device="cpu"))


def test_a_specification_is_read():
    found = JudgeOptions.parse("judge:model=http://h/v1,name=big,template=my,file.yaml,votes=3,temperature=0.5,key=K,retries=0")
    assert (found.model, found.name, found.template, found.votes, found.key, found.retries) == (
        *("http://h/v1", "big", "my,file.yaml"),
        *(3, "K", 0),
    )
    assert found.remote
    assert JudgeOptions.parse("judge:model=a/b").params().temperature == 0
    assert JudgeOptions.parse("judge:model=a/b,votes=2").params().temperature == 1
    assert JudgeOptions.parse("judge:model=a/b,votes=2,temperature=0.5").params().temperature == 0.5


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("judge", "names no model: judge:model=FOLDER"),
        ("judge:modl=x", "unknown option modl; did you mean model"),
        ("judge:folder", "unknown option folder"),
        ("judge:model=x,votes=many", "expected a number for votes, got 'many'"),
        ("judge:model=folder,key=K", "key: for servers alone"),
        ("judge:model=self,cache=c.jsonl", "the model may change, so its replies are not kept"),
        ("judge:model=self,template=compare", "expected a template of kind grade or verify, got compare"),
        ("judge:model=self,template=verify", r"p\(Yes\) needs the log-probs of a model in a folder, got model=self"),
        ("judge:model=folder,template=verify,votes=3", "reads log-probs, not replies; leave out votes"),
        ("judge:model=self,template=gradee", "unknown template gradee; did you mean grade"),
        ("judge:model=self,votes=2,temperature=0", "2 votes at temperature 0 are all the same"),
        ("judge:model=/no/such/folder", "there is no folder '/no/such/folder'"),
    ],
)
def test_a_specification_that_is_wrong_says_why(policy, specification, message):
    with pytest.raises(ValueError, match=message):
        with_reward_models([specification], policy)


def test_grades_are_rewards_and_a_missing_column_is_named(task, policy):
    options, completions = "max_tokens=6,temperature=1", ["21", "3", "8"]
    with load_rewards(with_reward_models([f"judge:model=self,template={task / 'digit.yaml'},{options}"], policy)) as rewards:
        found = rewards.score(["20+1="] * 3, completions, columns={"answer": ["21"] * 3})
        assert rewards.names == ["judge"]
    model = build_grader(f"judge:model=self,{options}", policy).model
    replies = dict(model.ask([Question((("user", f"20+1={completion}="),)) for completion in completions]))
    digits = [[c for c in replies[i] if c.isdigit()] for i in range(3)]
    assert any(digits)
    expected = [int(own[-1]) / 9 if own else math.nan for own in digits]
    assert found["judge"] == pytest.approx(expected, nan_ok=True)
    rubric = with_reward_models([f"judge:model=self,template={task / 'rubric.yaml'}"], policy)
    with load_rewards(rubric) as rewards, pytest.raises(ValueError, match="reward 'judge': expected a column 'rubric', got columns"):
        rewards.check_columns(["answer"])


def test_two_judges_have_names_of_their_own(task, policy):
    judge = f"judge:model=self,template={task / 'digit.yaml'},max_tokens=4"
    with load_rewards(with_reward_models([judge, judge.replace("tokens=4", "tokens=6")], policy)) as rewards:
        assert rewards.names == ["judge", "judge_2"]
        assert set(rewards.score(["1+1="], ["2"])) == {"judge", "judge_2"}


def test_a_judge_in_a_folder_is_loaded_once_and_remembers(task, policy, tmp_path):
    judge = f"judge:model={task / 'chat'},max_tokens=4,cache={tmp_path / 'replies.jsonl'}"
    first, second = (with_reward_models([judge], policy)[0].isolated.caller.function for _ in range(2))
    assert first is second
    first(["q"], ["a"])
    lines = (tmp_path / "replies.jsonl").read_text().splitlines()
    assert len(lines) == 1
    again = build_grader(judge, policy)
    again.model.model.engine = None  # nobody is asked
    assert again(["q"], ["a"]) == first(["q"], ["a"])
    write_chat_model(tmp_path / "other", seed=5)
    (tmp_path / "same").symlink_to(tmp_path / "other")
    other = build_grader(judge.replace(str(task / "chat"), str(tmp_path / "other")), policy)
    other(["q"], ["a"])
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 2


def test_p_yes_is_a_reward(task, policy):
    judge = build_grader(f"judge:model={task / 'chat'},template=verify", policy)
    verifier = Verifier.load(str(task / "chat"), conversational=True, normalized=True)
    assert judge(["1+1"], ["2"]) == verifier(["1+1"], ["2"])
    assert TEMPLATES["verify"].turns[0].format(prompt="1+1", completion="2") == verifier.template.format(question="1+1", solution="2")


def test_a_server_compares(policy, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def reply(body):
        text = body["messages"][-1]["content"]
        return "[[A]]" if text.index("good") < text.index("bad") else "[[B]]"

    with chat_server(reply) as server:
        (found,) = build_comparer(f"judge:model={server.url}", policy).compare(["q"], ["good"], ["bad"])
        assert (found.score, found.agreement) == (1.0, 1.0)
        with pytest.raises(ValueError, match="template choose needs the log-probs of a model in a folder"):
            build_comparer(f"judge:model={server.url},template=choose", policy)


@pytest.mark.parametrize(
    "command",
    [
        ["grpo", "--algorithm", "dr_grpo", "--num_generations", "2"],
        ["grpo", "--algorithm", "online_dpo", "--num_generations", "4"],
        ["ppo", "--num_generations", "2"],
        ["rft", "--num_generations", "2"],
    ],
    ids=["grpo", "online_dpo", "ppo", "rft"],
)
def test_online_learning_is_driven_by_a_judge(task, tmp_path, command):
    flags = ["--model_name_or_path", str(task / "model"), "--dataset_name", str(task / "data.jsonl"), "--output_dir", str(tmp_path)]
    flags += ["--max_steps", "2", "--per_device_train_batch_size", "4", "--max_completion_length", "4", "--device", "cpu", "--seed", "1"]
    assert cli.main([*command, *flags, "--reward", f"judge:model=self,template={task / 'digit.yaml'},max_tokens=6,temperature=1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    graded = [value for row in rows for key, value in row.items() if key in ("rewards/judge/mean", "objective/scores")]
    assert graded
    assert all(0 <= value <= 1 for value in graded)


def test_eval_and_a_server_that_grades(task, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    flags = ["--model_name_or_path", str(task / "model"), "--dataset_name", str(task / "data.jsonl"), "--output_dir", str(tmp_path)]
    flags += ["--max_completion_length", "4", "--device", "cpu", "--num_samples", "2"]
    with chat_server(lambda body: (400, "no") if "20+1=" in body["messages"][0]["content"] else "[[10]]") as server:
        assert cli.main(["eval", *flags, "--reward", f"judge:model={server.url},retries=0"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["num_without_reward"] == 2
    assert summary["mean_reward"] == 1.0
    assert "HTTP 400: no; it was asked" in caplog.text
