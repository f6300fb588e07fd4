"""Built-in rewards: what is right, what is wrong, what is left out; and the set that weighs them."""

import json
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest

from fastalign.rewards import BUILTIN, GOLD_COLUMNS, load_rewards
from fastalign.rewards import answers as A
from fastalign.rewards.builtin import gsm8k, gsm8k_strict, has_math_verify, math_answer, overlong, regex, target_length, think_format

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.parametrize(
    "gold, answer, same",
    [
        ("18", "18.00", True),
        ("1234", "1,234", True),
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac12", True),
        (r"-\frac{3}{4}", "-0.75", True),
        ("0.33", "1/3", False),
        ("1e3", "1000", True),
        ("50\\%", "50", True),
        ("$12", r"\$12", True),
        ("5", "x = 5", True),
        ("5", "5.", True),
        ("10 \\text{ cm}", "10", True),
        (r"90^\circ", "90", True),
        ("−3", "-3", True),
        ("(1, 2)", "(1.0,2)", True),
        ("(1, 2)", "(2, 1)", False),
        ("(1, 2)", "[1, 2]", False),
        (r"\text{Tuesday}", "tuesday", True),
        ("B", "(B)", False),
        ("3", "13", False),
        ("", "", False),
        ("1/0", "1/0", True),
        ("9" * 5000, "8" * 5000, False),
        ("1e999", "2e999", False),
    ],
)
def test_equivalent_compares_exactly(gold, answer, same):
    assert A.equivalent(gold, answer) is same
    assert A.equivalent(answer, gold) is same


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} and an open \boxed{4", "3"),
        ("7 apples\n#### 12\n", "12"),
        ("The answer is $x^2$.", "x^2"),
        ("The final answer is: **42**", "42"),
        ("The answer is 3.5. I am sure.", "3.5"),
        ("2 + 3 makes 5", "5"),
        ("from 5-3", "3"),
        ("about -3", "-3"),
        ("we get 1,234.50", "1,234.50"),
        ("none", None),
        ("####", None),
    ],
)
def test_final_answer_finds_what_the_text_commits_to(text, answer):
    assert A.final_answer(text) == answer


def test_as_number_is_exact_and_bounded():
    assert A.as_number("0.1") == Fraction(1, 10)
    assert A.as_number(".5") == Fraction(1, 2)
    assert A.as_number("1e-3") == Fraction(1, 1000)
    assert A.as_number("1e99999") is None
    assert A.as_number("1/0") is None
    assert A.as_number(".") is None


GSM8K_CASES = [
    ("so it is\n#### 1,234", 1.0, 1.0),
    ("#### $1234.00", 1.0, 1.0),
    ("#### 5\nno wait\n#### 1234 dollars", 1.0, 1.0),
    ("it is 1234.", 1.0, 0.0),
    ("it is 1234, not 5", 0.0, 0.0),
    ("#### 12 and 1234", 0.0, 0.0),
    ("#### none, 1234", 1.0, 1.0),
    ("####", 0.0, 0.0),
    ("", 0.0, 0.0),
    ("<think>#### 9</think>\n#### 1234", 1.0, 1.0),
    ("<think>#### 1234</think>", 0.0, 0.0),
    ("-1234", 0.0, 0.0),
]


@pytest.mark.parametrize("text, score, strict", GSM8K_CASES)
def test_gsm8k_takes_the_hashes_then_the_last_number(text, score, strict):
    gold = ["Some work <<1=1>>\n#### 1,234"]
    assert gsm8k([text], answer=gold) == [score]
    assert gsm8k_strict([text], answer=gold) == [strict]


def test_gold_comes_from_the_first_column_that_has_one():
    texts = ["4"] * 4
    assert gsm8k(texts, answer=[None, "#### 4", " ", 4], completion=["4", "5", None, "5"]) == [1.0, 1.0, None, 1.0]
    conversation = [{"role": "assistant", "content": "4"}]
    assert gsm8k([conversation], completion=[[{"role": "assistant", "content": "#### 4"}]]) == [1.0]


def test_math_compares_numbers_text_and_leaves_out_what_has_no_gold():
    texts = [r"\boxed{0.5}", "<think>5</think> It is 7", "no idea", "3"]
    assert math_answer(texts, solution=[r"work \boxed{\frac12}", "7", "1", None]) == [1.0, 1.0, 0.0, None]
    assert math_answer(texts[1:2], answer=[["7"]]) == [1.0]
    with pytest.raises(ValueError, match="expected one reference answer, got a list of 2"):
        math_answer(texts[1:2], answer=[["7", "8"]])


@pytest.mark.skipif(not has_math_verify(), reason="math-verify is not installed")
def test_math_proves_expressions_equal_where_math_verify_is_installed():
    golds = [r"\frac{\sqrt{2}}{2}", "x^2-1", r"\{1, 2\}", r"\frac{\pi}{2}"]
    texts = [r"\boxed{\frac{1}{\sqrt 2}}", "The answer is $(x-1)(x+1)$.", r"\boxed{\{2, 1\}}", r"\boxed{\pi}"]
    assert math_answer(texts, answer=golds) == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "text, score",
    [
        ("<think>1+1</think>2", 1.0),
        ("\n<think>\n1+1\n</think>\n\n2\n", 1.0),
        ("<think></think>2", 0.0),
        ("<think>1+1</think> ", 0.0),
        ("1+1</think>2", 0.0),
        ("So <think>1+1</think>2", 0.0),
        ("<think>a<think>b</think>2", 0.0),
        ("<think>a</think>b</think>2", 0.0),
        ("", 0.0),
    ],
)
def test_format_wants_one_thought_and_an_answer(text, score):
    assert think_format([text]) == [score]
    assert think_format([[{"role": "assistant", "content": text}]]) == [score]


def test_regex_matches_the_whole_completion():
    assert regex(["a\nb", "ab!", "b"], pattern="a.*b") == [1.0, 0.0, 0.0]


def test_length_rewards_closeness_to_the_target():
    ids = [[0] * n for n in (0, 50, 100, 150, 300)]
    assert target_length([""] * 5, ids, target=100) == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert target_length([""] * 5, ids, target=100, width=50) == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert target_length(["one two"], target=4) == [0.5], "words, where there are no ids"


def test_overlong_is_the_papers_soft_punishment():
    ids = [[0] * n for n in (10, 80, 90, 100, 200)]
    assert overlong([""] * 5, ids, max_length=100, buffer=20) == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert overlong([""] * 5, ids, max_length=100) == [0.0, 0.0, -0.5, -1.0, -1.0]


@pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K files are not beside the project")
def test_gsm8k_and_math_accept_every_reference_solution():
    golds = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    assert gsm8k(golds, answer=golds) == [1.0] * len(golds)
    assert gsm8k_strict(golds, answer=golds) == [1.0] * len(golds)
    spoken = [f"So the answer is ${A.after_hashes(g)}." for g in golds]
    assert gsm8k(spoken, answer=golds) == [1.0] * len(golds)
    assert math_answer(spoken, answer=golds) == [1.0] * len(golds)
    wrong = [re.sub(r"#### .*", "#### 123454321", g) for g in golds]
    assert gsm8k(wrong, answer=golds) == [0.0] * len(golds)


def test_worked_solution_without_an_answer_is_no_gold(caplog):
    long = "We add the numbers one by one. " * 20
    assert math_answer(["4", "4"], solution=[long, long + "The answer is 4."]) == [None, 1.0]
    with load_rewards(["gsm8k"]) as rewards:
        assert math.isnan(rewards.score(["p"], ["4"], None, {"answer": [long]})["gsm8k"][0])
    assert "reward 'gsm8k': none of the 1 samples of a batch has a reward; are its columns the right ones?" in caplog.text


# the set


def test_set_scores_by_name_and_weighs():
    with load_rewards(["gsm8k", "format", "length:target=2"], [1.0, 0.5, 0.25]) as rewards:
        assert rewards.names == ["gsm8k", "format", "length"]
        texts = ["<think>x</think>4", "4"]
        scores = rewards.score(["p", "q"], texts, [[1, 2], [1]], {"answer": ["4", None], "other": [1, 2]})
        assert scores["format"] == [1.0, 0.0]
        assert scores["length"] == [1.0, 0.5]
        assert scores["gsm8k"][0] == 1.0
        assert math.isnan(scores["gsm8k"][1])
        assert rewards.weights == {"gsm8k": 1.0, "format": 0.5, "length": 0.25}
        assert rewards.combine(scores) == [1.75, 0.125], "a missing reward leaves the sum"
        assert math.isnan(rewards.combine({name: [math.nan] for name in rewards.names})[0])


def test_set_of_the_same_reward_twice_numbers_it():
    with load_rewards(["length:target=1", "length:target=2"]) as rewards:
        assert rewards.score(["p"], ["x"], [[7]]) == {"length": [1.0], "length_2": [0.5]}


def test_set_names_the_column_that_is_missing():
    with load_rewards(["gsm8k"]) as rewards:
        with pytest.raises(ValueError, match="expected the reference answer in one of the columns") as caught:
            rewards.score(["p"], ["4"], None, {"result": ["4"]})
        assert "rename with --dataset_map theirs=answer" in str(caught.value)
        rewards.check_columns([GOLD_COLUMNS[-1]])


def test_set_checks_its_lengths():
    with load_rewards(["format"]) as rewards:
        with pytest.raises(ValueError, match="expected 2 completions, one a prompt, got 1"):
            rewards.score(["p", "q"], ["a"])
        with pytest.raises(ValueError, match="expected 1 answer, one a prompt, got 2"):
            rewards.score(["p"], ["a"], None, {"answer": [1, 2]})
        assert rewards.score([], []) == {"format": []}


@pytest.mark.parametrize(
    "specifications, weights, message",
    [
        ([], None, "expected at least one reward, got none; built-in are math"),
        (["mth"], None, "unknown reward 'mth'; did you mean 'math'\\?"),
        (["zzzzzz"], None, "unknown reward 'zzzzzz'; built-in are"),
        (["format"], [1.0, 2.0], "expected one weight a reward, 1, got 2"),
        (["format"], [math.nan], "expected finite reward weights"),
        (["overlong"], None, "reward 'overlong': expected max_length, as in --reward overlong:max_length=…"),
        (["overlong:max_lenght=3"], None, "expected parameters .* got 'max_lenght=3'; did you mean 'max_length'"),
        (["length:target=long"], None, "expected a number for target, got 'long'"),
        (["length:target=-3"], None, "expected target >= 0 and width > 0 tokens, got target=-3"),
        (["regex:pattern=("], None, "reward 'regex': expected a regular expression, got '\\(': missing \\)"),
        (["no_such_file.py:f"], None, "no such file 'no_such_file.py'"),
    ],
)
def test_wrong_specifications_fail_at_load(specifications, weights, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(specifications, weights)


def test_every_builtin_is_documented():
    assert all(row.function.__doc__ for row in BUILTIN.values())
