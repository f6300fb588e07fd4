"""Preference and labelled records: token trees with exact masks, implicit prompts, and every kind of bad record with its line."""

import json

import pytest
from test_chat_masks import CHATML, HI, MARKED, USER, make_tokenizer
from test_data import byte_tokenizer, write

from fastalign.data import BadRecord, DataError, labelled_examples, load_records, pair_examples, partners
from fastalign.packing import pack, sequences

BYE = {"role": "assistant", "content": "three"}
# a template that writes how many messages there are in front: the prompts of a pair may then differ
COUNTING = "{{ messages | length }}:" + CHATML


def pairs(tmp_path, *rows, tokenizer=None, **options):
    path = write(tmp_path / "pairs.jsonl", *rows)
    return pair_examples(load_records(path), tokenizer or byte_tokenizer(), **{"max_length": 200, **options})


def labelled(tmp_path, *rows, tokenizer=None, **options):
    path = write(tmp_path / "labelled.jsonl", *rows)
    return labelled_examples(load_records(path), tokenizer or byte_tokenizer(), **{"max_length": 200, **options})


def texts(found, tokenizer):
    """(root, chosen, rejected) of each tree, as text."""
    return [tuple(tokenizer.decode(list(part.ids)) for part in (tree, *tree.children)) for tree in found.trees]


def test_pairs_share_their_prompt_and_score_both_completions(tmp_path):
    tokenizer = byte_tokenizer()
    found = pairs(tmp_path, {"prompt": "one ", "chosen": "ok", "rejected": "worse"})
    assert texts(found, tokenizer) == [("<s>one ", "ok</s>", "worse</s>")]
    packed = pack(found.trees)
    assert packed.num_tokens == len("one ") + 1 + len("ok") + 1 + len("worse") + 1
    assert packed.cu_targets.tolist() == [0, 3, 9]
    assert tokenizer.decode(packed.targets.tolist()) == "ok</s>worse</s>"
    assert found.margins is None


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_conversational_pairs_score_what_the_assistant_wrote(tmp_path, template):
    tokenizer = make_tokenizer(template)
    found = pairs(tmp_path, {"prompt": [USER], "chosen": [HI], "rejected": [BYE]}, tokenizer=tokenizer)
    prompt = "<|im_start|>user\nAdd 1 and 2<|im_end|>\n<|im_start|>assistant\n"
    assert texts(found, tokenizer) == [(prompt, "3<|im_end|>", "three<|im_end|>")]


def test_an_implicit_prompt_is_the_common_messages(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    explicit = pairs(tmp_path, {"prompt": [USER], "chosen": [HI], "rejected": [BYE]}, tokenizer=tokenizer)
    implicit = pairs(tmp_path, {"chosen": [USER, HI], "rejected": [USER, BYE]}, tokenizer=tokenizer)
    assert implicit.trees == explicit.trees
    same = pairs(tmp_path, {"chosen": [USER, HI], "rejected": [USER, HI]}, tokenizer=tokenizer)
    assert texts(same, tokenizer)[0][1:] == ("3<|im_end|>", "3<|im_end|>")


def test_an_implicit_prompt_of_text_cuts_no_word(tmp_path):
    found = pairs(tmp_path, {"chosen": "Q: sky? A: blue", "rejected": "Q: sky? A: black"})
    assert texts(found, byte_tokenizer()) == [("<s>Q: sky? A:", " blue</s>", " black</s>")]


def test_a_tree_parts_where_the_sequences_do_and_scores_no_turn_of_the_user(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    asked = [{"role": "user", "content": "Well?"}, BYE]
    found = pairs(tmp_path, {"prompt": [USER], "chosen": [HI], "rejected": asked}, tokenizer=tokenizer)
    packed = pack(found.trees)
    whole = "<|im_start|>user\nAdd 1 and 2<|im_end|>\n<|im_start|>"
    assert texts(found, tokenizer)[0][0] == whole
    assert [tokenizer.decode(ids) for ids in sequences(packed)] == [
        f"{whole}assistant\n3<|im_end|>",
        f"{whole}user\nWell?<|im_end|>\n<|im_start|>assistant\nthree<|im_end|>",
    ]
    assert tokenizer.decode(packed.targets.tolist()) == "3<|im_end|>three<|im_end|>"


def test_a_template_that_rewrites_the_prompt_gives_no_exact_mask(tmp_path):
    with pytest.raises(BadRecord, match="no boundary in token ids"):
        pairs(tmp_path, {"prompt": [USER], "chosen": [HI], "rejected": [BYE]}, tokenizer=make_tokenizer(COUNTING))


def test_margins_are_read_and_absent_ones_are_0(tmp_path):
    row = {"prompt": "one ", "chosen": "ok", "rejected": "bad"}
    assert pairs(tmp_path, row | {"margin": 1.5}, row | {"margin": None}, row | {"margin": "2"}).margins == [1.5, 0.0, 2.0]


def test_probabilities_are_read_and_absent_ones_are_1(tmp_path):
    row = {"prompt": "one ", "chosen": "ok", "rejected": "bad"}
    found = pairs(tmp_path, row | {"probability": 0.75}, row | {"probability": None}, row | {"probability": "0"})
    assert (found.probabilities, found.margins) == ([0.75, 1.0, 0.0], None)
    assert pairs(tmp_path, row).probabilities is None


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c", "probability": 1.5}, "wrong type", "from 0 to 1 in column 'probability', got 1.5"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "probability": "likely"}, "wrong type", "column 'probability'"),
        ({"prompt": "a", "chosen": "b"}, "missing column", "expected column 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "missing column", "got null"),
        ({"prompt": "a", "chosen": "  ", "rejected": "b"}, "empty chosen", "column 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty rejected", "column 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c" * 60}, "too long", "at most 50 tokens"),
        ({"prompt": "a" * 30, "chosen": "b", "rejected": "c"}, "too long", "--max_prompt_length"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "NaN"}, "wrong type", "finite number in column 'margin'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "wrong type", "column 'margin'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "wrong type", "column 'rejected'"),
        ({"chosen": "same", "rejected": ["c"]}, "wrong type", "both of"),
        ({"chosen": [USER, HI], "rejected": [BYE]}, "no prompt", "no message in common"),
        ("{not json", "invalid JSON", "invalid JSON"),
    ],
)
def test_bad_pairs_are_named_by_line_or_skipped(tmp_path, row, reason, words):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    limits = {"max_length": 50, "max_prompt_length": 20}
    with pytest.raises(BadRecord, match=words) as caught:
        pairs(tmp_path, good, row, **limits)
    assert "pairs.jsonl:2" in str(caught.value)
    assert caught.value.reason == reason
    found = pairs(tmp_path, good, row, good, on_bad_record="skip", **limits)
    assert found.indices == [0, 2]
    assert found.skipped_reasons == {reason: 1}


def test_a_token_over_the_vocabulary_is_named(tmp_path):
    with pytest.raises(BadRecord, match="over the vocabulary of 100"):
        pairs(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, vocab_size=100)


def test_no_record_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no record is left"):
        pairs(tmp_path, {"prompt": "a"}, on_bad_record="skip")
    with pytest.raises(DataError, match="--max_length"):
        pairs(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, max_length=1)


def test_labelled_completions_keep_prompt_and_label(tmp_path):
    rows = [{"prompt": "one ", "completion": "ok", "label": True}, {"prompt": "two ", "completion": "bad", "label": False}]
    found = labelled(tmp_path, *rows, {"prompt": "x ", "completion": "y", "label": "False"})
    tokenizer = byte_tokenizer()
    assert found.labels == [True, False, False]
    assert [tokenizer.decode(p) for p in found.prompts] == ["<s>one ", "<s>two ", "<s>x "]
    assert [tokenizer.decode(ids) for ids in sequences(pack(found.behind(0, 1)))] == ["<s>one bad</s>"]


def test_preference_records_are_taken_apart(tmp_path):
    found = labelled(tmp_path, {"prompt": "one ", "chosen": "ok", "rejected": "bad"}, {"prompt": "two ", "chosen": "x", "rejected": "y"})
    assert found.labels == [True, False, True, False]
    assert [byte_tokenizer().decode(list(c.ids)) for c in found.completions] == ["ok</s>", "bad</s>", "x</s>", "y</s>"]


@pytest.mark.parametrize("label", [1, "yes", None, 0.5])
def test_a_label_that_is_no_boolean_is_named(tmp_path, label):
    with pytest.raises(BadRecord, match="column 'label'") as caught:
        labelled(tmp_path, {"prompt": "a", "completion": "b", "label": label})
    assert "labelled.jsonl:1" in str(caught.value)
    with pytest.raises(BadRecord, match="expected column 'label'"):
        labelled(tmp_path, {"prompt": "a", "completion": "b"})
    with pytest.raises(BadRecord, match="column 'completion'"):
        labelled(tmp_path, {"prompt": "a", "completion": " ", "label": True})


def test_csv_labels_are_read(tmp_path):
    path = tmp_path / "labelled.csv"
    path.write_text("prompt,completion,label\na,b,True\nc,d,false\n")
    assert labelled_examples(load_records(str(path)), byte_tokenizer(), max_length=20).labels == [True, False]


def test_partners_have_other_prompts():
    assert partners([[1], [2], [3], [4], [5]], 3) == [2, 0, 1, 4, 3]  # rotated by one within the window, TRL's way
    assert partners([[1], [1], [2], [2]], 4) == [3, 3, 1, 1]  # completions of one prompt are no mismatched pair
    assert partners([[1], [1], [2], [3]], 2) == [3, 3, 3, 2]  # beyond the window
    assert partners([[1], [1]], 2) == [None, None]
    assert json.dumps(partners([[1], [2]], 1)) == "[1, 0]"
