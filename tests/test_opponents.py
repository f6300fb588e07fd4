"""XPO, Nash-MD and the mixture they sample from: equations in fp64 on transformers' own attention, invariance, runs, resume, errors."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from online_runs import assert_resumes_to_the_bit, built, online_arguments, write_task
from preference_runs import rows_of
from tiny_models import FAMILIES, gemma2, llama, ready
from transformers import AutoModelForCausalLM

import fastalign as fa
from fastalign.generation import SamplingParams
from fastalign.models.attention import UnsupportedModelError
from fastalign.models.mixture import GeometricMixture
from fastalign.recipes import online
from fastalign.recipes.arguments import (
    Arguments,
    ModelArguments,
    OnlineArguments,
    OpponentArguments,
)
from fastalign.recipes.policy import micro_batch
from fastalign.recipes.setup import load


def moved(model, amount, seed=0):
    """The model with every weight moved by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
def test_a_mixture_samples_the_renormalized_product_of_both_models(family):
    model = ready(FAMILIES[family]())
    other = moved(copy.deepcopy(model), 0.05)
    plain = copy.deepcopy(other)  # with its layers counted from 0
    engine = fa.Engine(GeometricMixture(model, other, 0.3))
    prompts = [[1, 5, 9, 7], [1, 3]]
    rollout = engine.rollout(prompts, SamplingParams(n=3, max_tokens=12, seed=1, ignore_eos=True))
    for prompt, samples in zip(prompts, rollout.samples, strict=True):
        for sample in samples:
            ids = torch.tensor([prompt + sample.ids])
            with torch.no_grad():
                parts = [m(ids, use_cache=False).logits[0].double().log_softmax(-1) for m in (model, plain)]
            mixed = (0.7 * parts[0] + 0.3 * parts[1]).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = mixed.gather(1, ids[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.logprobs, dtype=torch.float64), expected, atol=2e-5, rtol=0)
    assert len({tuple(s.ids) for samples in rollout.samples for s in samples}) > 3


def test_a_mixture_follows_the_models_and_its_ends_are_the_models():
    model = ready(llama())
    reference = moved(copy.deepcopy(model), 0.1)
    greedy = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    prompts = [[1, 5, 9], [1, 7]]
    for coefficient, alone in ((0.0, copy.deepcopy(model)), (1.0, copy.deepcopy(reference))):
        mixture = GeometricMixture(model, copy.deepcopy(reference), coefficient)
        engine = fa.Engine(mixture)
        expected = [s.ids for (s,) in fa.Engine(ready(alone)).rollout(prompts, greedy).samples]
        assert [s.ids for (s,) in engine.rollout(prompts, greedy).samples] == expected
    mixture = GeometricMixture(model, copy.deepcopy(reference), 0.0)
    engine = fa.Engine(mixture)
    before = [s.ids for (s,) in engine.rollout(prompts, greedy).samples]
    with engine.updating_weights():
        moved(model, 0.2, seed=5)
        mixture.refresh()
    after = [s.ids for (s,) in engine.rollout(prompts, greedy).samples]
    assert after == [s.ids for (s,) in fa.Engine(model).rollout(prompts, greedy).samples]
    assert after != before


def test_models_that_do_not_mix_are_refused():
    model = ready(llama())
    with pytest.raises(UnsupportedModelError, match="two models, got one twice"):
        GeometricMixture(model, model, 0.5)
    with pytest.raises(UnsupportedModelError, match="one configuration"):
        GeometricMixture(model, ready(llama(hidden_size=32)), 0.5)
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        GeometricMixture(model, copy.deepcopy(model), 1.5)
    capped = ready(gemma2())
    with pytest.raises(UnsupportedModelError, match="soft-capped"):
        GeometricMixture(capped, copy.deepcopy(capped), 0.5)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(
        tmp_path_factory.mktemp("opponents"),
        "def digits(completions, **k):\n    return [sum(c.isdigit() for c in text) / 3 for text in completions]\n\n"
        "def some(completions, **k):\n    return [None if len(c) % 3 == 2 else len(c) / 2 for c in completions]\n\n"
        "def same(completions, **k):\n    return [1.0] * len(completions)\n",
    )


def arguments(task, output, algorithm, **changes) -> Arguments:
    given = OnlineArguments(algorithm=algorithm, num_generations=2, reward=[f"{task / 'reward.py'}:digits"])
    return online_arguments(task, output, changes, online=given)


def moved_task(args):
    """The task, its policy moved away from the reference."""
    job = built(args)
    with job.engine.updating_weights():
        moved(job.updater.model, 0.03)
    return job


def logp_of(model, prompt, ids):
    """log π(ids | prompt) in fp64, one number a token, by transformers alone."""
    whole = torch.tensor([prompt + ids])
    return model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, whole[0, len(prompt) :, None])[:, 0]


def plain_copy(model, folder):
    """The weights in fp64 on transformers' own attention."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def gradient_of(job, batches):
    result = job.updater.accumulate(batches)
    return result.loss, torch.cat([b.flatten().double() for b in job.updater.gradients.buffers])


def test_xpo_is_the_papers_loss(task, tmp_path):
    job = moved_task(arguments(task, tmp_path / "run", "xpo", opponent={"exploration_coef": 0.2}))
    rollout = job.sample(job.prompts[:4])
    pairs = job.find_pairs(rollout)
    assert 0 < len(pairs) <= 8
    assert {pair.of_reference for pair in pairs} == {0, 1}
    policy = plain_copy(job.updater.model, tmp_path / "policy")
    reference = AutoModelForCausalLM.from_pretrained(task / "model", dtype=torch.float64)
    total = 0.0
    for prompt, own, others in zip(rollout.prompts, rollout.samples, rollout.opponents, strict=True):
        for mine, other in zip(own, others, strict=True):
            r = [sum(c.isdigit() for c in s.text) / 3 for s in (mine, other)]
            if r[0] == r[1]:
                continue
            best, worst = (mine, other) if r[0] > r[1] else (other, mine)
            with torch.no_grad():
                ref = [logp_of(reference, prompt, s.ids).sum() for s in (best, worst)]
            ratio = [logp_of(policy, prompt, s.ids).sum() - x for s, x in zip((best, worst), ref, strict=True)]
            total = total - torch.nn.functional.logsigmoid(0.1 * (ratio[0] - ratio[1])) + 0.2 * logp_of(policy, prompt, other.ids).sum()
    expected = total / len(pairs)
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in policy.parameters()])
    for budget in (10_000, 30):
        job.max_tokens = budget
        batches = job.batches(pairs)
        assert (len(batches) > 1) == (budget == 30)
        loss, gradient = gradient_of(job, [job.micro_batch(b, pairs) for b in batches])
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()
    job.close()


def test_nash_md_is_the_papers_policy_gradient(task, tmp_path):
    reward = {"online": {"reward": [f"{task / 'reward.py'}:some"], "beta": 0.1}}
    job = moved_task(arguments(task, tmp_path / "run", "nash_md", **reward, opponent={"mixture_coef": 0.4}))
    rollout = job.sample(job.prompts[:4])
    policy = plain_copy(job.updater.model, tmp_path / "policy")
    reference = AutoModelForCausalLM.from_pretrained(task / "model", dtype=torch.float64)
    total, without = 0.0, 0
    for prompt, own, others in zip(rollout.prompts, rollout.samples, rollout.opponents, strict=True):
        theirs = [s.rewards["some"] for s in others if not math.isnan(s.rewards["some"])]
        for sample in own:
            r = sample.rewards["some"]
            if math.isnan(r) or not theirs:
                without += 1
                continue
            logp = logp_of(policy, prompt, sample.ids)
            with torch.no_grad():
                ratio = float(logp.sum() - logp_of(reference, prompt, sample.ids).sum())
            preferred = sum(1 / (1 + math.exp(x - r)) for x in theirs) / len(theirs)
            total = total - (preferred - 0.5 - 0.1 * ratio) * logp.sum()
    assert 0 < without < len(rollout.flat)
    expected = total / (len(rollout.flat) * job.params.max_tokens)  # the row's aggregation divides by a constant
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in policy.parameters()])
    for budget in (10_000, 30):
        job.max_tokens = budget
        chunks, told = job.judge(rollout)
        assert (len(chunks) > 1) == (budget == 30)
        loss, gradient = gradient_of(job, [micro_batch(chunk, job.algorithm) for chunk in chunks])
        assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
        assert (gradient - wanted).norm() <= 1e-4 * wanted.norm()
        assert told["kl"] != 0
    job.close()


def test_opponents_draw_independently_of_an_equal_policy(task, tmp_path):
    for algorithm in ("xpo", "nash_md"):
        job = built(arguments(task, tmp_path, algorithm))
        rollout = job.sample(job.prompts[:8])
        own, others = ([s.ids for samples in side for s in samples] for side in (rollout.samples, rollout.opponents))
        assert own != others
        job.close()


@pytest.mark.parametrize("algorithm", ["xpo", "nash_md"])
def test_resume_continues_to_the_bit(task, tmp_path, algorithm):
    assert_resumes_to_the_bit(online.run, arguments(task, tmp_path, algorithm, run={"save_steps": 2}), tmp_path)
    assert len(rows_of(tmp_path / "whole")) == 4


def test_with_an_adapter_xpo_samples_from_the_base(task, tmp_path):
    job = built(arguments(task, tmp_path, "xpo", model={"use_peft": True, "lora_r": 4}))
    prompts = job.prompts
    with job.engine.updating_weights(), torch.no_grad():
        for name, p in job.updater.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    base = load(ModelArguments(model_name_or_path=str(task / "model"), dtype="float32", device="cpu"))
    engine = fa.Engine(base.model, base.tokenizer)
    other = replace(job.params, seed=job.params.seed + 1)
    expected = engine.rollout([p.ids for p in prompts[:3]], other, request_ids=[0, 1, 2]).flat
    got = job.opponent.samples(prompts[:3], job.params, [0, 1, 2])
    assert [s.ids for own in got for s in own] == [s.ids for s in expected]
    rollout = job.sample(prompts[:3])
    assert [s.ids for s in rollout.flat] != [s.ids for s in expected]
    job.close()
    with pytest.raises(ValueError, match="an adapter has no second model to mix"):
        online.run(arguments(task, tmp_path, "nash_md", model={"use_peft": True, "lora_r": 4}))


def test_equal_rewards_teach_nothing_and_break_nothing(task, tmp_path, caplog):
    reward = {"online": {"reward": [f"{task / 'reward.py'}:same"], "beta": 0.0}}
    online.run(arguments(task, tmp_path / "nash", "nash_md", **reward, optim={"max_steps": 2}))
    assert [row["grad_norm"] for row in rows_of(tmp_path / "nash")] == [0.0, 0.0]
    online.run(arguments(task, tmp_path / "xpo", "xpo", online={"reward": reward["online"]["reward"]}, optim={"max_steps": 2}))
    assert "no group has two different rewards" in caplog.text


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        ("grpo", {"opponent": {"mixture_coef": 0.2}}, "--mixture_coef: the algorithm does not read it; nash_md does"),
        ("nash_md", {"opponent": {"exploration_coef": 0.2}}, "--exploration_coef: the algorithm does not read it; xpo does"),
        ("nash_md", {"online": {"advantage": "rloo"}}, "--advantage: nash_md's advantage is its own"),
    ],
)
def test_flags_that_do_not_fit_are_named(task, tmp_path, algorithm, changes, message):
    with pytest.raises(ValueError, match=message):
        online.run(arguments(task, tmp_path, algorithm, **changes))


def test_defaults_are_the_papers():
    assert OpponentArguments() == OpponentArguments(None, None)
    row = fa.algorithms.ALGORITHMS["nash_md"]
    assert (row.mixture_coef, row.kl_coef) == (0.125, 0.008)
