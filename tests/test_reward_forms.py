"""Rewards of form: letters, JSON, repetition."""

import pytest

from fastalign.rewards import load_rewards
from fastalign.rewards.forms import choice, choice_letter, json_object, repetition

LETTERS = "ABCDEFGHIJ"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("C. because it is", "C"),
        ("(b)", None),
        ("(B)", "B"),
        ("I think (A), no: (D)", "D"),
        ("The answer is C.", "C"),
        ("the answer is (c)", "C"),
        ("The answer is: **B**", "B"),
        (r"so \boxed{\text{D}}", "D"),
        (r"\boxed{A}", "A"),
        ("#### E", "E"),
        ("<think>(A) or (B)?</think> (B)", "B"),
        ("A dog barks", None),
        ("Answer: Apple", None),
        ("Because", None),
        ("", None),
        ("I'd say so", None),
    ],
)
def test_the_letter_that_a_text_commits_to(text, letter):
    assert choice_letter(text, LETTERS) == letter


def test_choice_compares_letters_and_skips_what_has_none():
    completions = ["(C)", "The answer is B", "no idea", "D"]
    answer = ["C", "C. Paris", "A", None]
    assert choice(completions, answer=answer) == [1.0, 0.0, 0.0, None]
    assert choice([[{"role": "assistant", "content": "(B)"}]], solution=["B"]) == [1.0]
    with pytest.raises(ValueError, match="expected capital letters"):
        choice([], letters="abcd")


def test_json_is_json_and_has_its_keys():
    good = ['{"a": 1, "b": [2]}', " [1, 2] ", '```json\n{"a": 1}\n```', '<think>{</think>{"a": null}', "text\n```\n{}\n```\nmore"]
    assert json_object(good) == [1.0] * 5
    assert json_object(["{'a': 1}", "", "NaN", "[1] [2]", "```json\n{}\n```\n```json\n{}\n```", "[" * 100_000]) == [0.0] * 6
    assert json_object(['{"a": 1, "b": 2}', '{"a": 1}', '["a", "b"]'], keys="a+b") == [1.0, 0.0, 0.0]


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert repetition(["a b c d", "a b a b a b", "x", ""], ngram=2) == pytest.approx([0.0, -(1 - 2 / 5), 0.0, 0.0])
    assert repetition(["", ""], [[1, 1, 1, 1], [1, 2, 3, 4]], ngram=1, penalty=0.5) == pytest.approx([-0.5 * 3 / 4, 0.0])
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="a whole number of at least 1"):
            repetition([], ngram=wrong)


def test_the_command_line_names_them():
    with load_rewards(["choice:letters=AB", "json:keys=a", "repetition:ngram=2,penalty=0.1"]) as rewards:
        scores = rewards.score(["p", "p"], ['{"a": 1}', "(B)"], [[1, 2, 1, 2], [3]], {"answer": ["B", "B"]})
    assert scores == {"choice": [0.0, 1.0], "json": [1.0, 0.0], "repetition": [pytest.approx(-0.1 / 3), 0.0]}
