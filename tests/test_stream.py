"""Streamed data: bounded memory, a seeded order, a resume to the record."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from test_recipes import arguments, rows_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastalign import cli
from fastalign.data import BadRecord, DataError, Record, SegmentStream
from fastalign.data.examples import Limits
from fastalign.data.stream import CHUNK, HEAD, Reader, supervised_encoding
from fastalign.packing import conversation
from fastalign.recipes import arithmetic, sft


def numbers(count, opened=None):
    """Reads records 0 … count-1, and notes how many were read."""

    def read():
        for n in range(count):
            if opened is not None:
                opened.append(n)
            yield Record({"n": n}, "d.jsonl", n + 1)

    return read


def encode(records):
    """One tree a record; every seventh record is a bad one and left out."""
    return [conversation([r["n"], 0]) for r in records if r["n"] % 7 != 3]


def drawn(stream, count, batch=5):
    return [segment.ids[0] for _ in range(count) for segment in stream.next_batch(batch)]


@pytest.mark.parametrize("window", [1, 10, 256, 300, 1000, 5000])
def test_stream_gives_every_good_record_once_an_epoch(window):
    good = [n for n in range(1000) if n % 7 != 3]
    stream = SegmentStream(numbers(1000), encode, window=window, seed=1)
    epochs = [drawn(stream, len(good), 1) for _ in range(3)]
    assert all(Counter(epoch) == Counter(good) for epoch in epochs)
    if window > 1:
        assert epochs[0] != epochs[1] != epochs[2]
    assert stream.num_records == 1000
    for place, n in enumerate(epochs[0]):
        assert abs(place - good.index(n)) <= window, "nothing moves further than its window"


def test_stream_is_the_seeds_and_unshuffled_keeps_the_order():
    first, same, other = (drawn(SegmentStream(numbers(600), encode, window=200, seed=seed), 60) for seed in (3, 3, 4))
    assert first == same != other
    assert drawn(SegmentStream(numbers(20), encode, window=6, shuffle=False), 3, 6)[:17] == [n for n in range(20) if n % 7 != 3]


def test_stream_holds_a_window_and_no_more():
    opened: list[int] = []
    stream = SegmentStream(numbers(100_000, opened), encode, window=500)
    for count in range(1, 200):
        given = len(drawn(stream, 1, 20)) and 20 * count
        assert len(opened) <= given * 7 / 6 + 500 + 2
        assert len(stream._window) <= 500
        assert len(stream._chunk) <= CHUNK


@pytest.mark.parametrize("steps", [0, 1, 30, 51, 52, 150, 171, 172, 400])
@pytest.mark.parametrize("window", [64, 700])
def test_stream_resumes_where_it_stood(steps, window):
    make = lambda: SegmentStream(numbers(1000), encode, window=window, seed=5)  # noqa: E731
    whole = make()
    drawn(whole, steps)
    state, progress = json.loads(json.dumps(whole.state_dict())), whole.progress
    resumed = make()
    resumed.load_state_dict(state)
    assert resumed.progress == progress
    assert drawn(resumed, 300) == drawn(whole, 300)
    assert resumed.state_dict() == whole.state_dict()


def test_stream_progress_grows():
    stream = SegmentStream(numbers(1000), encode, window=300)
    seen = []
    for _ in range(600):
        stream.next_batch(5)
        seen.append(stream.progress)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert int(seen[-1]) == 600 * 5 // 857


def test_stream_refuses_what_it_cannot_go_on_from():
    state = SegmentStream(numbers(100), encode, window=10, seed=1).state_dict()
    with pytest.raises(DataError, match="window=10, this run has 20"):
        SegmentStream(numbers(100), encode, window=20, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="at least 1 record, got 0"):
        SegmentStream(numbers(100), encode, window=0)
    with pytest.raises(DataError, match="a pass over the 900 records of the streamed data set gave none"):
        SegmentStream(numbers(900), lambda records: [], window=100).next_batch(1)
    with pytest.raises(DataError, match="a pass over the 0 records"):
        SegmentStream(numbers(0), encode, window=100).next_batch(1)


def test_reader_renames_chains_and_refuses_whole_files(tmp_path):
    for name, column in (("a.jsonl", "question"), ("b.jsonl", "prompt")):
        (tmp_path / name).write_text("".join(json.dumps({column: f"{name}{n}"}) + "\n" for n in range(3)))
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    read = Reader(names, columns={"question": "prompt"}, max_samples=2)
    for _ in range(2):
        assert [(r["prompt"], r.where) for r in read()] == [(f"{n}{k}", f"{n}:{k + 1}") for n in ("a.jsonl", "b.jsonl") for k in (0, 1)]
    with pytest.raises(DataError, match=r"no column 'qestion' .*'question'"):
        Reader(names, columns={"qestion": "prompt"})
    with pytest.raises(DataError, match=r"c\.json can only be read as a whole; write it as \.jsonl"):
        Reader(["c.json"])
    assert HEAD >= 2


def test_each_data_set_of_a_stream_keeps_its_format(task, tmp_path):
    chat = tmp_path / "chat.jsonl"
    turns = [[{"role": "user", "content": f"{n}+1="}, {"role": "assistant", "content": str(n + 1)}] for n in range(10)]
    chat.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    read = Reader([str(task / "sft.jsonl"), str(chat)])
    trees = supervised_encoding(read.head, tokenizer, Limits(64, "--max_length", len(tokenizer)), on_bad_record="error")(list(read())[::-1])
    assert len(trees) == 40
    assert trees[0].ids != trees[-1].ids
    assert all(any(tree.scored) for tree in trees)


# runs


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A tiny Llama and 30 sums."""
    root = tmp_path_factory.mktemp("stream")
    tokenizer = arithmetic.build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)).save_pretrained(
        root / "model"
    )
    tokenizer.save_pretrained(root / "model")
    rows = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(30)]
    (root / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def streamed(task, output, **changes):
    data = {"streaming": True, "stream_window": 8, "eval_dataset_name": "", **changes.pop("data", {})}
    return arguments(task, output, "sft", data=data, **changes)


def test_streamed_run_equals_the_one_in_memory(task, tmp_path):
    sft.run(streamed(task, tmp_path / "stream", data={"shuffle": False}))
    sft.run(arguments(task, tmp_path / "memory", "sft", data={"shuffle": False, "eval_dataset_name": ""}))
    ours, expected = ([{k: v for k, v in row.items() if k != "epoch"} for row in rows_of(tmp_path / run)] for run in ("stream", "memory"))
    assert ours == expected
    assert (tmp_path / "stream/model.safetensors").read_bytes() == (tmp_path / "memory/model.safetensors").read_bytes()


def test_streamed_run_resumes_to_the_bit(task, tmp_path):
    sft.run(streamed(task, tmp_path / "whole"))
    saving = streamed(task, tmp_path / "part", run={"save_steps": 3})
    sft.run(saving)
    for name in ("model.safetensors", "summary.json"):
        (tmp_path / "part" / name).unlink()
    sft.run(replace(saving, run=replace(saving.run, resume_from_checkpoint=str(tmp_path / "part/checkpoint-3"))))
    assert rows_of(tmp_path / "part") == rows_of(tmp_path / "whole")
    assert (tmp_path / "part/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_streamed_run_shows_its_plan_and_names_what_is_wrong(task, tmp_path, capsys):
    plan = sft.run(streamed(task, tmp_path / "none", run={"dry_run": True}))
    assert plan["records"] == "streamed, in windows of 8"
    assert "⟦" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give --max_steps"):
        sft.run(streamed(task, tmp_path / "a", optim={"max_steps": -1}))
    with pytest.raises(ValueError, match="--dataset_weights needs them in memory"):
        sft.run(streamed(task, tmp_path / "b", data={"dataset_weights": [1.0]}))
    bad = tmp_path / "bad.jsonl"
    bad.write_text((task / "sft.jsonl").read_text() + '{"prompt": "1", "completion": ""}\n')
    with pytest.raises(BadRecord, match=r"bad\.jsonl:31: expected text in column 'completion'"):
        sft.run(streamed(task, tmp_path / "c", data={"dataset_name": str(bad)}))
    sft.run(streamed(task, tmp_path / "d", data={"dataset_name": str(bad), "on_bad_record": "skip"}))


def test_other_commands_do_not_stream(tmp_path, capsys):
    assert cli.main(["kto", "--model_name_or_path", str(tmp_path), "--dataset_name", str(tmp_path), "--streaming"]) == 2
    assert "--streaming is for sft" in capsys.readouterr().err
