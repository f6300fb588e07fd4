"""PPO and its kin: token advantages and the critic's loss in fp64, invariance to micro-batches, runs, resume, errors."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from online_runs import assert_resumes_to_the_bit, online_arguments, write_task
from preference_runs import rows_of
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fastalign.advantages import generalized
from fastalign.algorithms import ACTOR_CRITICS, resolve
from fastalign.losses.policy import KL
from fastalign.losses.value import value_loss
from fastalign.models.adapters import attach_lora
from fastalign.recipes import arithmetic, online, ppo
from fastalign.recipes.arguments import (
    Arguments,
    ModelArguments,
    OnlineArguments,
    PPOArguments,
    SamplingArguments,
)
from fastalign.recipes.policy import build_chunks, micro_batch
from fastalign.recipes.ppo_task import Running
from fastalign.recipes.setup import load, seed_everything
from fastalign.training.scores import ScoreBatch
from fastalign.training.step import score

CU = torch.tensor([0, 4, 5, 5, 12], dtype=torch.int32)


def loop(rewards, values, gamma, lam):
    """GAE of one sequence, by its recurrence in Python floats."""
    advantages, after, following = [], 0.0, 0.0
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        after = r + gamma * following - v + gamma * lam * after
        following = v
        advantages.append(after)
    return advantages[::-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.9, "lam": 0.7},
        {"lam": 0.95, "lam_critic": 1.0},
        {"alpha": 0.4},
        {"alpha": 0.05, "lam_critic": 1.0, "gamma": 0.99},
    ],
)
def test_generalized_advantages_are_the_recurrence(options):
    torch.manual_seed(0)
    rewards, values = torch.randn(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    advantages, returns = generalized(rewards, values, CU, **options)
    gamma, lam, alpha = options.get("gamma", 1.0), options.get("lam", 0.95), options.get("alpha", 0.0)
    critic = lam if options.get("lam_critic") is None else options["lam_critic"]
    for a, b in itertools.pairwise(CU.tolist()):
        if a == b:
            continue
        own = max(0.0, 1 - 1 / (alpha * (b - a))) if alpha else lam
        r, v = rewards[a:b].tolist(), values[a:b].tolist()
        assert advantages[a:b].tolist() == pytest.approx(loop(r, v, gamma, own), abs=1e-12)
        assert returns[a:b].tolist() == pytest.approx([x + y for x, y in zip(loop(r, v, gamma, critic), v, strict=True)], abs=1e-12)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_is_the_larger_of_both_errors(clip):
    torch.manual_seed(1)
    values, returns, old = (torch.randn(50, dtype=torch.float64) for _ in range(3))
    got = value_loss(values, returns, old, clip=clip)
    for i in range(50):
        v, r, o = float(values[i]), float(returns[i]), float(old[i])
        near = v if clip is None else min(max(v, o - clip), o + clip)
        assert float(got[i]) == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2), abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, returns, old, clip=clip), values.requires_grad_())
    assert value_loss(torch.zeros(0), torch.zeros(0), clip=0.2).shape == (0,)


def test_running_moments_are_those_of_all_that_was_seen():
    running, seen = Running(), []
    for n in (3, 1, 7):
        values = torch.randn(n) * 3 + 1
        running.add(values)
        seen += values.tolist()
    whole = torch.tensor(seen, dtype=torch.float64)
    assert (running.mean, running.deviation) == pytest.approx((float(whole.mean()), float(whole.std())), rel=1e-9)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(
        tmp_path_factory.mktemp("ppo"),
        "def parity(completions, **k):\n    return [float(len(c) % 2) for c in completions]\n\n"
        "def sometimes(completions, **k):\n    return [None if len(c) == 3 else float(len(c)) for c in completions]\n",
    )


def arguments(task, output, **changes) -> Arguments:
    given = OnlineArguments(num_generations=2, reward=[f"{task / 'reward.py'}:parity"])
    sections = {"sampling": SamplingArguments(max_completion_length=5), "ppo": PPOArguments(critic_warmup=0)}
    return online_arguments(task, output, changes, command="ppo", online=given, **sections)


def built(args):
    seed_everything(0)
    loaded = load(args.model)
    prompts, held_out = online.both_prompts(args, loaded)
    return ppo.build_task(args, loaded, prompts, held_out, 4)[0]


def judged(job, rollout, max_tokens=10_000):
    """Chunks of the rollout with advantages and returns, under a reference that is not the policy."""
    chunks = build_chunks(rollout, torch.ones(len(rollout.flat)), job.row, budget=5, max_tokens=max_tokens)
    for chunk in chunks:
        wave = torch.sin(chunk.packed.targets.float())
        chunk.ref_logp = chunk.sampler_logp + 0.3 * wave if job.row.kl_coef else None
        chunk.values = job.critic.values(chunk)
    job._judge(rollout, chunks)
    return chunks


@pytest.mark.parametrize("algorithm", ACTOR_CRITICS)
def test_advantages_are_those_of_the_papers_rewards(task, tmp_path, algorithm):
    """The whole judgement again in fp64: score at the end, KL a token, GAE by its recurrence, whitening."""
    job = built(arguments(task, tmp_path, online={"algorithm": algorithm}))
    rollout, row = job.collect(), job.row
    (chunk,) = judged(job, rollout)
    given = [s.rewards["parity"] for s in rollout.flat]
    scores = given
    if row.normalize_rewards:
        moments = torch.tensor(given, dtype=torch.float64)
        scores = [(g - float(moments.mean())) / float(moments.std()) for g in given]
    if row.reward_clip:
        scores = [min(max(s, -row.reward_clip), row.reward_clip) for s in scores]
    options, cu = row.advantage_options, chunk.packed.cu_targets.tolist()
    advantages, returns = [], []
    for b, (first, last) in enumerate(itertools.pairwise(cu)):
        values = chunk.values[first:last].double().tolist()
        rewards = [0.0] * (last - first)
        if row.kl_coef:
            gaps = (chunk.sampler_logp[first:last].double() - chunk.ref_logp[first:last].double()).tolist()
            rewards = [-row.kl_coef * gap for gap in gaps]
        rewards[-1] += scores[b]
        lam = max(0.0, 1 - 1 / (options["alpha"] * (last - first))) if options.get("alpha") else 0.95
        advantages += loop(rewards, values, 1.0, lam)
        returns += [x + v for x, v in zip(loop(rewards, values, 1.0, options.get("lam_critic", 0.95)), values, strict=True)]
    whole = torch.tensor(advantages, dtype=torch.float64)
    expected = (whole - whole.mean()) / (whole.std() + 1e-8)
    torch.testing.assert_close(chunk.advantages.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chunk.returns.double(), torch.tensor(returns, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    if row.nll_coef:
        right = torch.tensor([g > 0 for g in given]).repeat_interleave(torch.tensor(cu).diff())
        torch.testing.assert_close(chunk.nll_weights, row.nll_coef * right.float() / max(1, int(right.sum())))


@pytest.mark.parametrize("algorithm", ACTOR_CRITICS)
def test_critic_and_policy_are_invariant_to_micro_batches(task, tmp_path, algorithm):
    job = built(arguments(task, tmp_path, online={"algorithm": algorithm}))
    rollout, state, found = job.collect(), vars(job.seen).copy(), []
    for budget in (10_000, 12):
        job.seen = Running(**state)
        chunks = judged(job, rollout, budget)
        for chunk in chunks:
            chunk.old_logp = score(job.updater.model, chunk.packed) + 0.3 * torch.sin(chunk.packed.targets.float())
        own = replace(job.row, kl_coef=0.0)
        policy = job.updater.accumulate([micro_batch(chunk, own) for chunk in chunks])
        gradient = torch.cat([b.flatten().double() for b in job.updater.gradients.buffers])
        critic, clip = job.critic.updater, job.critic.clip
        batches, total = [], sum(len(c.advantages) for c in chunks)
        for chunk in chunks:
            chunk.values = chunk.values + 0.5 * torch.cos(chunk.packed.targets.float())
            batches.append(ScoreBatch(chunk.packed, chunk.packed.rows, job.critic._objective(chunk, total)))
        value = critic.accumulate(batches)
        own_gradient = torch.cat([b.flatten().double() for b in critic.gradients.buffers])
        found.append((len(chunks), policy.loss, gradient, value.loss, own_gradient))
        assert clip == job.row.value_clip
    (one, loss, gradient, value, own_gradient), (many, loss_, gradient_, value_, own_gradient_) = found
    assert one == 1
    assert many > 2
    assert gradient.norm() > 1e-4
    assert own_gradient.norm() > 1e-4
    assert abs(loss - loss_) <= 1e-6 * max(abs(loss), 1e-1)  # a sum of terms of size one that nearly cancel
    assert abs(value - value_) <= 1e-6 * abs(value)
    assert (gradient - gradient_).norm() <= 1e-6 * gradient.norm()
    assert (own_gradient - own_gradient_).norm() <= 1e-6 * own_gradient.norm()


@pytest.mark.parametrize("algorithm", ACTOR_CRITICS)
def test_every_actor_critic_trains_both_models(task, tmp_path, algorithm):
    ppo.run(arguments(task, tmp_path, online={"algorithm": algorithm, "num_iterations": 2}, optim={"max_steps": 3}))
    rows = rows_of(tmp_path)
    assert len(rows) == 3
    expected = {"loss/value_avg", "val/mean", "val/explained_variance", "objective/scores", "objective/kl", "grad_norm", "entropy"}
    assert expected <= set(rows[0])
    if ACTOR_CRITICS[algorithm].kl_coef:
        assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
        assert rows[-1]["objective/kl"] != 0
    assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-5
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    policy = load(ModelArguments(model_name_or_path=str(tmp_path), device="cpu")).model
    start = LlamaForCausalLM.from_pretrained(task / "model")
    for model in (critic, policy):
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, start.model.layers[0].mlp.up_proj.weight)


def test_the_critic_warms_up_alone(task, tmp_path):
    ppo.run(arguments(task, tmp_path, ppo={"critic_warmup": 2}, run={"save_steps": 2}))
    start = LlamaForCausalLM.from_pretrained(task / "model").state_dict()
    waiting = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(start[name], waiting[name]) for name in start)
    assert not torch.equal(LlamaForCausalLM.from_pretrained(tmp_path).model.norm.weight, start["model.norm.weight"])
    rows = rows_of(tmp_path)
    assert "grad_norm" not in rows[0] or rows[0]["grad_norm"] is None
    assert rows[2]["grad_norm"] > 0


def test_resume_continues_to_the_bit(task, tmp_path, caplog):
    changes = {
        "online": {"algorithm": "ppo_max"},
        "ppo": {"critic_warmup": 1, "kl_target": 0.5, "kl_horizon": 20},
        "run": {"save_steps": 2},
    }
    args = arguments(task, tmp_path, **changes)
    part = assert_resumes_to_the_bit(ppo.run, args, tmp_path, (".", "critic"))
    coefficients = [row["objective/kl_coef"] for row in rows_of(tmp_path / "whole")]
    assert len(set(coefficients)) > 1, "the coefficient is steered"
    assert "was written with other" not in caplog.text
    config = (tmp_path / "part" / "config.yaml").read_text()
    with pytest.raises(ValueError, match="was written by another command: it has critic beside the policy"):
        online.run(replace(args, command="grpo", online=replace(args.online, algorithm="grpo"), run=part))
    assert (tmp_path / "part" / "config.yaml").read_text() == config, "what was refused leaves the folder as it is"
    ppo.run(
        replace(
            args, online=replace(args.online, beta=0.5), run=replace(part, resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
        )
    )
    assert "was written with other beta; the run goes on with what is given now" in caplog.text


def test_a_sample_without_a_reward_is_left_out(task, tmp_path):
    ppo.run(arguments(task, tmp_path, online={"reward": [f"{task / 'reward.py'}:sometimes"], "num_generations": 4}, optim={"max_steps": 2}))
    rows = rows_of(tmp_path)
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "loss/value_avg", "grad_norm"))


def test_a_step_in_which_nothing_has_a_reward_is_passed_over(task, tmp_path):
    source = "n = [0]\ndef down(completions, **k):\n    n[0] += 1\n    return [None if n[0] == 2 else 1.0 for c in completions]\n"
    (tmp_path / "down.py").write_text(source)
    own = {"reward": [f"{tmp_path / 'down.py'}:down"]}
    ppo.run(arguments(task, tmp_path / "out", online=own, data={"eval_dataset_name": ""}, optim={"max_steps": 4}))
    rows = [row for row in rows_of(tmp_path / "out") if "completions/mean_length" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert sum(row.get("rewards/down/missing", 0) for row in rows) == 8
    assert all(math.isfinite(row["completions/mean_length"]) for row in rows)


def test_the_kl_in_the_loss_pulls_towards_the_reference(task, tmp_path):
    """Over all tokens the row's estimator has the gradient of β KL(π || π_ref); that of k1 is 0."""
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_(True)
    row = ppo.algorithm_of(arguments(task, tmp_path, ppo={"kl_in": "loss"}))
    assert ppo.algorithm_of(arguments(task, tmp_path)).kl == "k1", "log-ratios, in the rewards"
    logp, ref_logp = logits.log_softmax(0), ref.log_softmax(0)
    (wanted,) = torch.autograd.grad((logp.exp() * (logp - ref_logp)).sum(), logits, retain_graph=True)
    for name, expected in ((row.kl, wanted), ("k1", torch.zeros(5, dtype=torch.float64))):
        (found,) = torch.autograd.grad((logp.detach().exp() * KL[name](logp, ref_logp)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(found, expected)


def test_beta_is_steered_once_the_policy_learns(task, tmp_path):
    changes = {"online": {"algorithm": "ppo_max"}, "ppo": {"critic_warmup": 2, "kl_target": 6.0, "kl_horizon": 100}}
    ppo.run(arguments(task, tmp_path, **changes))
    told = [row["objective/kl_coef"] for row in rows_of(tmp_path) if "objective/kl_coef" in row]
    assert told[0] == told[1] == told[2] == 0.05, "while the critic warms up the KL is 0 whatever β is"
    assert told[3] != 0.05


def test_a_critic_may_begin_from_a_reward_model_and_the_kl_may_be_in_the_loss(task, tmp_path):
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_pretrained(task / "model", num_labels=1).save_pretrained(tmp_path / "rm")
    arithmetic.build_tokenizer().save_pretrained(tmp_path / "rm")
    changes = {"critic_model_name_or_path": str(tmp_path / "rm"), "kl_in": "loss", "critic_learning_rate": 1e-4, "whiten": False}
    ppo.run(arguments(task, tmp_path / "out", ppo=changes, optim={"max_steps": 2}))
    rows = rows_of(tmp_path / "out")
    assert rows[-1]["kl"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo": {"kl_target": 3.0}, "online": {"beta": 0.0}}, "--kl_target: there is no KL to steer"),
        ({"ppo": {"critic_warmup": 4}}, "--critic_warmup 4: the run has 4 steps, so the policy would never be trained"),
        ({"ppo": {"critic_model_name_or_path": "./nowhere"}}, "there is no folder './nowhere'"),
        ({"online": {"reward": []}}, "--reward is required"),
        ({"online": {"algorithm": "pppo"}}, "did you mean ppo"),
        ({"online": {"advantage": "grpo"}}, "no row named 'grpo'; Rows: gae"),
        ({"online": {"kl_estimator": "k2"}}, "the KL is in the rewards, as log-ratios; give --kl_in loss"),
        ({"online": {"kl_estimator": "k1"}, "ppo": {"kl_in": "loss"}}, "the gradient of k1 in a loss is 0 on average"),
    ],
)
def test_bad_input_names_the_remedy(task, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ppo.run(arguments(task, tmp_path, **changes))


def test_a_critic_of_fewer_tokens_is_refused(task, tmp_path):
    config = LlamaConfig.from_pretrained(task / "model")
    config.vocab_size = 9
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    arithmetic.build_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="the critic knows 9 tokens, the policy 15"):
        ppo.run(arguments(task, tmp_path / "out", ppo={"critic_model_name_or_path": str(tmp_path / "small")}))


def test_rows_take_their_own_advantage_options():
    assert resolve("vapo", advantage_options={"alpha": 0.1}).advantage_options == {"lam_critic": 1.0, "alpha": 0.1}
    with pytest.raises(ValueError, match="has no option 'lambda'"):
        resolve("ppo", advantage_options={"lambda": 0.9})


def test_the_plan_counts_the_critic_and_the_reference(task, tmp_path):
    plan = ppo.run(arguments(task, tmp_path, run={"dry_run": True}))
    assert plan["memory: reference, MiB"] == plan["memory: weights, MiB"]
    assert "memory: critic, its gradients and optimizer, MiB" in plan
    named = ppo.run(arguments(task, tmp_path, run={"dry_run": True}, ppo={"critic_model_name_or_path": str(task / "model")}))
    assert named["memory: critic, its gradients and optimizer, MiB"] == plan["memory: critic, its gradients and optimizer, MiB"]
    assert not list(tmp_path.iterdir())


def test_the_plan_follows_an_adapter_to_its_base(task, tmp_path):
    model = load(ModelArguments(model_name_or_path=str(task / "model"), dtype="float32", device="cpu")).model
    attach_lora(model).save_pretrained(tmp_path / "adapter")
    plan = ppo.run(arguments(task, tmp_path / "none", run={"dry_run": True}, ppo={"critic_model_name_or_path": str(tmp_path / "adapter")}))
    whole = ppo.run(arguments(task, tmp_path / "none", run={"dry_run": True}))
    key = "memory: critic, its gradients and optimizer, MiB"
    assert plan[key] == whole[key]
