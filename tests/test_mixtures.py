"""Several data sets: shares by weight, orders that resume, records that know their file."""

import json
from collections import Counter

import pytest

from fastalign import cli
from fastalign.data import BadRecord, DataError, DataOrder, MixtureOrder, load_parts, load_records
from fastalign.recipes import sft
from fastalign.recipes.flags import build, parse


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(sizes, index):
    """Which data set an index belongs to."""
    return next(k for k in range(len(sizes)) if index < sum(sizes[: k + 1]))


@pytest.mark.parametrize("sizes, weights", [([50, 50], [0.7, 0.3]), ([1000, 3], [1, 1]), ([5, 40, 9], [2, 5, 3]), ([7], [3])])
def test_mixture_keeps_every_share_at_every_draw(sizes, weights):
    order, drawn = MixtureOrder(sizes, weights, seed=3), Counter()
    for count in range(1, 400):
        drawn[source(sizes, order.next_batch(1)[0])] += 1
        for k, weight in enumerate(weights):
            assert abs(drawn[k] - count * weight / sum(weights)) <= max(len(sizes) - 1, 1e-9)


def test_mixture_gives_every_record_of_a_data_set_before_any_twice():
    order = MixtureOrder([4, 30], [1, 1], seed=1)
    seen = order.next_batch(60)
    small = [i for i in seen if i < 4]
    assert all(sorted(small[k : k + 4]) == [0, 1, 2, 3] for k in range(0, 28, 4))
    assert small[:4] != small[4:8] or small[4:8] != small[8:12], "epochs differ"
    assert sorted(i for i in seen if i >= 4) == list(range(4, 34))
    assert order.progress == 60 / 34


def test_mixture_is_the_seeds_and_of_one_data_set_is_its_order():
    draws = [MixtureOrder([9, 9], [2, 1], seed=seed).next_batch(30) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    first, second = ([i % 9 for i in draws[0] if i // 9 == k][:9] for k in (0, 1))
    assert first != second, "equal data sets are not drawn in step"
    assert MixtureOrder([9], [5.0], seed=4).next_batch(30) == DataOrder(9, seed=4).next_batch(30)
    assert MixtureOrder([2, 2], [1, 1], shuffle=False).next_batch(6) == [0, 2, 1, 3, 0, 2]


@pytest.mark.parametrize("steps", [0, 1, 3, 7, 20])
def test_mixture_resumes_where_it_stood(steps):
    make = lambda: MixtureOrder([7, 3], [0.6, 0.4], seed=5)  # noqa: E731
    whole = make()
    expected = [whole.next_batch(4) for _ in range(steps + 9)][steps:]
    first = make()
    for _ in range(steps):
        first.next_batch(4)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [resumed.next_batch(4) for _ in range(9)] == expected


def test_mixture_refuses_what_it_cannot_draw_from():
    for weights, words in (([1], "one weight a data set, 2, got 1"), ([1, 0], "numbers > 0"), ([1, float("nan")], "numbers > 0")):
        with pytest.raises(DataError, match=words):
            MixtureOrder([3, 3], weights)
    state = MixtureOrder([3, 3], [1, 1]).state_dict()
    with pytest.raises(DataError, match=r"weights \[1\.0, 1\.0\], this run has \[2\.0, 1\.0\]"):
        MixtureOrder([3, 3], [2, 1]).load_state_dict(state)
    with pytest.raises(DataError, match=r"sizes \[3, 3\], this run has \[3, 4\]"):
        MixtureOrder([3, 4], [1, 1]).load_state_dict(state)
    with pytest.raises(DataError, match="sizes None"):
        MixtureOrder([3, 4], [1, 1]).load_state_dict(DataOrder(7).state_dict())


def test_records_of_several_files_know_their_file(tmp_path):
    a = write(tmp_path / "a.jsonl", {"question": "q", "completion": "1"})
    b = write(tmp_path / "b.jsonl", {"prompt": "p", "completion": "2"}, {"prompt": "p", "completion": ""})
    parts = load_parts([a, b], columns={"question": "prompt"})
    assert parts == [[{"prompt": "q", "completion": "1"}], [{"prompt": "p", "completion": "2"}, {"prompt": "p", "completion": ""}]]
    assert [r.where for r in load_records([a, b], columns={"question": "prompt"})] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]
    assert [len(part) for part in load_parts([a, b], max_samples=1)] == [1, 1]
    with pytest.raises(DataError, match=r"no column 'qestion' .*nearest are \['question'"):
        load_parts([a, b], columns={"qestion": "prompt"})
    with pytest.raises(DataError, match="no such file"):
        load_parts([a, str(tmp_path / "c.jsonl")])


def test_flags_take_one_data_set_or_several(tmp_path):
    args = build("sft", parse("sft", ["--dataset_name", "a.jsonl", "b.jsonl", "--dataset_weights", "0.7", "0.3"]))
    assert args.data.dataset_name == ["a.jsonl", "b.jsonl"]
    assert args.data.dataset_weights == [0.7, 0.3]
    assert build("sft", parse("sft", ["--dataset_name", "a.jsonl"])).data.dataset_name == "a.jsonl"
    config = tmp_path / "c.yaml"
    config.write_text("dataset_name: [a.jsonl, b.jsonl]\n")
    assert build("sft", parse("sft", ["--config", str(config)])).data.dataset_name == ["a.jsonl", "b.jsonl"]


def test_missing_files_and_weights_elsewhere_are_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("{}")
    common = ["--model_name_or_path", str(tmp_path), "--dataset_name", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert cli.main(["sft", *common]) == 2
    assert "--dataset_name: there is no" in capsys.readouterr().err
    assert cli.main(["kto", *common, "--dataset_weights", "1", "2"]) == 2
    assert "--dataset_weights is for sft" in capsys.readouterr().err


def test_sft_mixes_formats_names_the_file_and_resumes_to_the_bit(tmp_path):
    from dataclasses import replace

    from test_recipes import arguments, rows_of

    from fastalign.recipes import arithmetic

    tokenizer = arithmetic.build_tokenizer()
    arithmetic.build_model(0, len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = write(tmp_path / "pairs.jsonl", *({"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(5)))
    texts = write(tmp_path / "texts.jsonl", *({"text": f"{n}+2={n + 2}"} for n in range(12)))
    data = {"dataset_name": [pairs, texts], "dataset_weights": [3.0, 1.0], "eval_dataset_name": "", "max_length": 16}
    whole = arguments(tmp_path, tmp_path / "whole", "sft", data=data)
    sft.run(whole)
    saving = arguments(tmp_path, tmp_path / "part", "sft", data=data, run={"save_steps": 2})
    sft.run(saving)
    for name in ("model.safetensors", "summary.json"):
        (tmp_path / "part" / name).unlink()
    sft.run(replace(saving, run=replace(saving.run, resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))))
    assert rows_of(tmp_path / "part") == rows_of(tmp_path / "whole")
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    write(tmp_path / "texts.jsonl", {"text": "1"}, {"text": ""})
    with pytest.raises(BadRecord, match=r"texts\.jsonl:2: expected text in column 'text'"):
        sft.run(arguments(tmp_path, tmp_path / "bad", "sft", data=data))
