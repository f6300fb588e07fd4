"""Preference optimization batch by batch: the papers' equations, invariance to micro-batches, the reference cache, resume."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from preference_runs import RECIPES, arguments, rows_of, without_report, write, write_task
from transformers import AutoModelForCausalLM

from fastalign.losses.preference import PREFERENCE
from fastalign.losses.unpaired import UNPAIRED
from fastalign.recipes import arithmetic, label_objective, pair_objective, preference, reference_cache, unpaired
from fastalign.recipes.offline_arguments import ReferenceArguments
from fastalign.recipes.setup import load


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_report(monkeypatch)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


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


OFTEN = ("dpo", "simpo", "orpo", "aot", "aot_unpaired", "bco_pair", "nca_pair")  # one of each kind; the rest is for `make test-all`
CUTS = [("dpo", loss) if loss in OFTEN else pytest.param("dpo", loss, marks=pytest.mark.slow) for loss in PREFERENCE]
CUTS += [("kto", loss) for loss in UNPAIRED]


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
        assert (gradient - seen[0][2]).norm() <= 1e-6 * seen[0][2].norm()
    assert seen[0][2].norm() > 1e-4


@pytest.mark.parametrize("budget", [10_000, 37])
def test_wpo_weighs_each_pair_by_its_aligned_likelihood(task, tmp_path, budget):
    """Against fp64 on transformers' own attention: exp(mean log p(token) - log Σ p²) of both completions times DPO's loss."""
    job = built(task, tmp_path, "dpo", "dpo")
    job.objective = replace(job.objective, weighting=True)
    batches = job.data.cut(range(10), budget, job.device)
    result = job.updater.accumulate([job.objective.micro_batch(b, 10, {}) for b in batches])
    sides = encoded(task, "pairs.jsonl", ("chosen", "rejected"))
    model = AutoModelForCausalLM.from_pretrained(task / "model", dtype=torch.float64, attn_implementation="eager").eval()

    def weight(prompt: list[int], completion: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logp = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return (logp[torch.arange(len(completion)), torch.tensor(completion)] - (2 * logp).logsumexp(-1)).mean().exp()

    weights = torch.stack([weight(*win) * weight(*lose) for win, lose in zip(*sides, strict=True)])
    policy, reference = ([summed_logps(task / name, side) for side in sides] for name in ("model", "reference"))
    win, lose = (a - b for a, b in zip(policy, reference, strict=True))
    assert result.loss == pytest.approx(float((weights * softplus(-0.1 * (win - lose))).mean()), rel=1e-5)


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
    path = write(tmp_path / "one.jsonl", [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}])
    one = {"dataset_name": path, "eval_dataset_name": ""}
    recipe.run(arguments(task, tmp_path / "d", command, **cache, data=one))
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
    with pytest.raises(ValueError, match=f"{loss} reads no reference; leave it out"):
        preference.run(replace(args, reference=ReferenceArguments(ref_model_name_or_path=str(task / "reference"))))
    preference.run(args)
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


def test_a_given_shift_is_no_statistic(task, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_objective, "score", lambda *a: pytest.fail("a scoring pass"))
    monkeypatch.setattr(label_objective, "score", lambda *a: pytest.fail("a scoring pass"))
    preference.run(arguments(task, tmp_path / "a", preference={"loss": ["bco_pair"]}, options={"shift": 0.2}, optim={"max_steps": 1}))
    unpaired.run(arguments(task, tmp_path / "b", "kto", options={"z_ref": 0.1}, optim={"max_steps": 1}))
