"""Records of several sources: prompts conditioned on the source, losses weighed by it, and what users get wrong."""

import json
from dataclasses import replace

import pytest
from test_recipes import arguments, rows_of, task  # noqa: F401

from fastalign.data import Record
from fastalign.data.conditions import conditioned, parse_sources
from fastalign.recipes import sft
from fastalign.recipes.arguments import SupervisedArguments


def one(columns, weights=None, prefixes=None):
    return conditioned([Record(columns, "data.jsonl", 3)], weights or {}, prefixes or {})[0]


def test_a_sources_weight_multiplies_the_records_own():
    assert one({"prompt": "a", "source": "good"}, {"good": 0.5})["weight"] == 0.5
    assert one({"prompt": "a", "source": "good", "weight": 3}, {"good": 0.5})["weight"] == 1.5
    assert "weight" not in one({"prompt": "a", "source": "good"}, prefixes={"good": "x"})


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_sources_words_go_before_the_first_user_message(column):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "user", "content": "r"}]
    found = one({column: messages, "source": "a"}, prefixes={"a": "A: "})
    assert [m["content"] for m in found[column]] == ["s", "A: q", "r"]
    assert [m["content"] for m in messages] == ["s", "q", "r"], "the record that was read stays as it was"


def test_a_sources_words_go_before_plain_text():
    assert one({"prompt": "q", "completion": "c", "source": "a"}, prefixes={"a": "A: "})["prompt"] == "A: q"
    assert one({"text": "t", "source": "a"}, prefixes={"a": "A: "})["text"] == "A: t"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": "q"}, "missing column: expected column 'source'"),
        ({"prompt": "q", "source": 3}, "wrong type: expected text in column 'source'"),
        ({"prompt": "q", "source": "c"}, "unknown source: expected one of the sources ['a', 'b']"),
        ({"messages": [{"role": "assistant", "content": "x"}], "source": "a"}, "wrong type: expected a user message"),
    ],
)
def test_what_a_record_lacks_is_noted_for_the_policy_on_bad_records(columns, words):
    assert one(columns, prefixes={"a": "A", "b": "B"}).error.startswith(words)


@pytest.mark.parametrize("entries", [["a"], ["=1"], ["a=1", "a=2"]])
def test_entries_are_name_and_value(entries):
    with pytest.raises(ValueError, match="--flag: "):
        parse_sources("--flag", entries)


def write(path, sources):
    lines = ({"prompt": f"{i:02d}+01=", "completion": f"{i + 1:03d}", "source": s} for i, s in enumerate(sources))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"dataset_name": str(path), "eval_dataset_name": "", "shuffle": False}


def conditional(task, folder, data, **own):  # noqa: F811
    args = arguments(task, folder, "sft", data=data, optim={"max_steps": 2}, batch={"per_device_train_batch_size": 4})
    return replace(args, supervised=SupervisedArguments(**own))


def test_a_source_of_weight_zero_changes_nothing_and_weights_reach_the_loss(task, tmp_path):  # noqa: F811
    data = write(tmp_path / "data.jsonl", "abab" * 2)
    sft.run(conditional(task, tmp_path / "zero", data, source_weights=["a=1", "b=0"]))
    sft.run(conditional(task, tmp_path / "only", write(tmp_path / "a.jsonl", "a.a." * 2), source_weights=["a=2", ".=0"]))
    assert [r["loss"] for r in rows_of(tmp_path / "zero")] == pytest.approx([r["loss"] for r in rows_of(tmp_path / "only")], rel=1e-5)
    sft.run(conditional(task, tmp_path / "plain", data))
    assert rows_of(tmp_path / "plain")[0]["loss"] != pytest.approx(rows_of(tmp_path / "zero")[0]["loss"], rel=1e-4)
    sft.run(conditional(task, tmp_path / "words", data, source_prompts=["a=1+", "b=2+"]))
    assert rows_of(tmp_path / "words")[0]["num_tokens"] == rows_of(tmp_path / "plain")[0]["num_tokens"] + 4 * 2


def test_an_unlisted_source_is_named_with_its_line_or_skipped(task, tmp_path):  # noqa: F811
    data = write(tmp_path / "data.jsonl", "aaca")
    with pytest.raises(ValueError, match=r"data\.jsonl:3: .*one of the sources \['a'\]"):
        sft.run(conditional(task, tmp_path / "out", data, source_weights=["a=1"]))
    plan = sft.run(
        replace(
            conditional(task, tmp_path / "out", data | {"on_bad_record": "skip"}, source_weights=["a=1"]),
            run=arguments(task, tmp_path / "out", "sft", run={"dry_run": True}).run,
        )
    )
    assert plan["records"] == 3
    with pytest.raises(ValueError, match="--source_weights a=x: expected a finite number"):
        sft.run(conditional(task, tmp_path / "out", data, source_weights=["a=x"]))
