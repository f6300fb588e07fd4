"""Records and examples: every format, every kind of bad record with its line, and an order that resumes."""

import json
from collections import Counter

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastalign.data import (
    BadRecord,
    DataError,
    DataOrder,
    Record,
    columns_of_prompts,
    load_records,
    parse_dataset_map,
    prompt_examples,
    sft_examples,
)

SPECIAL = ("<unk>", "<s>", "</s>")
LETTERS = "abcdefghijklmnopqrstuvwxyz?.0123456789"


def wrap(core: Tokenizer, closes: bool = False) -> PreTrainedTokenizerFast:
    """Puts BOS in front of a text (and EOS behind it, where `closes`)."""
    core.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    single = "<s> $A </s>" if closes else "<s> $A"
    ids = [("<s>", core.token_to_id("<s>")), ("</s>", core.token_to_id("</s>"))]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_tokenizer(closes: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; "ab" is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "ab"])}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return wrap(core, closes)


def spaced_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts "▁" before any text, as SentencePiece models do."""
    vocabulary = {c: i for i, c in enumerate([*SPECIAL, "▁", "\n", "|", *LETTERS, "▁a", "\n\n"])}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("\n", "\n")], unk_token="<unk>"))
    if kind == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        core.decoder = decoders.Metaspace(prepend_scheme="always")
    return wrap(core)


def write(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def one(record: dict, tokenizer=None, **options):
    return sft_examples([Record(record, "data.jsonl", 17)], tokenizer or byte_tokenizer(), max_length=64, **options).segments[0]


# formats


def test_prompt_completion_scores_the_completion_and_its_end():
    tokenizer = byte_tokenizer()
    segment = one({"prompt": "1+1=a", "completion": "b2"}, tokenizer)
    prompt, completion = tokenizer("1+1=a")["input_ids"], tokenizer("b2", add_special_tokens=False)["input_ids"]
    assert list(segment.ids) == [*prompt, *completion, tokenizer.eos_token_id], "a and b do not merge across the boundary"
    assert list(segment.scored) == [False] * len(prompt) + [True] * (len(completion) + 1)
    assert segment.ids[0] == tokenizer.bos_token_id
    assert segment.weight == 1.0


def test_prompt_ids_are_those_that_generation_starts_from():
    record = {"prompt": "1+1=a", "completion": "b2", "level": 3}
    for tokenizer in (byte_tokenizer(), byte_tokenizer(closes=True), spaced_tokenizer("prepend"), spaced_tokenizer("metaspace")):
        segment, prompt = one(record, tokenizer), prompt_examples([Record(record, "d", 1)], tokenizer)[0]
        assert list(segment.ids[: len(prompt.ids)]) == prompt.ids
        assert segment.scored.index(True) == len(prompt.ids)
        assert tokenizer.eos_token_id not in prompt.ids
        assert segment.ids.count(tokenizer.eos_token_id) == 1
    assert prompt.columns == {"completion": "b2", "level": 3}


def test_completion_that_brings_its_eos_gets_no_second():
    assert one({"prompt": "q", "completion": "b</s>"}).ids == one({"prompt": "q", "completion": "b"}).ids
    assert one({"text": "b</s>"}).ids == one({"text": "b"}).ids


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
@pytest.mark.parametrize("completion", ["abc", " abc", "\nabc", "\n\nabc", "  a"])
def test_prefix_space_tokenizers_add_nothing_between_prompt_and_completion(kind, completion):
    tokenizer = spaced_tokenizer(kind)
    segment = one({"prompt": "1?", "completion": completion}, tokenizer)
    assert "".join(tokenizer.convert_ids_to_tokens(segment.ids)) == "<s>▁1?" + completion.replace(" ", "▁") + "</s>"


def test_text_is_scored_whole_and_ended():
    tokenizer = byte_tokenizer()
    for variant in (tokenizer, byte_tokenizer(closes=True)):
        segment = one({"text": "abc"}, variant)
        assert list(segment.ids) == [*tokenizer("abc")["input_ids"], tokenizer.eos_token_id]
        assert all(segment.scored)


def test_weight_column_reaches_the_segment():
    assert one({"text": "abc", "weight": 0.5}).weight == 0.5
    assert one({"text": "abc", "weight": "2"}).weight == 2.0, "as csv gives it"
    assert one({"text": "abc", "weight": None}).weight == 1.0


def test_format_is_the_one_that_most_records_have():
    rows = [{"text": "a"}, {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    records = [Record(row, "d.jsonl", i) for i, row in enumerate(rows, 1)]
    examples = sft_examples(records, byte_tokenizer(), max_length=9, on_bad_record="skip")
    assert (len(examples.segments), examples.num_skipped, examples.skipped_reasons) == (2, 1, {"missing column": 1})
    assert examples.indices == [1, 2]


def test_many_records_keep_their_order():
    records = [Record({"prompt": "q", "completion": "a" * (1 + i % 50)}, "d", i) for i in range(2100)]
    segments = sft_examples(records, byte_tokenizer(), max_length=64).segments
    assert [len(s.ids) for s in segments] == [4 + i % 50 for i in range(2100)]


def test_columns_of_prompts_fills_what_a_record_has_not():
    prompts = prompt_examples(
        [Record({"prompt": "a", "x": 1}, "d", 1), Record({"prompt": "b", "weight": "3 kg"}, "d", 2)], byte_tokenizer()
    )
    assert columns_of_prompts(prompts) == {"x": [1, None], "weight": [None, "3 kg"]}, "a weight weighs supervised records alone"


# bad records


@pytest.mark.parametrize(
    "record, reason, message",
    [
        ({"prompt": "a", "answer": "b"}, "missing column", "expected column 'completion', got columns ['prompt', 'answer']; "
         "rename with --dataset_map answer=completion"),
        ({"prompt": "a", "completion": None}, "missing column", "expected a value in column 'completion', got null"),
        ({"prompt": "a", "completion": 3}, "wrong type", "expected text in column 'completion', got int 3"),
        ({"prompt": "a", "completion": ["b"]}, "wrong type", "expected text in column 'completion', got list ['b']"),
        ({"prompt": 1, "completion": "b"}, "wrong type", "expected text in column 'prompt', got int 1"),
        ({"prompt": "a", "completion": " \n"}, "empty completion", "expected text in column 'completion', got ' \\n'"),
        ({"text": ""}, "empty text", "expected text in column 'text', got ''"),
        (
            {"text": "a" * 64},
            "too long",
            "expected at most 64 tokens, got 66; raise --max_length (at most to the model's positions) or give --on_bad_record skip",
        ),
        ({"text": "a", "weight": "heavy"}, "wrong type", "expected a finite number >= 0 in column 'weight', got 'heavy'"),
        ({"text": "a", "weight": -1}, "wrong type", "expected a finite number >= 0 in column 'weight', got -1"),
        ({"question": "a"}, "missing column", "expected column 'prompt', got columns ['question']; "
         "rename with --dataset_map question=prompt"),
    ],
)  # fmt: skip
def test_bad_record_is_named_with_its_line(record, reason, message, caplog):
    with pytest.raises(BadRecord) as caught:
        one(record)
    assert str(caught.value) == f"data.jsonl:17: {message}"
    assert caught.value.reason == reason
    good = Record({"prompt": "a", "completion": "b"} if "text" not in record else {"text": "a"}, "data.jsonl", 18)
    examples = sft_examples([Record(record, "data.jsonl", 17), good, good], byte_tokenizer(), max_length=64, on_bad_record="skip")
    assert (len(examples.segments), examples.skipped_reasons) == (2, {reason: 1})
    assert "skipped: data.jsonl:17: " in caplog.text
    assert "on_bad_record" not in caplog.text  # no advice to give what was given


def test_token_over_the_vocabulary_is_named():
    with pytest.raises(BadRecord, match=r"data\.jsonl:17: token 258 at position 0 is over the vocabulary of 256") as caught:
        one({"text": "a"}, vocab_size=256)
    assert caught.value.reason == "over the vocabulary"
    assert one({"text": "a"}, vocab_size=260)


def test_bad_prompts_are_named(tmp_path):
    name = write(tmp_path / "p.jsonl", {"prompt": "a" * 9}, {"prompt": "c"}, {"prompt": ["x"]}, {"answer": "d"}, "{")
    prompts = prompt_examples(load_records(name), byte_tokenizer(), max_prompt_length=8, on_bad_record="skip")
    assert [p.index for p in prompts] == [1]
    assert prompts.skipped_reasons == {"too long": 1, "wrong type": 1, "missing column": 1, "invalid JSON": 1}
    with pytest.raises(BadRecord, match=r"p\.jsonl:1: expected at most 8 tokens, got 10; raise --max_prompt_length"):
        prompt_examples(load_records(name), byte_tokenizer(), max_prompt_length=8)


def test_skips_are_counted_and_logged(tmp_path, caplog):
    name = write(tmp_path / "d.jsonl", {"text": "a"}, "{bad", "[1]", {"text": 3}, "", {"text": "b"}, {"other": "c"})
    records = load_records(name)
    assert [r.line for r in records] == [1, 2, 3, 4, 6, 7], "blank lines are no records, but they count as lines"
    examples = sft_examples(records, byte_tokenizer(), max_length=9, on_bad_record="skip")
    assert examples.indices == [0, 4]
    assert examples.num_skipped == 4
    assert examples.skipped_reasons == {"invalid JSON": 2, "wrong type": 1, "missing column": 1}
    assert "skipped 4 of 6 records: 2 invalid JSON, 1 wrong type, 1 missing column" in caplog.text
    assert "d.jsonl:2: invalid JSON: Expecting property name enclosed in double quotes at column 2" in caplog.text
    assert "d.jsonl:3: invalid JSON: expected an object with columns, got list" in caplog.text


def test_nothing_left_is_an_error(tmp_path):
    name = write(tmp_path / "d.jsonl", {"text": ""})
    with pytest.raises(DataError, match=r"no record is left: 1 read, 1 skipped \(\{'empty text': 1\}\)"):
        sft_examples(load_records(name), byte_tokenizer(), max_length=9, on_bad_record="skip")


def test_tokenizer_without_eos_is_an_error():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        one({"prompt": "a", "completion": "b"}, tokenizer, on_bad_record="skip")


def test_misspelt_policy_is_an_error():
    with pytest.raises(DataError, match="expected error or skip, got 'skp'; did you mean skip"):
        one({"text": "a"}, on_bad_record="skp")


# files


ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2\n+2=", "completion": 'f"our'}, {"prompt": "é", "completion": "\u2028x"}]


def test_jsonl_and_json_know_their_lines(tmp_path):
    lines = load_records(write(tmp_path / "d.jsonl", *ROWS))
    pretty = tmp_path / "d.json"
    pretty.write_text(json.dumps(ROWS, indent=2))
    objects = load_records(str(pretty))
    assert lines == objects == ROWS
    assert [r.where for r in lines] == ["d.jsonl:1", "d.jsonl:2", "d.jsonl:3"]
    assert [r.line for r in objects] == [2, 6, 10]
    pretty.write_text("\ufeff" + "\n".join(map(json.dumps, ROWS)))
    assert load_records(str(pretty)) == ROWS, "objects one after another, with a byte-order mark"


def test_invalid_json_file_and_utf8_are_bad_records(tmp_path):
    broken = tmp_path / "d.json"
    broken.write_text('[{"text": "a"},\n{"text": }]')
    records = load_records(str(broken))
    assert [(r.line, r.error) for r in records] == [
        (1, ""),
        (2, "invalid JSON: Expecting value at column 10; nothing after it can be read"),
    ]
    binary = tmp_path / "d.jsonl"
    binary.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert load_records(str(binary))[1].error == "invalid UTF-8: invalid start byte at byte 10"


def test_csv_counts_lines_through_quoted_newlines(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('prompt,completion\n1,2\n"a\nb",3\nonly\n4,5\n1,2,3\n')
    records = load_records(str(path))
    assert [r.line for r in records] == [2, 3, 5, 6, 7]
    assert records[1] == {"prompt": "a\nb", "completion": "3"}
    assert [r.error for r in records if r.error] == ["invalid CSV: expected 2 fields, got 1", "invalid CSV: expected 2 fields, got 3"]


def test_parquet_and_saved_data_sets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "d.parquet"))
    assert load_records(str(tmp_path / "d.parquet")) == ROWS
    table.save_to_disk(str(tmp_path / "one"))
    assert load_records(str(tmp_path / "one")) == ROWS
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "both"))
    assert [r.where for r in load_records(str(tmp_path / "both"))] == ["both:1", "both:2", "both:3"]
    assert load_records(str(tmp_path / "both"), split="test") == ROWS[:1]
    with pytest.raises(DataError, match=r"expected a split of \['train', 'test'\], got 'tset'; did you mean 'test'\?"):
        load_records(str(tmp_path / "both"), split="tset")


def test_max_samples_takes_the_front(tmp_path):
    name = write(tmp_path / "d.jsonl", *ROWS)
    assert load_records(name, max_samples=2) == ROWS[:2]
    assert len(load_records(name, max_samples=9)) == 3


def test_missing_files_name_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", *ROWS)
    with pytest.raises(DataError, match=r"no such file or folder; did you mean 'train\.jsonl'\?"):
        load_records(str(tmp_path / "trian.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="expected at least one record, got none"):
        load_records(str(tmp_path / "empty.jsonl"))
    (tmp_path / "data.tsv").write_text("a\tb")
    with pytest.raises(DataError, match=r"expected a file that ends in .*, got '.tsv'"):
        load_records(str(tmp_path / "data.tsv"))


# renames


def test_dataset_map_renames(tmp_path):
    name = write(tmp_path / "gsm.jsonl", {"question": "q", "answer": "a", "id": 1})
    assert parse_dataset_map(" question=prompt, answer=completion,") == {"question": "prompt", "answer": "completion"}
    assert load_records(name, columns=parse_dataset_map("question=prompt,answer=completion")) == [
        {"prompt": "q", "completion": "a", "id": 1}
    ]
    assert load_records(name, columns={"question": "answer", "answer": "question"})[0] == {"answer": "q", "question": "a", "id": 1}
    with pytest.raises(DataError, match=r"no column 'qestion' in gsm\.jsonl; nearest are \['question'\]"):
        load_records(name, columns={"qestion": "prompt"})
    with pytest.raises(DataError, match="has a column 'id' already; rename that one too"):
        load_records(name, columns={"question": "id"})


@pytest.mark.parametrize("text", ["question", "=prompt", "a=b,a=c", "a=c,b=c"])
def test_dataset_map_refuses_what_is_no_rename(text):
    with pytest.raises(DataError, match="--dataset_map"):
        parse_dataset_map(text)


# order


def test_order_gives_every_record_once_an_epoch():
    order = DataOrder(10, seed=3)
    seen = [i for _ in range(10) for i in order.next_batch(3)]
    epochs = [seen[k : k + 10] for k in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order.progress == 3.0
    assert [i for _ in range(10) for i in DataOrder(10, seed=3).next_batch(3)] != [
        i for _ in range(10) for i in DataOrder(10, seed=4).next_batch(3)
    ]


def test_order_unshuffled_keeps_the_file_order():
    assert DataOrder(4, shuffle=False).next_batch(6) == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("steps", [0, 1, 3, 5, 6, 11])
def test_order_resumes_where_it_stood(steps):
    whole = DataOrder(7, seed=5)
    expected = [whole.next_batch(3) for _ in range(steps + 9)][steps:]
    first = DataOrder(7, seed=5)
    for _ in range(steps):
        first.next_batch(3)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = DataOrder(7, seed=5)
    resumed.load_state_dict(state)
    assert [resumed.next_batch(3) for _ in range(9)] == expected


def test_order_epoch_batches_end_with_the_rest():
    order = DataOrder(7, seed=1)
    batches = list(order.epoch_batches(3))
    assert [len(b) for b in batches] == [3, 3, 1]
    assert Counter(i for b in batches for i in b) == Counter(range(7))
    assert (order.epoch, order.position) == (1, 0)


def test_order_refuses_another_runs_state():
    state = DataOrder(7, seed=1).state_dict()
    with pytest.raises(DataError, match="num_records=7, this run has 8"):
        DataOrder(8, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="seed=1, this run has 2"):
        DataOrder(7, seed=2).load_state_dict(state)
