"""`fastalign dpo` and `kto` end to end on tiny models: every row, equations on the whole batch, the reference cache, resume."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastalign.losses.preference import PREFERENCE
from fastalign.losses.unpaired import UNPAIRED
from fastalign.recipes import arithmetic, label_objective, pair_objective, preference, reference_cache, samples, training, unpaired
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OptimArguments,
    RunArguments,
)
from fastalign.recipes.offline_arguments import PreferenceArguments, ReferenceArguments, UnpairedArguments
from fastalign.recipes.setup import load

VOLATILE = ("timing_s/", "tokens_per_second", "step_time", "peak_memory_mb")
RECIPES = {"dpo": preference, "kto": unpaired}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Charts and samples take most of a tiny run; `monkeypatch.undo()` brings them back."""
    monkeypatch.setattr(training, "write_report", lambda *a, **k: None)
    monkeypatch.setattr(samples, "NUM_SHOWN", 0)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A policy, another model as its reference, pairs, and labelled completions."""
    root, tokenizer = tmp_path_factory.mktemp("task"), arithmetic.build_tokenizer()
    for seed, name in enumerate(("model", "reference")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rng = random.Random(0)
    rows = []
    for _ in range(20):
        a, b = rng.randrange(100), rng.randrange(100)
        rows.append({"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": "".join(rng.choices("0123456789", k=rng.randint(1, 6)))})
    write(root / "pairs.jsonl", rows)
    write(root / "margins.jsonl", [row | {"margin": i / 10} for i, row in enumerate(rows)])
    sides = [(row, row["chosen"], True) if i % 3 else (row, row["rejected"], False) for i, row in enumerate(rows)]
    write(root / "labelled.jsonl", [{"prompt": r["prompt"], "completion": c, "label": good} for r, c, good in sides])
    return root


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(task: Path, output: Path, command: str = "dpo", **changes) -> Arguments:
    data = str(task / ("pairs.jsonl" if command == "dpo" else "labelled.jsonl"))
    args = Arguments(
        command=command,
        model=ModelArguments(model_name_or_path=str(task / "model"), dtype="float32", device="cpu"),
        data=DataArguments(dataset_name=data, eval_dataset_name=data, max_length=48, shuffle=False),
        optim=OptimArguments(learning_rate=1e-2, max_steps=4, lr_scheduler_type="constant"),
        batch=BatchArguments(per_device_train_batch_size=10),
        run=RunArguments(output_dir=str(output)),
        preference=PreferenceArguments(),
        unpaired=UnpairedArguments(),
        reference=ReferenceArguments(),
    )
    options = changes.pop("options", {})
    args = replace(args, loss_options=options)
    return replace(args, **{name: replace(getattr(args, name), **values) for name, values in changes.items()})


def rows_of(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def finite(rows: list[dict]) -> bool:
    return all(value is not None and math.isfinite(value) for row in rows for value in row.values())


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


def summed_logps(folder: Path, ids: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """[B] fp64 log-probs of completions, each sequence on its own, by transformers' own attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    found = []
    for prompt, completion in ids:
        with torch.no_grad():
            logp = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
        found.append(logp[rows, torch.tensor(completion)].sum())
    return torch.stack(found)


def encoded(task: Path, name: str, columns: tuple[str, ...]) -> list[list[tuple[list[int], list[int]]]]:
    """(prompt, completion) ids of the first batch of 10, one list a column."""
    tokenizer = arithmetic.build_tokenizer()
    rows = [json.loads(line) for line in (task / name).read_text().splitlines()][:10]
    ids = [{key: tokenizer(row[key], add_special_tokens=False).input_ids for key in ("prompt", *columns)} for row in rows]
    return [[([1, *row["prompt"]], [*row[column], 2]) for row in ids] for column in columns]


def softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def paper_losses(loss: str, cw: torch.Tensor, cl: torch.Tensor, lengths, policy) -> torch.Tensor:
    """Each row's equation at its own options, on log-ratios [B] of the whole batch."""
    win, lose = policy
    delta = cw - cl
    if loss == "dpo":
        return softplus(-0.1 * delta)
    if loss == "ipo":
        return (delta - 5.0) ** 2
    if loss == "orpo":
        p = [torch.exp(x / n) for x, n in zip(policy, lengths, strict=True)]
        ratio = torch.log(p[0] / (1 - p[0])) - torch.log(p[1] / (1 - p[1]))
        return -win / lengths[0] + 0.1 * softplus(-ratio)
    if loss == "bco_pair":
        shift = 0.05 * (cw.mean() + cl.mean())
        return softplus(shift - 0.1 * cw) + softplus(0.1 * cl - shift)
    if loss == "aot":
        theirs = ((win - cw) - (lose - cl)).sort().values
        return softplus(-0.1 * ((win - lose).sort().values - theirs))
    return softplus(-0.1 * (cw.sort().values - cl.sort().values))  # aot_unpaired


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "bco_pair", "aot", "aot_unpaired"])
@pytest.mark.parametrize("budget", [4096, 30])
def test_the_first_loss_is_the_papers_whatever_the_micro_batches(task, tmp_path, loss, budget):
    named = {"ref_model_name_or_path": str(task / "reference")} if PREFERENCE[loss].reference else {}
    changes = {"reference": named, "batch": {"max_tokens_per_micro_batch": budget}, "optim": {"max_steps": 1}}
    preference.run(arguments(task, tmp_path, preference={"loss": [loss]}, **changes))
    row = rows_of(tmp_path)[1]
    sides = encoded(task, "pairs.jsonl", ("chosen", "rejected"))
    policy = [summed_logps(task / "model", side) for side in sides]
    ratios = [x - summed_logps(task / "reference", side) for x, side in zip(policy, sides, strict=True)]
    lengths = [torch.tensor([float(len(c)) for _, c in side]) for side in sides]
    expected = float(paper_losses(loss, *ratios, lengths, policy).mean())
    assert row["loss"] == pytest.approx(expected, rel=2e-6)
    assert row["logps/chosen"] == pytest.approx(float(policy[0].mean()), rel=1e-6)
    if named:
        assert row["rewards/margins"] == pytest.approx(0.1 * float((ratios[0] - ratios[1]).mean()), rel=1e-5)
        assert row["rewards/accuracies"] == pytest.approx(float((ratios[0] > ratios[1]).double().mean()))


@pytest.mark.parametrize("budget", [4096, 30])
def test_kto_first_loss_is_the_papers_with_mismatched_pairs_of_the_batch(task, tmp_path, budget):
    named = {"ref_model_name_or_path": str(task / "reference")}
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    changes = {"batch": {"max_tokens_per_micro_batch": budget}, "optim": {"max_steps": 1}}
    unpaired.run(arguments(task, tmp_path, "kto", reference=named, unpaired=weights, **changes))
    row = rows_of(tmp_path)[1]
    own = encoded(task, "labelled.jsonl", ("completion",))[0]
    labels = torch.tensor([json.loads(line)["label"] for line in (task / "labelled.jsonl").read_text().splitlines()][:10])
    far = [(own[i][0], own[i - 1][1]) for i in range(10)]
    ratio, kl = (summed_logps(task / "model", ids) - summed_logps(task / "reference", ids) for ids in (own, far))
    z = float(kl.mean().clamp(min=0))
    weight = torch.where(labels, 1.3, 0.7).double()
    expected = weight * (1 - torch.sigmoid(torch.where(labels, 1.0, -1.0) * 0.1 * (ratio - z)))
    assert row["kl"] == pytest.approx(z, rel=1e-5, abs=1e-6)
    assert row["loss"] == pytest.approx(float(expected.mean()), rel=2e-6)
    assert row["rewards/chosen"] == pytest.approx(0.1 * float(ratio[labels].mean()), rel=1e-5)
    assert row["logps/rejected"] == pytest.approx(float(summed_logps(task / "model", own)[~labels].mean()), rel=1e-6)


def built(task, tmp_path, command, loss, **changes):
    """A recipe's task before its first step, its policy another model than its reference."""
    named = {"loss": [loss] if command == "dpo" else loss}
    args = arguments(task, tmp_path, command, **{"preference" if command == "dpo" else "unpaired": named}, **changes)
    args = replace(args, reference=replace(args.reference, ref_model_name_or_path=str(task / "reference"), reference_cache="none"))
    loaded, recipe = load(args.model), RECIPES[command]
    read = preference.pairs_of if command == "dpo" else unpaired.completions_of
    found = read(args, loaded, args.data.dataset_name, 0)
    return recipe.build_task(args, loaded, found, found, 4)


CUTS = [("dpo", loss) for loss in ("dpo", "simpo", "orpo", "aot", "aot_unpaired", "bco_pair", "nca_pair")] + [("kto", x) for x in UNPAIRED]


@pytest.mark.parametrize(("command", "loss"), CUTS)
def test_loss_and_gradient_are_invariant_to_micro_batches(task, tmp_path, command, loss):
    job, seen = built(task, tmp_path, command, loss), []
    for budget in (10_000, 1, 37):
        job.max_tokens, job.objective = budget, replace(job.objective)
        if command == "dpo":
            batches = job.data.cut(range(10), budget, job.device)
            numbers = job.objective.statistics(job.updater.model, batches, {})
        else:
            batches, numbers, _ = job.prepare(job.data, range(10))
        result = job.updater.accumulate([job.objective.micro_batch(b, 10, numbers) for b in batches])
        gradient = torch.cat([b.flatten().double() for b in job.updater.gradients.buffers])
        seen.append((len(batches), result.loss, gradient))
    assert [count for count, _, _ in seen][:2] == [1, 10]
    for _, loss_here, gradient in seen[1:]:
        assert loss_here == pytest.approx(seen[0][1], rel=1e-6)
        assert (gradient - seen[0][2]).norm() <= 2e-6 * seen[0][2].norm()
    assert seen[0][2].norm() > 1e-4


@pytest.mark.parametrize("loss", sorted(PREFERENCE))
def test_only_rows_with_batch_statistics_pay_a_scoring_pass(task, tmp_path, monkeypatch, loss):
    calls = []
    monkeypatch.setattr(pair_objective, "score", lambda *a, **k: calls.append(1) or score(*a, **k))
    score = reference_cache.score
    preference.run(arguments(task, tmp_path, preference={"loss": [loss]}, optim={"max_steps": 2}, data={"eval_dataset_name": ""}))
    assert len(calls) == (2 if PREFERENCE[loss].statistics else 0)


def counted(monkeypatch) -> list[int]:
    """Counts the reference's forwards from here on."""
    calls, score = [], reference_cache.score
    monkeypatch.setattr(reference_cache, "score", lambda *a, **k: calls.append(1) or score(*a, **k))
    return calls


@pytest.mark.parametrize("command", ["dpo", "kto"])
def test_the_reference_is_forwarded_once_a_record_and_never_by_a_second_run(task, tmp_path, monkeypatch, command):
    calls = counted(monkeypatch)
    cache = {"reference": {"reference_cache": str(tmp_path / "cache")}, "optim": {"max_steps": 6}}
    recipe = RECIPES[command]
    recipe.run(arguments(task, tmp_path / "a", command, **cache))
    assert len(calls) == 1, "three epochs and a held-out set of the same records: one packed forward"
    recipe.run(arguments(task, tmp_path / "b", command, **cache))
    assert len(calls) == 1
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    recipe.run(arguments(task, tmp_path / "c", command, **cache, model={"model_name_or_path": str(task / "reference")}))
    assert len(calls) == 2, "other weights are another reference"
    write(tmp_path / "one.jsonl", [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}])
    recipe.run(
        arguments(task, tmp_path / "d", command, **cache, data={"dataset_name": str(tmp_path / "one.jsonl"), "eval_dataset_name": ""})
    )
    assert len(calls) == 3, "other records are scored, and kept beside the first"
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"broken")
    recipe.run(arguments(task, tmp_path / "e", command, **cache))
    assert len(calls) == 4
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "e")


def test_only_the_records_that_the_run_reads_are_scored(task, tmp_path):
    job = built(task, tmp_path, "dpo", "dpo", batch={"per_device_train_batch_size": 2}, data={"shuffle": True})
    assert len(job.data.ref_logps) == 8  # 4 steps of 2
    for index in range(4):
        job.step(index)


@pytest.mark.parametrize("loss", [name for name, row in PREFERENCE.items() if not row.reference])
def test_rows_without_a_reference_load_none(task, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(preference, "reference_logps", lambda *a: pytest.fail("a reference was asked for"))
    args = arguments(task, tmp_path, preference={"loss": [loss]}, optim={"max_steps": 1})
    preference.run(replace(args, reference=ReferenceArguments(ref_model_name_or_path=str(task / "reference"))))
    assert not (tmp_path / "reference").exists()


RESUMED = [("dpo", "dpo"), ("dpo", "bco_pair"), ("kto", "kto"), ("kto", "bco")]


@pytest.mark.parametrize(("command", "loss"), RESUMED)
def test_resume_continues_to_the_bit(task, tmp_path, command, loss):
    recipe = RECIPES[command]
    named = {"preference": {"loss": [loss]}} if command == "dpo" else {"unpaired": {"loss": loss}}
    changes = {**named, "optim": {"lr_scheduler_type": "cosine"}, "data": {"shuffle": True}}
    recipe.run(arguments(task, tmp_path / "whole", command, **changes))
    saving = arguments(task, tmp_path / "part", command, **changes, run={"save_steps": 2})
    recipe.run(saving)
    for name in ("model.safetensors", "summary.json"):
        (tmp_path / "part" / name).unlink()
    recipe.run(replace(saving, run=replace(saving.run, resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))))
    assert rows_of(tmp_path / "part") == rows_of(tmp_path / "whole")
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


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
        ({"options": {"beta": "much"}}, "expected a number"),
        ({"preference": {"loss": ["exo_pair"], "label_smoothing": 0.0}}, "label_smoothing must lie between"),
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


def test_a_given_shift_is_no_statistic(task, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_objective, "score", lambda *a: pytest.fail("a scoring pass"))
    monkeypatch.setattr(label_objective, "score", lambda *a: pytest.fail("a scoring pass"))
    preference.run(arguments(task, tmp_path / "a", preference={"loss": ["bco_pair"]}, options={"shift": 0.2}, optim={"max_steps": 1}))
    unpaired.run(arguments(task, tmp_path / "b", "kto", options={"z_ref": 0.1}, optim={"max_steps": 1}))


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
