"""Rankings, outcomes and steps as ids: exact boundaries, places that are read, bad records by line."""

import math

import pytest
from transformers import PreTrainedTokenizerFast

from fastalign.data import BadRecord, DataError, Record, attribute_examples, outcome_examples, ranking_examples, step_examples
from fastalign.data.candidates import shared_tree
from fastalign.recipes import arithmetic

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    found = arithmetic.build_tokenizer()
    found.chat_template = TEMPLATE
    return found


def records(*rows: dict) -> list[Record]:
    return [Record(row, "data.jsonl", i + 1) for i, row in enumerate(rows)]


def paths(example) -> list[list[int]]:
    root, children = example.tree, example.tree.children
    return [[*root.ids, *child.ids] for child in children] if children else [list(root.ids)]


def read_tokens(example) -> list[int]:
    segments = [example.tree, *example.tree.children]
    return [segments[segment].ids[offset] for segment, offset in example.places]


def test_pairs_are_prompt_and_completion_tokenized_apart_and_closed(tokenizer):
    (example,) = ranking_examples(records({"prompt": "1+2=", "chosen": "3", "rejected": "45", "margin": 2}), tokenizer, max_length=20)
    begin, eos = tokenizer("1+2=").input_ids, tokenizer.eos_token_id
    three, fortyfive = (tokenizer(text, add_special_tokens=False).input_ids for text in ("3", "45"))
    assert paths(example) == [[*begin, *three, eos], [*begin, *fortyfive, eos]]
    assert list(example.tree.ids) == begin
    assert read_tokens(example) == [eos, eos]
    assert (example.margin, example.labels) == (2.0, ())


def test_what_all_answers_begin_with_is_forwarded_once(tokenizer):
    row = {"prompt": "1+2=", "completions": ["33", "34", "3", "345"], "subset": "s"}
    (example,) = ranking_examples(records(row), tokenizer, max_length=20)
    begin = tokenizer("1+2=3").input_ids
    assert list(example.tree.ids) == begin
    assert paths(example)[2] == [*begin, tokenizer.eos_token_id]
    assert example.tree.num_tokens == len(begin) + 2 + 2 + 1 + 3
    assert example.subset == "s"


def test_without_a_prompt_the_answers_are_whole_texts(tokenizer):
    (example,) = ranking_examples(records({"chosen": "1+2=3", "rejected": "1+2=4"}), tokenizer, max_length=20)
    assert paths(example) == [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in ("1+2=3", "1+2=4")]


@pytest.mark.parametrize("explicit", [True, False])
def test_conversations_are_what_the_template_makes_of_all_messages(tokenizer, explicit):
    user, good, bad = ({"role": role, "content": text} for role, text in (("user", "1+1="), ("assistant", "2"), ("assistant", "3")))
    row = {"prompt": [user], "chosen": [good], "rejected": [bad]} if explicit else {"chosen": [user, good], "rejected": [user, bad]}
    (example,) = ranking_examples(records(row), tokenizer, max_length=20)
    assert paths(example) == [tokenizer(f"<s>1+1=</s><s>{d}</s>", add_special_tokens=False).input_ids for d in "23"]


def test_an_answer_that_begins_another_keeps_a_token_of_its_own():
    tree, places = shared_tree([[1, 5, 6], [1, 5, 6, 7]], [2, 3])
    assert (list(tree.ids), [list(c.ids) for c in tree.children]) == ([1, 5], [[6], [6, 7]])
    assert places == ((1, 0), (2, 1))
    tree, places = shared_tree([[1, 5, 0], [1, 5, 0]], [1, 1])  # equal, and closed by padding
    assert (list(tree.ids), places) == ([1], ((1, 0), (2, 0)))


def test_outcomes_and_their_labels(tokenizer):
    rows = records({"prompt": "1+2=", "completion": "3", "label": True}, {"prompt": "1+2=", "completion": "4", "label": "false"})
    right, wrong = outcome_examples(rows, tokenizer, max_length=20)
    assert (right.labels, wrong.labels) == ((1.0,), (0.0,))
    assert read_tokens(right) == [tokenizer.eos_token_id]
    assert right.places == ((0, len(right.tree.ids) - 1),)


def test_grades_are_columns_and_one_may_be_missing(tokenizer):
    rows = records({"prompt": "1+2=", "completion": "3", "help": 4, "length": None}, {"prompt": "1+2=", "completion": "4", "length": "0.5"})
    first, second = attribute_examples(rows, tokenizer, max_length=20, attributes=["help", "length"])
    assert first.labels[0] == 4.0
    assert second.labels[1] == 0.5
    assert math.isnan(first.labels[1])
    assert math.isnan(second.labels[0])
    assert read_tokens(first) == [tokenizer.eos_token_id]
    with pytest.raises(DataError, match="graded answers need the columns depth, got"):
        attribute_examples(rows, tokenizer, max_length=20, attributes=["help", "depth"])


def test_steps_are_read_at_their_separators(tokenizer):
    rows = records({"prompt": "1+2+3=", "completions": ["1+2", "3+3"], "labels": [True, False]})
    (example,) = step_examples(rows, tokenizer, max_length=30, separator="=")
    assert list(example.tree.ids) == tokenizer("1+2+3=1+2=3+3=").input_ids
    assert read_tokens(example) == [tokenizer("=", add_special_tokens=False).input_ids[0]] * 2
    assert [offset for _, offset in example.places] == [10, 14]
    assert example.labels == (1.0, 0.0)


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (ranking_examples, {"prompt": "1=", "chosen": "", "rejected": "2"}, r"data.jsonl:2: expected an answer, got ''"),
        (ranking_examples, {"prompt": "1=", "chosen": "3"}, r"data.jsonl:2: expected column 'rejected'"),
        (ranking_examples, {"prompt": "1=", "completions": ["3"]}, r"data.jsonl:2: expected at least two answers"),
        (ranking_examples, {"prompt": "1=", "chosen": "3", "rejected": "4", "margin": "x"}, r"data.jsonl:2: expected a finite number"),
        (
            ranking_examples,
            {"prompt": "1=", "chosen": "3", "rejected": "4", "probability": 2},
            r"data.jsonl:2: expected a number from 0 to 1",
        ),
        (ranking_examples, {"prompt": "1=", "chosen": "3", "rejected": "4" * 40}, r"data.jsonl:2: expected at most 20 tokens, got 44"),
        (
            ranking_examples,
            {"prompt": "1=", "chosen": 3, "rejected": "4"},
            "expected an answer as text or messages, got int",
        ),
        (
            outcome_examples,
            {"prompt": "1=", "completion": "3", "label": 2},
            "expected true, false or a number between 0 and 1",
        ),
        (
            attribute_examples,
            {"prompt": "1=", "completion": "3", "help": "x"},
            r"data.jsonl:2: expected a number in column 'help', got 'x'",
        ),
        (attribute_examples, {"prompt": "1=", "completion": "3", "help": None}, "expected a number in one of the columns help, got none"),
        (attribute_examples, {"prompt": "1=", "completion": "3", "help": float("inf")}, "expected a number in column 'help', got 'inf'"),
        (
            step_examples,
            {"prompt": "1=", "completions": ["3"], "labels": [True, False]},
            "expected one label a step, 1, got 2",
        ),
        (step_examples, {"prompt": "1=", "completions": [], "labels": []}, r"data.jsonl:2: expected at least one step"),
    ],
)
def test_bad_records_are_named_by_line_or_skipped(tokenizer, read, row, message, caplog):
    good = {"prompt": "1=", "chosen": "1", "rejected": "2", "completion": "1", "label": True, "help": 1}
    if read is step_examples:
        good = {"prompt": "1=", "completions": ["1"], "labels": [True]}
    elif "completions" in row:
        good = {"prompt": "1=", "completions": ["1", "2"]}
    options = {"separator": "="} if read is step_examples else {"attributes": ["help"]} if read is attribute_examples else {}
    with pytest.raises(BadRecord, match=message):
        read(records(good, row), tokenizer, max_length=20, **options)
    kept = read(records(good, row, good), tokenizer, max_length=20, on_bad_record="skip", **options)
    assert [example.index for example in kept] == [0, 2]


def test_data_of_another_kind_name_the_columns_that_are_needed(tokenizer):
    with pytest.raises(DataError, match=r"rankings need the columns chosen \+ rejected or completions, got \['prompt', 'completion'\]"):
        ranking_examples(records({"prompt": "1=", "completion": "2"}), tokenizer, max_length=20)
    with pytest.raises(DataError, match=r"outcomes need the columns completion \+ label"):
        outcome_examples(records({"prompt": "1=", "chosen": "2", "rejected": "3"}), tokenizer, max_length=20)
