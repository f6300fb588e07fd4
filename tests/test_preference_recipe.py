"""`fastalign dpo` and `kto` end to end on tiny models: every row, options, edge cases, bad arguments."""

import json
import math
from pathlib import Path

import pytest
import torch
from preference_runs import RECIPES, arguments, finite, rows_of, without_report, write, write_task
from transformers import AutoModelForCausalLM

from fastalign.losses.preference import PREFERENCE
from fastalign.losses.unpaired import UNPAIRED
from fastalign.recipes import arithmetic, preference, unpaired


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_report(monkeypatch)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.mark.parametrize("loss", sorted(PREFERENCE))
def test_every_row_of_pairs_learns(task, tmp_path, loss):
    preference.run(arguments(task, tmp_path, preference={"loss": [loss]}))
    rows = rows_of(tmp_path)
    assert finite(rows)
    lower = rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    assert lower or rows[-1]["eval/rewards/margins"] > rows[0]["eval/rewards/margins"] + 1e-3
    expected = "loss grad_norm learning_rate epoch num_tokens entropy rewards/chosen rewards/rejected rewards/margins rewards/accuracies "
    expected += "logps/chosen logps/rejected" + (" nll_loss log_odds_ratio" if PREFERENCE[loss].metrics else "")
    assert set(expected.split()) <= set(rows[1])


@pytest.mark.parametrize("loss", sorted(UNPAIRED))
def test_every_row_of_completions_learns(task, tmp_path, loss):
    unpaired.run(arguments(task, tmp_path, "kto", unpaired={"loss": loss}))
    rows = rows_of(tmp_path)
    assert finite(rows)
    assert rows[-1]["eval/rewards/margins"] > rows[0]["eval/rewards/margins"] + 1e-3
    expected = "loss grad_norm learning_rate epoch num_tokens rewards/chosen rewards/rejected rewards/margins rewards/accuracies "
    expected += "logps/chosen logps/rejected" + (" kl" if "z_ref" in UNPAIRED[loss].options else "")
    assert set(expected.split()) <= set(rows[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"preference": {"loss": ["dpo", "sft"], "loss_weights": [0.8, 0.2]}},
        {"preference": {"loss": ["aot", "bco_pair", "orpo"]}},
        {"preference": {"f_divergence_type": "js"}},
        {"preference": {"f_divergence_type": "alpha", "f_alpha_divergence_coef": 0.3, "loss": ["dpo", "sft"]}},
        {"preference": {"ld_alpha": 0.5}},
        {"preference": {"use_weighting": True}},
        {"preference": {"label_smoothing": 0.1, "beta": 0.3}},
        {"preference": {"loss": ["simpo"]}, "options": {"gamma": 0.3}},
        {"model": {"use_peft": True, "lora_r": 4}},
        {"model": {"gradient_checkpointing": True}},
    ],
    ids=lambda changes: " ".join(f"{k}" for part in changes.values() for k in part),
)
def test_options_of_pairs_learn(task, tmp_path, changes):
    preference.run(arguments(task, tmp_path, **changes))
    rows = rows_of(tmp_path)
    assert finite(rows)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]


@pytest.mark.parametrize("loss", sorted(PREFERENCE))
def test_equal_completions_and_certain_ones_stay_finite(task, tmp_path, loss):
    """Chosen and rejected are the same, and the model is all but certain of them (p within 1e-6 of 1)."""
    model = AutoModelForCausalLM.from_pretrained(task / "model")
    with torch.no_grad():
        model.model.norm.weight.fill_(0.0)  # logits are 0 then, whatever the input
        model.lm_head.weight.zero_()
        model.model.norm.weight[0] = 300.0
        model.lm_head.weight[2, 0] = model.lm_head.weight[3, 0] = 300.0
    model.save_pretrained(tmp_path / "sure")
    arithmetic.build_tokenizer().save_pretrained(tmp_path / "sure")
    data = write(tmp_path / "same.jsonl", [{"prompt": f"{i}+1=", "chosen": "0", "rejected": "0"} for i in range(4)])
    changes = {"data": {"dataset_name": data, "eval_dataset_name": data}, "model": {"model_name_or_path": str(tmp_path / "sure")}}
    preference.run(arguments(task, tmp_path / "out", preference={"loss": [loss]}, batch={"per_device_train_batch_size": 4}, **changes))
    rows = rows_of(tmp_path / "out")
    assert finite(rows)
    assert all(row["skipped_updates"] == 0 for row in rows if "loss" in row)


def test_bad_records_stop_the_run_or_are_skipped(task, tmp_path):
    good = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    bad = [{"prompt": "1" * 60, "chosen": "2", "rejected": "3"}, {"prompt": "1+1=", "chosen": "", "rejected": "3"}]
    data = write(tmp_path / "bad.jsonl", [good, *bad, good])
    changes = {"data": {"dataset_name": data, "eval_dataset_name": ""}, "optim": {"max_steps": 1}}
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: expected at most 48 tokens"):
        preference.run(arguments(task, tmp_path / "a", **changes))
    changes["data"]["on_bad_record"] = "skip"
    preference.run(arguments(task, tmp_path / "a", **changes))
    unpaired.run(arguments(task, tmp_path / "b", "kto", **changes))
    assert finite(rows_of(tmp_path / "a"))


def test_margins_are_read_or_refused(task, tmp_path):
    data = {"dataset_name": str(task / "margins.jsonl"), "eval_dataset_name": ""}
    preference.run(arguments(task, tmp_path / "a", data=data, optim={"max_steps": 1}))
    expected = sum(math.log1p(math.exp(i / 10)) for i in range(10)) / 10  # the policy is its reference: -log σ(-margin)
    assert rows_of(tmp_path / "a")[0]["loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="--dataset_map margin="):
        preference.run(arguments(task, tmp_path / "b", data=data, preference={"loss": ["ipo"]}))


def test_soft_labels_are_read_or_refused(task, tmp_path):
    rows = [json.loads(line) for line in (task / "pairs.jsonl").read_text().splitlines()]
    soft = write(tmp_path / "soft.jsonl", [row | {"probability": 0.6 + 0.05 * (i % 8)} for i, row in enumerate(rows)])
    sure = write(tmp_path / "sure.jsonl", [row | {"probability": 1.0} for row in rows])
    data = {"eval_dataset_name": ""}
    found = {}
    for name, path in (("soft", soft), ("sure", sure), ("none", str(task / "pairs.jsonl"))):
        preference.run(arguments(task, tmp_path / name, data=data | {"dataset_name": path}, optim={"max_steps": 3}))
        found[name] = [row["loss"] for row in rows_of(tmp_path / name)]
    assert found["sure"] == pytest.approx(found["none"], rel=1e-6)
    assert found["soft"][0] == pytest.approx(math.log(2), rel=1e-6)  # whatever the labels: the policy is its reference
    assert abs(found["soft"][-1] - found["none"][-1]) > 1e-5
    data["dataset_name"] = soft
    with pytest.raises(ValueError, match="--dataset_map probability="):
        preference.run(arguments(task, tmp_path / "b", data=data, preference={"loss": ["ipo"]}))
    with pytest.raises(ValueError, match="--dataset_map probability="):  # a part that has no soft labels
        preference.run(arguments(task, tmp_path / "b", data=data, preference={"loss": ["dpo", "slic"]}))
    with pytest.raises(ValueError, match="takes the place of --label_smoothing"):
        preference.run(arguments(task, tmp_path / "c", data=data, preference={"label_smoothing": 0.1}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preference": {"loss": ["dppo"]}}, "did you mean dpo"),
        ({"preference": {"loss": ["sigmoid"]}}, "what TRL calls sigmoid is dpo"),
        ({"preference": {"loss": ["dpo", "dpo"]}}, "different rows"),
        ({"preference": {"loss": ["dpo", "sft"], "loss_weights": [1.0]}}, "one a loss"),
        ({"preference": {"loss": ["sft"], "beta": 0.1}}, "--beta: sft reads no beta"),
        ({"preference": {"loss": ["simpo"], "f_divergence_type": "js"}}, "reads no divergence"),
        ({"preference": {"beta": 0.0}}, "beta must be > 0"),
        ({"options": {"gamma": 1.0}}, "--loss.gamma: dpo reads no gamma"),
        ({"preference": {"loss": ["aot"]}, "options": {"matched": 1.0}}, "reads no matched"),
        ({"preference": {"loss": ["dpo", "aot"], "use_weighting": True}}, "aot compares completions of different pairs"),
        ({"options": {"beta": "much"}}, "expected a number"),
        ({"preference": {"loss": ["exo_pair"], "label_smoothing": 0.0}}, "label_smoothing must lie between"),
        ({"preference": {"loss": ["simpo"]}, "reference": {"ref_model_name_or_path": "other"}}, "simpo reads no reference; leave it out"),
    ],
)
def test_bad_arguments_of_pairs_are_named(task, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        preference.run(arguments(task, tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unpaired": {"loss": "kot"}}, "did you mean kto"),
        ({"options": {"gamma": 1.0}}, "--loss.gamma"),
        ({"unpaired": {"desirable_weight": 0.0, "undesirable_weight": 0.0}}, "both 0"),
    ],
)
def test_bad_arguments_of_completions_are_named(task, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        unpaired.run(arguments(task, tmp_path, "kto", **changes))


@pytest.mark.parametrize("command", ["dpo", "kto"])
def test_dry_run_tells_loss_and_reference_and_trains_nothing(task, tmp_path, command):
    plan = RECIPES[command].run(arguments(task, tmp_path / "none", command, run={"dry_run": True}))
    assert plan["optimizer steps"] == 4
    assert plan["reference"] == "the model before training, scored once"
    assert plan["loss"].split()[0] in ("1", "kto")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["dpo", "kto"])
def test_model_report_and_samples_are_written(task, tmp_path, monkeypatch, command):
    monkeypatch.undo()
    summary = RECIPES[command].run(arguments(task, tmp_path, command, optim={"max_steps": 1}))
    shown = json.loads((tmp_path / "samples.json").read_text())
    assert len(shown) == 4
    assert set(shown[0]) == {"prompt", "before", "after"}
    assert "preference optimization" in (tmp_path / "report.html").read_text().lower()
    assert summary["eval/loss/before"] == rows_of(tmp_path)[0]["eval/loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_one_prompt_for_all_has_no_mismatched_pair(task, tmp_path):
    rows = [{"prompt": "1+1=", "completion": str(i), "label": i == 2} for i in range(6)]
    data = {"dataset_name": write(tmp_path / "one.jsonl", rows), "eval_dataset_name": ""}
    unpaired.run(arguments(task, tmp_path / "out", "kto", data=data, optim={"max_steps": 2}))
    assert [row["kl"] for row in rows_of(tmp_path / "out")] == [0.0, 0.0]


def test_the_page_names_every_row():
    page = (Path(__file__).resolve().parent.parent / "docs" / "preference.md").read_text(encoding="utf-8")
    assert [name for name in (*PREFERENCE, *UNPAIRED) if f"| `{name}` |" not in page] == []
