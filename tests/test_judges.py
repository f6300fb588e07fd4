"""Generative judges: what is asked, how verdicts are read and averaged, both places where the model may be, and what is kept."""

import json
import re
import threading

import pytest
from fake_chat_server import chat_server
from tiny_server import byte_model, byte_tokenizer, make_engine, serving

from fastalign.generation import AsyncEngine, SamplingParams
from fastalign.judges import TEMPLATES, Judge, LocalModel, Patience, Question, Remembering, ServerModel, Template, load_template
from fastalign.judges.templates import as_text

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
SHORT = Patience(timeout=60.0, retries=2, backoff=0.01)


class Scripted:
    """A model whose replies a function of the question gives."""

    def __init__(self, reply, temperature=1.0):
        self.reply, self.identity, self.asked = reply, {"model": "scripted", "temperature": temperature}, []

    def ask(self, questions):
        self.asked += questions
        for i, question in reversed(list(enumerate(questions))):  # any order is allowed
            yield i, self.reply(question)


@pytest.mark.parametrize(
    ("template", "reply", "verdict"),
    [
        (TEMPLATES["grade"], "It is fine. Grade: [[10]]", 1.0),
        (TEMPLATES["grade"], "at first [[2]], on reflection [[ 5.5 ]]", 0.5),
        (TEMPLATES["grade"], "Grade: [[11]]", None),
        (TEMPLATES["grade"], "Grade: 7", None),
        (TEMPLATES["additive"], "Points: [[0]]", 0.0),
        (TEMPLATES["additive"], "Points: [[4]]", 0.8),
        (TEMPLATES["compare"], "[[a]]", 1.0),
        (TEMPLATES["compare"], "rather [[B]]", 0.0),
        (TEMPLATES["compare"], "[[C]]", 0.5),
        (TEMPLATES["compare"], "neither: [[Tie]]", 0.5),
        (TEMPLATES["compare"], "[[D]]", None),
        (Template("grade", ("{completion}",), pattern=r"(?:score|mark)\s*=\s*(\S+)", low=0, high=4), "score = 1 mark = 3", 0.75),
        (Template("grade", ("{completion}",), pattern=r"score\s*=\s*(\S+)"), "score = high", None),
    ],
)
def test_a_verdict_is_the_last_one_in_the_reply(template, reply, verdict):
    assert template.read(reply) == verdict


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if template.kind in ("grade", "compare")])
def test_the_built_in_templates_ask_for_what_they_read(name):
    """The sample verdict that a template shows the judge is one that it reads."""
    shown = re.findall(r"\[\[.+?\]\]", TEMPLATES[name].turns[-1])
    assert shown
    assert all(TEMPLATES[name].read(each) is not None for each in shown)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("kind: grad\nturns: '{completion}'", "unknown kind grad; did you mean grade"),
        ("turn: x", "unknown key turn; did you mean turns"),
        ("turns: hello", r"expected \{completion\} in a turn of kind grade"),
        ("turns: '{completion} {0}'", r"expected a name in braces, got \{0\}"),
        ("turns: '{completion} {'", "other braces are written twice"),
        ("turns: '{completion.upper}'", r"expected a name in braces"),
        ("turns: '{completion}'\npattern: '['", "is no regular expression"),
        ("turns: '{completion}'\npattern: 'a'", "expected a group around the verdict"),
        ("turns: '{completion}'\nlow: 3\nhigh: 3", "expected low < high, got 3 and 3"),
        ("kind: compare\nturns: '{first}'", r"expected \{second\}"),
        ("turns: '{completion}'\nlow: best", "could not convert"),
        ("- a list", "expected key: value lines"),
        ("turns: [", "is not valid YAML"),
    ],
)
def test_a_bad_template_says_what_is_wrong(tmp_path, given, message):
    path = tmp_path / "t.yaml"
    path.write_text(given)
    with pytest.raises(ValueError, match=message):
        load_template(str(path))


def test_a_template_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown template grades; did you mean grade\?.* no file"):
        load_template("grades")


def test_grades_fill_in_columns_and_conversations():
    template = Template("grade", ("Q {prompt} R {rubric} {{x}} A {completion}",), system="Be {tone}.", low=0, high=1)
    model = Scripted(lambda question: "[[1]]")
    prompts = [[{"role": "user", "content": "{rubric}?"}], "two"]
    completions = [[{"role": "assistant", "content": "yes"}], "no"]
    assert Judge(model, template)(prompts, completions, rubric=["r1", "r2"], tone=["kind", "stern"]) == [1.0, 1.0]
    assert {q.messages for q in model.asked} == {
        (("system", "Be kind."), ("user", "Q {rubric}? R r1 {x} A yes")),
        (("system", "Be stern."), ("user", "Q two R r2 {x} A no")),
    }
    with pytest.raises(ValueError, match="reads the column 'tone', got no columns"):
        Judge(model, template)(prompts, completions)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert as_text(talk) == "User: a\n\nAssistant: b\n\nUser: c"


def test_votes_are_averaged_and_unreadable_ones_left_out(caplog):
    said = {0: "[[1]]", 1: "no idea", 2: "[[10]]", 3: None}
    model = Scripted(lambda question: said[question.draw] if "good" in question.messages[0][1] else "?")
    judge = Judge(model, TEMPLATES["grade"], votes=4)
    assert judge(["q", "q", "q"], ["good", "bad", "good"]) == [0.5, None, 0.5]
    assert len(model.asked) == 8  # equal cases are asked once
    assert "5 of 8 replies hold no verdict" in caplog.text
    assert "'no idea'" in caplog.text
    with pytest.raises(ValueError, match="4 votes at temperature 0 are all the same"):
        Judge(Scripted(str, temperature=0.0), TEMPLATES["grade"], votes=4)


def test_a_comparison_whose_orders_disagree_is_a_tie():
    def reply(question):
        first, second = re.search(r"\[Answer A\]\n(.*)\n\[End.*\[Answer B\]\n(.*)\n\[End", question.messages[0][1], re.DOTALL).groups()
        if "first" in question.messages[0][1].split("[Answer A]")[0]:
            return "[[A]]"  # whatever stands first
        return None if "?" in (first, second) else "[[C]]" if first == second else "[[A]]" if first > second else "[[B]]"

    judge = Judge(Scripted(reply), TEMPLATES["compare"], votes=2)
    found = judge.compare(["big", "big", "first", "big", "big"], ["9", "1", "9", "5", "?"], ["1", "9", "1", "5", "1"])
    assert [each.score for each in found] == [1.0, 0.0, 0.5, 0.5, None]
    assert [each.agreement for each in found] == [1.0, 1.0, 0.0, 1.0, None]
    with pytest.raises(ValueError, match="expected a template of kind grade here, got compare"):
        judge(["q"], ["a"])


def test_principles_then_critique_then_grade_is_one_conversation():
    replies = {1: "Principle: brevity, 100 %", 3: "It is brief.", 5: "Grade: [[8.2]]"}
    model = Scripted(lambda q: None if len(q.messages) == 3 and "lost" in q.messages[0][1] else f"{replies[len(q.messages)]} {q.draw}")
    judge = Judge(model, TEMPLATES["principles"], votes=2)
    assert judge(["q", "q"], ["short", "lost"]) == [pytest.approx(0.8), None]
    last = next(q for q in model.asked if len(q.messages) == 5 and q.draw == 1)
    assert [role for role, _ in last.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert (last.messages[1][1], last.messages[3][1]) == ("Principle: brevity, 100 % 1", "It is brief. 1")


def test_replies_are_kept_and_not_asked_again(tmp_path):
    path, asked = tmp_path / "kept" / "replies.jsonl", []

    def judge(reply, template=TEMPLATES["grade"], **identity):
        model = Scripted(reply)
        model.identity |= identity
        asked.append(model.asked)
        return Judge(Remembering(model, path), template)

    assert judge(lambda q: None if "b\n" in q.messages[0][1] else "[[4]]")(["q", "q"], ["a", "b"]) == [pytest.approx(1 / 3), None]
    assert judge(lambda q: "[[7]]")(["q", "q"], ["a", "b"]) == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert [len(each) for each in asked] == [2, 1]  # what failed is asked again
    assert judge(lambda q: "[[1]]", seed=1)(["q"], ["a"]) == [0.0]  # another judge
    assert judge(lambda q: "[[1]]", Template("grade", ("{completion}",)))(["q"], ["a"]) == [0.0]  # another template
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[0])["reply"] == "[[4]]"
    path.write_text("\n".join(lines) + '\n{"key": "ab')  # killed while writing
    assert judge(lambda q: 1 / 0)(["q", "q"], ["a", "b"]) == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert path.read_text().splitlines() == lines
    path.write_text("buy milk\n")
    with pytest.raises(ValueError, match="line 1 is no judge's reply"):
        judge(str)


def test_an_interrupted_batch_keeps_what_was_answered(tmp_path):
    def reply(question):
        if "a\n" in question.messages[0][1]:
            raise KeyboardInterrupt
        return "[[10]]"

    judge = Judge(Remembering(Scripted(reply), tmp_path / "r.jsonl"), TEMPLATES["grade"])
    with pytest.raises(KeyboardInterrupt):
        judge(["q", "q"], ["a", "b"])
    assert Judge(Remembering(Scripted(lambda q: None), tmp_path / "r.jsonl"), TEMPLATES["grade"])(["q", "q"], ["a", "b"]) == [None, 1.0]


@pytest.fixture(scope="module")
def engine():
    return make_engine(byte_model())


def test_a_local_model_draws_by_the_conversation_alone(engine):
    sampled = SamplingParams(temperature=1.0, max_tokens=8, seed=3)
    questions = [Question((("user", text),), draw) for text in ("one", "two") for draw in range(3)]
    together = dict(LocalModel(engine, sampled).ask(questions))
    assert len(set(together.values())) > 3
    alone = [dict(LocalModel(engine, sampled).ask([question]))[0] for question in questions]
    assert [together[i] for i in range(6)] == alone
    tokenizer = byte_tokenizer()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "one"}], tokenize=True, add_generation_prompt=True, return_dict=False)
    greedy = engine.generate([ids], GREEDY)[0].outputs[0].text
    assert dict(LocalModel(engine, GREEDY).ask(questions[:1])) == {0: greedy}


def test_a_local_model_without_a_chat_template_reads_plain_text():
    engine = make_engine(byte_model())
    engine.tokenizer.chat_template = None
    question = Question((("system", "s"), ("user", "q")))
    greedy = engine.generate(["s\n\nq\n\n"], GREEDY)[0].outputs[0].text
    assert dict(LocalModel(engine, GREEDY).ask([question])) == {0: greedy}


def test_a_conversation_that_is_too_long_has_no_reply(engine, caplog):
    with caplog.at_level("WARNING", "fastalign"):
        found = dict(LocalModel(engine, GREEDY).ask([Question((("user", "x" * 180),)), Question((("user", "short"),))]))
    assert found[0] is None
    assert found[1] is not None
    assert "passes the model's 192" in caplog.text
    assert "xxxx" in caplog.text


def test_a_server_is_asked_as_openai_says(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    params = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=7, seed=40)
    with chat_server(lambda body: f"to {body['messages'][-1]['content']}") as server:
        model = ServerModel(server.url + "/", "big", params, key_variable="JUDGE_KEY", patience=SHORT)
        assert dict(model.ask([Question((("user", "a"),)), Question((("user", "b"),), 2)])) == {0: "to a", 1: "to b"}
        (body,) = [body for body in server.bodies if body["messages"] == [{"role": "user", "content": "b"}]]
        assert body == {
            "model": "big",
            "messages": [{"role": "user", "content": "b"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 7,
            "seed": 42,
        }
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert "secret" not in json.dumps(model.identity)


def test_errors_that_may_pass_are_tried_again_and_others_are_told(monkeypatch, caplog):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    attempts = {}

    def reply(body):
        text = body["messages"][-1]["content"]
        attempts[text] = attempts.get(text, 0) + 1
        if text == "busy" and attempts[text] < 3:
            return 503, "later"
        return {"down": (500, "no"), "wrong": (400, "bad field"), "away": (302, "http://127.0.0.1:1/x"), "odd": (200, "{}")}.get(text, "ok")

    with chat_server(reply) as server, caplog.at_level("WARNING", "fastalign"):
        questions = [Question((("user", text),)) for text in ("busy", "down", "wrong", "away", "odd")]
        found = dict(ServerModel(server.url, "m", GREEDY, patience=SHORT).ask(questions))
    assert found == {0: "ok", 1: None, 2: None, 3: None, 4: None}
    assert attempts == {"busy": 3, "down": 3, "wrong": 1, "away": 1, "odd": 1}
    told = " | ".join(record.getMessage() for record in caplog.records)
    for part in (
        "HTTP 500: no; it was asked 'down'",
        "HTTP 400: bad field; it was asked 'wrong'",
        "HTTP 302",
        "expected a chat completion",
    ):
        assert part in told


def test_a_server_that_hangs_or_is_not_there_costs_its_samples(caplog):
    release = threading.Event()
    with chat_server(lambda body: release.wait(20) and "late") as server, caplog.at_level("WARNING", "fastalign"):
        patience = Patience(timeout=0.2, retries=1, backoff=0.01)
        assert dict(ServerModel(server.url, "", GREEDY, patience=patience).ask([Question((("user", "q"),))])) == {0: None}
        release.set()
    assert "after 2 attempts" in caplog.text
    assert dict(ServerModel(server.url, "", GREEDY, patience=patience).ask([Question((("user", "q"),))])) == {0: None}


def test_no_more_requests_than_allowed_are_open(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    gate = threading.Barrier(3)  # three at once, or the test hangs and fails
    with chat_server(lambda body: str(gate.wait(60))) as server:
        patience = Patience(concurrency=3, timeout=90)
        assert (
            len(dict(ServerModel(server.url, "", GREEDY, patience=patience).ask([Question((("user", f"{i}"),)) for i in range(12)]))) == 12
        )
        assert server.most == 3


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [("localhost:8000/v1", "", "expected a URL as http://"), ("http://x/v1", "NO_SUCH_KEY_HERE", "environment variable NO_SUCH_KEY_HERE")],
)
def test_a_server_that_cannot_be_meant_is_told(url, key, message):
    with pytest.raises(ValueError, match=message):
        ServerModel(url, "", GREEDY, key_variable=key)


def test_our_own_server_replies_as_the_engine_does(monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    question = Question((("user", "one"),))
    (_, here), *_ = LocalModel(make_engine(byte_model()), GREEDY).ask([question])
    with serving(AsyncEngine(make_engine(byte_model()))) as server:
        (_, there), *_ = ServerModel(server.url + "/v1", "tiny", GREEDY, patience=SHORT).ask([question])
    assert there == here
