"""fastalign critique: what is asked and written, principles by the seed, AI feedback against plain log-probs, breaks and errors."""

import json

import pytest
import torch
from tiny_models import write_chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign import cli
from fastalign.data import load_records, pair_examples, sft_examples
from fastalign.generation import Engine, SamplingParams
from fastalign.models.load import load_causal_lm, load_tokenizer
from fastalign.recipes import principles

ASKS = ["Say hello.", "What is two and two?", "Name a colour.", "Why?"]
OWN = {"critique": "What is wrong?", "revision": "Mend it.", "choice": "Which is kinder?"}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("critique")
    write_chat_model(root / "model", seed=4)
    chats = [{"prompt": [{"role": "user", "content": text}], "other": 1} for text in ASKS]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (root / "texts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ASKS))
    (root / "own.yaml").write_text(json.dumps({"principles": [OWN]}))
    return root


def critique(task, output, *more, data="chats.jsonl"):
    flags = ["--model_name_or_path", str(task / "model"), "--dataset_name", str(task / data), "--output_dir", str(output)]
    return cli.main(["critique", *flags, "--device", "cpu", "--max_completion_length", "8", *more])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def greedy_reply(task, messages):
    tokenizer = load_tokenizer(str(task / "model"))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    engine = Engine(load_causal_lm(str(task / "model")), tokenizer)
    return engine.generate([ids], SamplingParams(temperature=0.0, max_tokens=8))[0].outputs[0].text


def test_answer_critique_and_revision_are_one_conversation(task, tmp_path, capsys):
    flags = ["--principles", str(task / "own.yaml"), "--num_rounds", "2", "--temperature", "0", "--finished_only", "false"]
    assert critique(task, tmp_path, *flags) == 0
    items = lines_of(tmp_path / "transcripts.jsonl")
    assert [item["prompt"][0]["content"] for item in items] == ASKS
    begin = items[0]["prompt"]
    answer = items[0]["answer"]["text"]
    assert answer == greedy_reply(task, begin)
    for step in items[0]["rounds"]:
        turns = [*begin, {"role": "assistant", "content": answer}, {"role": "user", "content": "What is wrong?"}]
        assert step["critique"]["text"] == greedy_reply(task, turns)
        turns += [{"role": "assistant", "content": step["critique"]["text"]}, {"role": "user", "content": "Mend it."}]
        assert step["revision"]["text"].strip() == greedy_reply(task, turns).strip()
        answer = step["revision"]["text"]
    records, pairs = lines_of(tmp_path / "sft.jsonl"), lines_of(tmp_path / "pairs.jsonl")
    assert f"{len(records)} records and {len(pairs)} pairs of 4 prompts" in capsys.readouterr().err
    assert records[0] == {"prompt": begin, "completion": [{"role": "assistant", "content": answer}]}
    changed = [item for item in items if item["rounds"] and item["rounds"][-1]["revision"]["text"] != item["answer"]["text"]]
    assert [pair["rejected"][0]["content"] for pair in pairs] == [item["answer"]["text"] for item in changed]
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    assert len(sft_examples(load_records(str(tmp_path / "sft.jsonl")), tokenizer, max_length=500).segments) == len(records)
    assert len(pair_examples(load_records(str(tmp_path / "pairs.jsonl")), tokenizer, max_length=500).trees) == len(pairs)


def test_plain_text_is_asked_in_plain_text(task, tmp_path):
    flags = ["--principles", str(task / "own.yaml"), "--temperature", "0", "--finished_only", "false"]
    assert critique(task, tmp_path, *flags, data="texts.jsonl") == 0
    item = lines_of(tmp_path / "transcripts.jsonl")[1]
    engine = Engine(load_causal_lm(str(task / "model")), load_tokenizer(str(task / "model")))
    params = SamplingParams(temperature=0.0, max_tokens=8)
    text = ASKS[1] + item["answer"]["text"] + "\n\nCritique request: What is wrong?\n\nCritique:"
    (step,) = item["rounds"]
    assert step["critique"]["text"] == engine.generate([text], params)[0].outputs[0].text
    text += f" {step['critique']['text'].strip()}\n\nRevision request: Mend it.\n\nRevision:"
    assert step["revision"]["text"].strip() == engine.generate([text], params)[0].outputs[0].text.strip()
    assert lines_of(tmp_path / "sft.jsonl")[1] == {"prompt": ASKS[1], "completion": step["revision"]["text"]}


def lines_without_scores(path):
    """The objects of a file without their probabilities, and these."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return lines, [line.pop(name) for line in lines for name in ("score", "probability") if name in line]


@pytest.mark.parametrize("feedback", ["revise", "compare"])
def test_a_broken_off_run_goes_on_to_the_same_data(task, tmp_path, feedback):
    flags = ["--feedback", feedback, "--finished_only", "false", "--max_num_seqs", "1"]
    assert critique(task, tmp_path / "whole", *flags) == 0
    assert critique(task, tmp_path / "part", *flags) == 0
    path = tmp_path / "part" / "transcripts.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:1]) + kept[1][:40])
    (tmp_path / "part" / "pairs.jsonl").unlink()
    assert critique(task, tmp_path / "part", *flags) == 0
    for name in ("transcripts.jsonl", "sft.jsonl", "pairs.jsonl"):
        part, whole = (lines_without_scores(tmp_path / folder / name) for folder in ("part", "whole"))
        assert part[0] == whole[0]
        assert part[1] == pytest.approx(whole[1], abs=1e-6), "on plain torch a probability depends on its batch in the last bits"
    assert (tmp_path / "whole" / "pairs.jsonl").read_text()


def test_a_critique_without_a_fault_ends_the_rounds(task, tmp_path):
    flags = ["--num_rounds", "3", "--temperature", "0", "--finished_only", "false"]
    critique(task, tmp_path / "all", "--principles", str(task / "own.yaml"), *flags)
    item = lines_of(tmp_path / "all" / "transcripts.jsonl")[0]
    assert item["ended"] == "rounds"
    first = item["rounds"][0]["critique"]["text"]
    (tmp_path / "stop.yaml").write_text(json.dumps({"principles": [OWN], "stop": first}))
    critique(task, tmp_path / "some", "--principles", str(tmp_path / "stop.yaml"), *flags)
    stopped = lines_of(tmp_path / "some" / "transcripts.jsonl")[0]
    assert (stopped["ended"], len(stopped["rounds"]), stopped["rounds"][0]["revision"]) == ("stop", 1, None)
    refined = {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in lines_of(tmp_path / "some" / "sft.jsonl")}
    assert refined[ASKS[0]] == item["answer"]["text"]
    assert ASKS[0] not in {row["prompt"][0]["content"] for row in lines_of(tmp_path / "some" / "pairs.jsonl")}


def test_a_conversation_without_room_makes_no_data(task, tmp_path, caplog):
    (tmp_path / "long.yaml").write_text(json.dumps({"principles": [OWN | {"revision": "x" * 2100}]}))
    assert critique(task, tmp_path / "out", "--principles", str(tmp_path / "long.yaml"), "--finished_only", "false") == 0
    assert {item["ended"] for item in lines_of(tmp_path / "out" / "transcripts.jsonl")} <= {"length", "empty"}
    assert (tmp_path / "out" / "sft.jsonl").read_text() == ""
    assert "pass the model's 2048" in caplog.text


def test_the_preferred_answer_is_the_one_whose_letter_is_likelier(task, tmp_path):
    flags = ["--feedback", "compare", "--principles", str(task / "own.yaml"), "--finished_only", "false"]
    assert critique(task, tmp_path, *flags) == 0
    items, pairs = lines_of(tmp_path / "transcripts.jsonl"), lines_of(tmp_path / "pairs.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(task / "model").double().eval(), AutoTokenizer.from_pretrained(task / "model")
    asked = principles.load_principles(str(task / "own.yaml")).principles[0].choice
    expected = []
    for item in items:
        shares = []
        for order in ([0, 1], [1, 0]):
            a, b = (item["answers"][k]["text"] for k in order)
            question = f"[Question]\n{item['prompt'][0]['content']}\n\n"
            question += f"[Answer A]\n{a}\n[End of answer A]\n\n[Answer B]\n{b}\n[End of answer B]\n\n"
            question += f"{asked} Judge what is said, not how long it is or who may have said it. The order of the answers is arbitrary."
            turn = [{"role": "user", "content": f"{question} Reply with A or B alone."}]
            ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            letters = logits[[tokenizer.encode(letter)[0] for letter in "AB"]].softmax(0).tolist()
            shares.append(letters[order.index(0)])
        expected.append(sum(shares) / 2)
        assert item["score"] == pytest.approx(expected[-1], abs=1e-5)
    assert len(pairs) == 4
    for item, pair, share in zip(items, pairs, expected, strict=True):
        assert pair["probability"] == pytest.approx(max(share, 1 - share), abs=1e-5)
        assert pair["chosen"][0]["content"] == item["answers"][share < 0.5]["text"]
        assert pair["rejected"][0]["content"] == item["answers"][share > 0.5]["text"]
    bound = sorted(pair["probability"] for pair in pairs)[1]
    assert critique(task, tmp_path, *flags, "--min_probability", str(bound + 1e-9)) == 0  # nothing is sampled anew
    assert lines_of(tmp_path / "transcripts.jsonl") == items
    assert lines_of(tmp_path / "pairs.jsonl") == [pair for pair in pairs if pair["probability"] > bound]


def test_without_principles_it_refines_until_no_fault_is_found(task, tmp_path):
    assert critique(task, tmp_path, "--temperature", "0", "--finished_only", "false") == 0
    item = lines_of(tmp_path / "transcripts.jsonl")[0]
    (principle,) = principles.SELF_REFINE.principles
    turns = [*item["prompt"], {"role": "assistant", "content": item["answer"]["text"]}, {"role": "user", "content": principle.critique}]
    assert item["rounds"][0]["critique"]["text"] == greedy_reply(task, turns)
    assert principles.SELF_REFINE.ends(f"Well: {principles.NO_FAULT}.")
    assert principles.NO_FAULT in principle.critique


def test_principles_are_drawn_by_the_seed(tmp_path):
    (tmp_path / "p.yaml").write_text("principles:\n- Be kind.\n- Be brief.\n- {critique: c, revision: r}\nstop: FINE\n")
    found = principles.load_principles(str(tmp_path / "p.yaml"))
    assert "Be kind." in found.principles[0].critique
    assert found.principles[2].choice
    draws = [found.draw(0, prompt, number) for prompt in range(8) for number in range(2)]
    assert draws == [found.draw(0, prompt, number) for prompt in range(8) for number in range(2)]
    assert len(set(draws)) == 3
    assert draws != [found.draw(1, prompt, number) for prompt in range(8) for number in range(2)]
    assert found.ends("It is FINE.")
    assert not principles.Constitution(found.principles).ends("It is FINE.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("principle: x", "unknown key principle; did you mean principles"),
        ("principles: []", "expected principles, a list of texts"),
        ("principles: ['']", "principle 1: expected a text, or critique, revision and choice"),
        ("principles: [a, {critique: c}]", "principle 2: expected a revision beside critique"),
        ("principles: [{critic: c}]", "principle 1: unknown key critic; did you mean critique"),
        ("principles: [{critique: 3, revision: r}]", "principle 1: expected a text for critique, got 3"),
    ],
)
def test_bad_principles_are_named(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        principles.load_principles(str(tmp_path / "p.yaml"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--feedback", "compare", "--temperature", "0"], "two greedy answers are the same"),
        (["--judge", "judge:model=self"], "--judge compares answers: add --feedback compare"),
        (["--feedback", "compare", "--min_probability", "0.3"], "--min_probability must be between 0.5 and 1, got 0.3"),
        (["--num_rounds", "0"], "num_rounds must be > 0"),
        (["--principles", "none.yaml"], "there is no file none.yaml"),
        (["--feedback", "compare", "--judge", "judge:model=self,template=grade"], "expected a template of kind compare or choose"),
    ],
)
def test_critique_says_what_is_wrong(task, tmp_path, capsys, flags, message):
    assert critique(task, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


def test_another_runs_folder_is_refused(task, tmp_path, capsys):
    assert critique(task, tmp_path, "--max_samples", "1") == 0
    assert critique(task, tmp_path, "--max_samples", "1", "--seed", "1") == 2
    assert "holds a critique with other seed; add --overwrite_output_dir" in capsys.readouterr().err
    assert critique(task, tmp_path, "--max_samples", "1", "--seed", "1", "--overwrite_output_dir") == 0
