"""The generate command: what it writes, and that a broken-off run goes on."""

import json

import pytest
from tiny_models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastalign.recipes import generate
from fastalign.recipes.arguments import DataArguments, GenerateArguments, ModelArguments, SamplingArguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and a tokenizer of one token a character, in Hugging Face format."""
    path = tmp_path_factory.mktemp("model")
    llama(eos_token_id=None).save_pretrained(path)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(32 + i): 3 + i for i in range(95)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(path)
    return str(path)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": i}) + "\n" for i, p in enumerate(["one", "two", "one", "three"])))
    return DataArguments(dataset_name=str(path))


def run(folder, data, output, **options):
    sampling = SamplingArguments(max_completion_length=6, max_num_seqs=1)
    generate.run(ModelArguments(folder), data, sampling, GenerateArguments(str(output), num_samples=2, **options))
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_generate_writes_one_object_a_prompt(folder, data, tmp_path):
    rows = run(folder, data, tmp_path / "new" / "out.jsonl", logprobs=True)
    assert [(row["prompt"], row["answer"]) for row in rows] == [("one", 0), ("two", 1), ("one", 2), ("three", 3)]
    for row in rows:
        assert len(row["completions"]) == 2
        for completion in row["completions"]:
            assert 1 <= len(completion["token_ids"]) == len(completion["logprobs"]) == len(completion["raw_logprobs"]) <= 6
            assert completion["finish_reason"] in ("stop", "length")
    assert rows[0]["completions"] != rows[2]["completions"]  # equal prompts draw with different keys


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_generate_goes_on_where_it_stopped(folder, data, tmp_path, kept, capsys):
    whole = run(folder, data, tmp_path / "whole.jsonl")
    broken = tmp_path / "broken.jsonl"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    broken.write_text("".join(lines[:kept]) + '{"prompt": "tw')
    assert run(folder, data, broken) == whole
    assert (f"{kept} of 4 prompts are in" in capsys.readouterr().err) == (kept > 0)


def test_generate_to_standard_output(folder, capsys):
    generate.run(ModelArguments(folder), DataArguments(), SamplingArguments(max_completion_length=2), GenerateArguments(prompt=["a", "b"]))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "b"]
    assert set(rows[0]["completions"][0]) == {"text", "finish_reason"}


@pytest.mark.parametrize("text", ['{"a": 1}', '{"prompt": "a"}\n', "a note", '[{"prompt": 1}]'])
def test_generate_leaves_another_files_only_line_alone(folder, data, tmp_path, text):
    other = tmp_path / "notes.json"
    other.write_text(text)
    with pytest.raises(ValueError, match="is it another file"):
        run(folder, data, other)
    assert other.read_text() == text


def test_generate_names_a_prompt_that_is_no_text_or_too_long(folder, data, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "note": "\ud800"}) + "\n" for p in ("one", "a\ud800", "o" * 5000)))
    with pytest.raises(ValueError, match=r"odd.jsonl:2: column 'prompt' is no text: half of a surrogate pair at character 1"):
        run(folder, DataArguments(dataset_name=str(path)), tmp_path / "out.jsonl")
    rows = run(folder, DataArguments(dataset_name=str(path), on_bad_record="skip"), tmp_path / "out.jsonl")
    assert [(row["prompt"], row["note"]) for row in rows] == [("one", "\ud800")]


def test_generate_refuses_a_file_that_is_not_its_own(folder, data, tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("buy milk\n")
    with pytest.raises(ValueError, match="line 1 is no object with a prompt"):
        run(folder, data, other)
    assert other.read_text() == "buy milk\n"
