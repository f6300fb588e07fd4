"""Online DPO: the pair of a group, the loss in fp64 on transformers' own attention, invariance, runs, resume, errors."""

import math

import pytest
import torch
from online_runs import assert_resumes_to_the_bit, built, online_arguments, write_task
from preference_runs import rows_of
from tiny_models import write_arithmetic_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fastalign.recipes import online
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    OnlineArguments,
    SamplingArguments,
)
from fastalign.recipes.online_preference import best_and_worst
from fastalign.rollout import Sample


def sample(reward, ids=(1, 2)):
    return Sample(list(ids), [-1.0] * len(ids), [-1.0] * len(ids), rewards={"r": reward})


def test_the_pair_is_the_first_best_and_the_first_worst_with_a_reward():
    group = [sample(0.5), sample(math.nan), sample(2.0), sample(-1.0), sample(2.0), sample(-1.0)]
    best, worst = best_and_worst(group, {"r": 1.0})
    assert best is group[2]
    assert worst is group[3]
    best, worst = best_and_worst(group, {"r": -1.0})
    assert best is group[3]
    assert worst is group[2]
    assert best_and_worst([sample(1.0), sample(1.0), sample(math.nan)], {"r": 1.0}) is None
    assert best_and_worst([sample(math.nan)], {"r": 1.0}) is None
    assert best_and_worst([], {"r": 1.0}) is None


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("online-preference")
    write_arithmetic_model(root / "other", seed=1)
    return write_task(
        root,
        "def digits(completions, **k):\n    return [sum(c.isdigit() for c in text) / 5 for text in completions]\n\n"
        "def same(completions, **k):\n    return [1.0] * len(completions)\n",
    )


def arguments(task, output, **changes) -> Arguments:
    given = OnlineArguments(algorithm="online_dpo", num_generations=4, reward=[f"{task / 'reward.py'}:digits"])
    sections = {"batch": BatchArguments(per_device_train_batch_size=16), "sampling": SamplingArguments(max_completion_length=5)}
    return online_arguments(task, output, changes, online=given, **sections)


def pairs_of(job):
    return job.find_pairs(job.collect())


def logp_of(folder, prompt, ids) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    with torch.no_grad():
        logp = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    return float(logp[torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1), torch.tensor(ids)].sum())


def other_reference(task, job):
    """The job's reference becomes another model than the policy."""
    whole = LlamaForCausalLM.from_pretrained(task / "other").state_dict()
    job.reference.model.load_state_dict(whole)


def test_the_loss_is_dpo_of_best_and_worst_whatever_the_micro_batches(task, tmp_path):
    job, found = built(arguments(task, tmp_path, online={"beta": 0.3})), []
    other_reference(task, job)
    pairs = pairs_of(job)
    assert len(pairs) >= 3
    for budget in (10_000, 1):
        job.max_tokens = budget
        batches = job.batches(pairs)
        result = job.updater.accumulate([job.micro_batch(b, pairs) for b in batches])
        found.append((len(batches), result.loss, torch.cat([b.flatten().double() for b in job.updater.gradients.buffers])))
    (one, loss, gradient), (many, loss_, gradient_) = found
    assert (one, many) == (1, len(pairs))
    expected = 0.0
    for pair in pairs:
        ids = pair.best.ids, pair.worst.ids
        ratio = [logp_of(task / "model", pair.prompt, own) - logp_of(task / "other", pair.prompt, own) for own in ids]
        expected += math.log1p(math.exp(-0.3 * (ratio[0] - ratio[1]))) / len(pairs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert loss_ == pytest.approx(loss, rel=1e-6)
    assert gradient.norm() > 1e-3
    assert (gradient - gradient_).norm() <= 1e-6 * gradient.norm()


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "hinge"])
def test_online_preference_trains_and_raises_the_reward_of_what_is_preferred(task, tmp_path, loss):
    changes = {"online": {"preference_loss": loss, "num_iterations": 2}, "optim": {"max_steps": 6, "learning_rate": 3e-3}}
    online.run(arguments(task, tmp_path, **changes))
    rows = rows_of(tmp_path)
    expected = {
        "loss",
        "grad_norm",
        "num_pairs",
        "rewards/chosen",
        "rewards/margins",
        "rewards/accuracies",
        "reward",
        "reward_std",
        "entropy",
    }
    assert expected <= set(rows[0])
    assert rows[0]["num_pairs"] >= 2
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.1
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_resume_continues_to_the_bit(task, tmp_path):
    assert_resumes_to_the_bit(online.run, arguments(task, tmp_path, run={"save_steps": 2}), tmp_path)


def test_a_batch_without_a_pair_changes_nothing(task, tmp_path, caplog):
    online.run(arguments(task, tmp_path, online={"reward": [f"{task / 'reward.py'}:same"]}, optim={"max_steps": 2}))
    assert "no group has two different rewards" in caplog.text
    before = LlamaForCausalLM.from_pretrained(task / "model").state_dict()
    after = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "a pair needs two completions of a prompt"),
        ({"advantage": "rloo"}, "--advantage: online_dpo compares a group's best and worst completion"),
        ({"loss": "gspo"}, "it has no loss; see --preference_loss"),
        ({"preference_loss": "aot"}, "it needs numbers of a whole batch of pairs"),
        ({"preference_loss": "dpoo"}, "did you mean dpo"),
        ({"entropy_coef": 0.1}, "--entropy_coef: online_dpo has no policy loss that reads it"),
        ({"importance_correction": "truncate"}, "--importance_correction: online_dpo"),
        ({"epsilon": 0.1}, "dpo has no option 'epsilon'"),
        ({"algorithm": "grpo", "preference_loss": "ipo"}, "--preference_loss: grpo compares no completions"),
    ],
)
def test_what_it_does_not_read_is_an_error(task, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        online.run(arguments(task, tmp_path, online=changes))
