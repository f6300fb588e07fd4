"""Rewards on the way: process-supervised GRPO and PRIME, their equations in fp64, steps of completions, runs, resume, errors."""

import itertools
import math
import statistics

import pytest
import torch
from online_runs import assert_resumes_to_the_bit, built, online_arguments, write_task
from preference_runs import rows_of
from transformers import LlamaForCausalLM

from fastalign.advantages import prime, process
from fastalign.recipes import arithmetic, online
from fastalign.recipes import reward as reward_recipe
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OnlineArguments,
    OptimArguments,
    ProcessArguments,
    RewardArguments,
    RunArguments,
)
from fastalign.recipes.prime_task import outcome_objective
from fastalign.recipes.step_task import Step, offsets, spread, steps_of
from fastalign.rollout import Sample
from fastalign.training.step import score

STEPS = [[0.3, 0.9, -1.0], [0.2], [], [1.5, 0.1], [0.4, 0.4], [0.4]]  # of six samples, in groups of four and two
CU_GROUPS = torch.tensor([0, 4, 6], dtype=torch.int32)


def z(value, values):
    """A z-score with Bessel's correction, in Python floats; 0 of a missing value, and where all values are equal."""
    values = [v for v in values if not math.isnan(v)]
    if math.isnan(value):
        return 0.0
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return 0.0 if min(values) == max(values) else (value - mean) / (deviation + 1e-4)


def test_process_advantages_are_normalized_over_the_groups_steps_and_summed_to_go():
    got = process(torch.tensor([value for own in STEPS for value in own]), offsets([len(own) for own in STEPS]), CU_GROUPS, eps=1e-4)
    expected = []
    for first, last in ((0, 4), (4, 6)):
        steps = [value for own in STEPS[first:last] for value in own]
        for own in STEPS[first:last]:
            normal = [z(value, steps) for value in own]
            expected += [sum(normal[k:]) for k in range(len(own))]
    assert got.tolist() == pytest.approx(expected, abs=1e-6)
    assert not got[6:].any(), "the second group's steps are all alike"


def test_a_missing_step_reward_counts_nowhere_and_its_step_keeps_what_follows():
    values = torch.tensor([0.0, math.nan, 1.0, 0.5])
    got = process(values, offsets([3, 1]), torch.tensor([0, 2]))
    first, last = (z(value, [0.0, 1.0, 0.5]) for value in (0.0, 1.0))
    assert got.tolist() == pytest.approx([first + last, last, last, 0.0], abs=1e-6)
    assert process(torch.zeros(0), offsets([]), torch.tensor([0])).shape == (0,)
    assert not process(torch.tensor([math.nan, 2.0]), offsets([1, 1]), torch.tensor([0, 2])).any()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_prime_advantages_are_the_papers_first_term(gamma):
    torch.manual_seed(0)
    lengths = [3, 1, 0, 4, 2, 5, 3]
    groups = [(0, 4), (4, 5), (5, 7)]
    rewards = torch.randn(sum(lengths))
    cu = offsets(lengths)
    got = prime(rewards, cu, torch.tensor([0, 4, 5, 7]), gamma=gamma)
    values = [rewards[a:b].double().tolist() for a, b in itertools.pairwise(cu.tolist())]
    expected = []
    for first, last in groups:
        for i in range(first, last):
            others = [statistics.fmean(values[j]) for j in range(first, last) if j != i and values[j]]
            centred = [r - statistics.fmean(others) for r in values[i]] if others else [0.0] * len(values[i])
            expected += [sum(gamma ** (s - t) * centred[s] for s in range(t, len(centred))) for t in range(len(centred))]
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    assert not got[cu[4] : cu[5]].any(), "a group of one"


def completion(tokenizer, text, **changes):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Sample([*ids, tokenizer.eos_token_id], [0.0] * (len(ids) + 1), [0.0] * (len(ids) + 1), text=text, **changes)


def test_steps_end_with_their_separators_and_the_last_with_the_completion():
    tokenizer = arithmetic.build_tokenizer()
    assert steps_of(tokenizer, completion(tokenizer, "1+2=3+4"), "+") == [Step(1, "1+"), Step(5, "1+2=3+"), Step(7, "1+2=3+4")]
    assert steps_of(tokenizer, completion(tokenizer, "1=2="), "=") == [Step(1, "1="), Step(4, "1=2=")], "what is blank ends no step"
    assert steps_of(tokenizer, completion(tokenizer, "12"), "+") == [Step(2, "12")]
    assert [step.end for step in steps_of(tokenizer, completion(tokenizer, "123"), "")] == [0, 1, 3]
    assert [step.text for step in steps_of(tokenizer, completion(tokenizer, "1+=+=2"), "+=")] == ["1+=", "1+=+=", "1+=+=2"]
    assert steps_of(tokenizer, Sample([], [], []), "+") == []


def test_what_an_environment_wrote_is_no_step_and_what_broke_off_has_none():
    tokenizer = arithmetic.build_tokenizer()
    sample = completion(tokenizer, "1+2=3+4")
    sample.scored = [True, True, False, False, False, False, True, True]
    assert [step.end for step in steps_of(tokenizer, sample, "+")] == [1, 7], "the observation belongs to the step that follows"
    sample.finish_reason = "abort"
    assert steps_of(tokenizer, sample, "+") == []


def test_every_token_of_a_step_has_its_advantage_and_unscored_ones_none():
    sample = Sample([1, 2, 3, 4], [0.0] * 4, [0.0] * 4, scored=[True, False, True, True], step_ends=[1, 2], step_rewards=[0.0, 0.0])
    assert spread(sample, torch.tensor([0.5, -1.0])).tolist() == [0.5, -1.0, 0.0]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(
        tmp_path_factory.mktemp("process"),
        "def parity(completions, **k):\n    return [float(len(c) % 2) for c in completions]\n\n"
        "def digit(completions, **k):\n    return [float(c[-1:].isdigit()) if c else None for c in completions]\n\n"
        "def none(completions, **k):\n    return [None for c in completions]\n",
    )


def arguments(task, output, **changes) -> Arguments:
    reward = task / "reward.py"
    given = OnlineArguments(algorithm="process_grpo", num_generations=4, reward=[f"{reward}:parity"])
    process = ProcessArguments(step_reward=f"{reward}:digit", step_separator="+")
    return online_arguments(task, output, changes, online=given, process=process)


PRIME = {"online": {"algorithm": "prime"}, "process": {"step_reward": "", "step_separator": "\\n"}}


@pytest.mark.parametrize("outcome_coef", [0.0, 0.5])
def test_process_tokens_have_the_advantage_of_their_step_and_of_the_outcome(task, tmp_path, outcome_coef):
    job = built(arguments(task, tmp_path, process={"outcome_coef": outcome_coef, "step_separator": ""}))
    rollout = job.collect()
    chunks, told = job.judge(rollout)
    values = [sample.step_rewards for sample in rollout.flat]
    assert told["steps/mean_number"] == pytest.approx(statistics.fmean(map(len, values)))
    for p, samples in enumerate(rollout.samples):
        steps = [value for sample in samples for value in sample.step_rewards]
        outcomes = [sample.rewards["parity"] for sample in samples]
        for k, sample in enumerate(samples):
            (chunk,) = [c for c in chunks if rollout.cu_groups[p] + k in c.index.tolist()] or [None]
            if chunk is None:
                continue
            expected, begin = [], 0
            for n, end in enumerate(sample.step_ends):
                rest = sum(z(value, steps) for value in sample.step_rewards[n:])
                expected += [rest + outcome_coef * z(outcomes[k], outcomes)] * (end + 1 - begin)
                begin = end + 1
            at = chunk.index.tolist().index(rollout.cu_groups[p] + k)
            first, last = chunk.packed.cu_targets[at : at + 2].tolist()
            assert chunk.advantages[first:last].tolist() == pytest.approx(expected, abs=1e-4)
    job.close()


def test_prime_learns_its_rewards_with_the_papers_cross_entropy():
    """Loss, gradient and token rewards of the model of rewards, in fp64 on transformers' own attention."""
    torch.manual_seed(3)
    from fastalign.packing import group, pack

    logp = torch.randn(9, dtype=torch.float64).requires_grad_()
    ref, labels = torch.randn(9, dtype=torch.float64), torch.tensor([1.0, math.nan, 0.0])
    packed = pack([group([1, 2], [[3, 4, 5], [6, 7], [8, 9, 10, 11]])])
    batch = outcome_objective(packed, ref, labels, beta=0.7, count=2)
    loss, sums = batch.objective(logp, torch.zeros(9), slice(0, 9))
    first, last = (0.7 * (logp - ref)[a:b].sum() for a, b in ((0, 3), (5, 9)))
    expected = (-torch.log(torch.sigmoid(first)) - torch.log(1 - torch.sigmoid(last))) / 2
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    assert float(sums["right"]) == float(first > 0) + float(last < 0)
    assert torch.autograd.gradcheck(lambda x: batch.objective(x, torch.zeros(9), slice(0, 9))[0], logp)
    parts = [batch.objective(logp[a:b], torch.zeros(b - a), slice(a, b))[0] for a, b in ((0, 3), (3, 9))]
    assert float(sum(parts).detach()) == pytest.approx(float(loss.detach()), abs=1e-12)


def test_prime_judges_tokens_by_its_models_log_ratio_before_the_update(task, tmp_path):
    job = built(arguments(task, tmp_path, **(PRIME | {"process": {**PRIME["process"], "prm_beta": 0.3}})))
    with torch.no_grad():
        for p in job.prm.updater.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    rollout = job.sample(job.prompts[:2])
    whole = job.chunks_of(rollout, torch.ones(len(rollout.flat)))
    expected = torch.cat([0.3 * (score(job.prm.updater.model, c.packed) - job.prm.reference.score(c.packed)) for c in whole])
    chunks, told = job.judge(rollout)
    outcomes = torch.tensor([s.rewards["parity"] for s in rollout.flat])
    lengths = torch.tensor([len(s.ids) for s in rollout.flat])
    rloo = torch.stack([r - (g.sum() - r) / 3 for g in outcomes.view(2, 4) for r in g])
    dense = prime(expected, offsets(lengths.tolist()), torch.tensor([0, 4, 8]))
    got = torch.cat([chunk.advantages for chunk in chunks])
    torch.testing.assert_close(got, dense + rloo.repeat_interleave(lengths), atol=1e-5, rtol=1e-5)
    assert told["rewards/implicit/mean"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert not torch.equal(torch.cat([score(job.prm.updater.model, c.packed) for c in whole]), torch.zeros(len(expected)))
    job.close()


@pytest.mark.parametrize("changes", [{}, PRIME], ids=["process_grpo", "prime"])
def test_token_advantages_are_invariant_to_micro_batches(task, tmp_path, changes):
    from fastalign.recipes.policy import micro_batch

    job, found = built(arguments(task, tmp_path, **changes)), []
    rollout = job.sample(job.prompts[:4])
    state = {name: value.clone() for name, value in job.prm.updater.model.state_dict().items()} if changes else {}
    for budget in (10_000, 20):
        job.max_tokens = budget
        if changes:
            job.prm.updater.model.load_state_dict(state)
        chunks, _ = job.judge(rollout)
        result = job.updater.accumulate([micro_batch(chunk, job.algorithm) for chunk in chunks])
        found.append((len(chunks), torch.cat([b.flatten().double() for b in job.updater.gradients.buffers])))
        assert math.isfinite(result.loss)
    (one, whole), (many, cut) = found
    assert one == 1
    assert many > 1
    assert whole.norm() > 1e-4
    assert (whole - cut).norm() <= 1e-6 * whole.norm()
    job.close()


@pytest.mark.parametrize("changes", [{}, PRIME], ids=["process_grpo", "prime"])
def test_resume_continues_to_the_bit(task, tmp_path, changes):
    args = arguments(task, tmp_path, **changes, run={"save_steps": 2})
    assert_resumes_to_the_bit(online.run, args, tmp_path, (".", "prm") if changes else (".",))
    rows = rows_of(tmp_path / "whole")
    assert len(rows) == 4
    assert set(rows[0]) >= ({"prm/loss", "prm/accuracy"} if changes else {"steps/mean_number", "rewards/steps/mean"})


def test_prime_trains_its_model_and_keeps_it(task, tmp_path):
    online.run(arguments(task, tmp_path, **PRIME, run={"save_steps": 2}))
    start = LlamaForCausalLM.from_pretrained(task / "model").state_dict()
    learned = LlamaForCausalLM.from_pretrained(tmp_path / "prm").state_dict()
    assert any(not torch.equal(start[name], learned[name]) for name in start)
    first = rows_of(tmp_path)[0]
    assert first["prm/loss"] == pytest.approx(math.log(2), abs=1e-5), "at the start every log-ratio is 0"


def test_a_process_reward_model_judges_steps(task, tmp_path):
    import json

    with (tmp_path / "steps.jsonl").open("w") as file:
        for i in range(8):
            file.write(json.dumps({"prompt": "12+34=", "completions": ["1", str(i)], "labels": [True, i < 4]}) + "\n")
    trained = Arguments(
        command="reward",
        model=ModelArguments(model_name_or_path=str(task / "model"), dtype="float32", device="cpu"),
        data=DataArguments(dataset_name=str(tmp_path / "steps.jsonl"), max_length=48),
        optim=OptimArguments(learning_rate=1e-3, max_steps=2, lr_scheduler_type="constant"),
        batch=BatchArguments(per_device_train_batch_size=8),
        run=RunArguments(output_dir=str(tmp_path / "model")),
        reward=RewardArguments(loss="process", step_separator="="),
    )
    reward_recipe.run(trained)
    job = built(arguments(task, tmp_path / "out", process={"step_reward": str(tmp_path / "model")}))
    assert job.separator == "="
    rollout = job.sample(job.prompts[:2])
    judge = job.step_reward.model
    for samples, prompt in zip(rollout.samples, job.prompts[:2], strict=True):
        for sample in samples:
            assert len(sample.step_ends) == len(sample.step_rewards)
            judge.aggregation = "last"
            (last,) = judge([prompt.prompt], [sample.text])
            if sample.text.strip("= ") and not sample.text.startswith("="):
                assert sample.step_rewards[-1] == pytest.approx(last, abs=1e-6)
    job.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process": {"step_reward": ""}}, "--step_reward is required"),
        ({"online": {"algorithm": "grpo"}}, "--step_reward: the algorithm does not read it; process_grpo does"),
        ({"process": {"prm_beta": 0.1}}, "--prm_beta: the algorithm does not read it; prime does"),
        ({**PRIME, "process": {}}, "--step_reward: the algorithm does not"),
        ({"process": {"step_reward": "nowhere.py:f"}}, "no such file"),
    ],
)
def test_flags_that_do_not_fit_are_named(task, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        online.run(arguments(task, tmp_path, **changes))


def test_steps_without_rewards_teach_nothing_and_say_so(task, tmp_path, caplog):
    online.run(
        arguments(task, tmp_path, process={"step_reward": f"{task / 'reward.py'}:none"}, optim={"max_steps": 1}, online={"beta": 0.0})
    )
    (row,) = rows_of(tmp_path)
    assert row["rewards/steps/missing"] > 0
    assert row.get("grad_norm") in (0.0, None)
