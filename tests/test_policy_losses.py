"""Policy losses: values against float64 loops, gradients by gradcheck, off-policy so that they mean something."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from fastalign.algorithms import ALGORITHMS, resolve
from fastalign.losses.policy import AGGREGATES, KL, POLICY, cispo, clip, gmpo, gspo, gspo_token, k3, sapo, token_weights
from fastalign.recipes.flags import build
from fastalign.recipes.online import resolved
from fastalign.recipes.policy import build_chunks, micro_batch
from fastalign.rollout import Rollout, Sample

LENGTHS = [3, 0, 4, 1]


def off_policy(seed=0):
    g = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)
    old = -torch.rand(n, generator=g, dtype=torch.float64) * 3
    logp = old + torch.randn(n, generator=g, dtype=torch.float64) * 0.4
    advantages = torch.randn(n, generator=g, dtype=torch.float64)
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    return logp, old, advantages, cu


def test_clip_equals_the_equation():
    logp, old, adv, cu = off_policy()
    got = clip(logp, old, adv, cu, epsilon=0.2, epsilon_high=0.28)
    for i in range(len(logp)):
        r, a = math.exp(logp[i] - old[i]), float(adv[i])
        assert math.isclose(float(got[i]), -min(r * a, min(max(r, 0.8), 1.28) * a), rel_tol=1e-12)


def test_clip_dual_bounds_negative_advantages():
    old = torch.zeros(2, dtype=torch.float64)
    logp = torch.tensor([3.0, 3.0], dtype=torch.float64)
    got = clip(logp, old, torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.tensor([0, 2]), dual_clip=3.0)
    torch.testing.assert_close(got, torch.tensor([3.0, -1.2], dtype=torch.float64))


def test_gspo_equals_the_equation():
    logp, old, adv, cu = off_policy(1)
    got = gspo(logp, old, adv, cu, epsilon=0.1, epsilon_high=0.2)
    for a, b in itertools.pairwise(cu):
        if a == b:
            continue
        s = math.exp(sum(float(x) for x in (logp - old)[a:b]) / int(b - a))
        for i in range(a, b):
            assert math.isclose(float(got[i]), -min(s * float(adv[i]), min(max(s, 0.9), 1.2) * float(adv[i])), rel_tol=1e-12)


def test_cispo_gradient_is_the_clipped_weight_times_the_advantage():
    logp, old, adv, cu = off_policy(2)
    logp.requires_grad_()
    cispo(logp, old, adv, cu, epsilon=0.1, epsilon_high=0.2).sum().backward()
    expected = -(logp - old).exp().clamp(0.9, 1.2).detach() * adv
    torch.testing.assert_close(logp.grad, expected)


@pytest.mark.parametrize("name", [n for n in POLICY if n not in ("cispo", "gspo_token")])  # these two detach
def test_policy_gradcheck(name):
    logp, old, adv, cu = off_policy(3)
    assert gradcheck(lambda x: POLICY[name].function(x, old, adv, cu), (logp.requires_grad_(),))


@pytest.mark.parametrize("name", KL)
def test_kl_gradcheck_and_zero_at_the_reference(name):
    logp, old, _, _ = off_policy(4)
    assert gradcheck(lambda x: KL[name](x, old), (logp.requires_grad_(),))
    assert KL[name](old, old).abs().max() == 0


def test_k3_is_accurate_next_to_the_reference():
    ref = torch.tensor([-1.0])
    near = ref + 1e-4
    assert math.isclose(float(k3(near, ref)), math.expm1(float(ref - near)) - float(ref - near), rel_tol=1e-3)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_token_weights_do_not_depend_on_the_cut(aggregate):
    lengths = torch.tensor([3, 0, 5, 2])
    options = {"num_tokens": 10, "num_sequences": 4, "budget": 8}
    whole = token_weights(aggregate, lengths, **options)
    parts = torch.cat([token_weights(aggregate, part, **options) for part in lengths.split(2)])
    assert torch.equal(whole, parts)
    expected = {"token": 1.0, "sequence": 0.75, "budget": 10 / 32}[aggregate]
    assert math.isclose(float(whole.sum()), expected, rel_tol=1e-6)


def test_resolve_replaces_parts_and_checks_them():
    assert resolve("grpo", kl_coef=0.0).kl_coef == 0
    assert resolve("dapo").loss_options["epsilon_high"] == 0.28
    assert resolve("grpo", loss="gspo").loss_options == {}, "options of the replaced loss do not carry over"
    assert resolve("grpo", loss_options={"epsilon": 0.1}).loss_options["epsilon"] == 0.1
    for bad, words in (({"loss": "clipp"}, "did you mean clip"), ({"advantage": "rlo"}, "rloo"), ({"aggregate": "tokens"}, "token")):
        with pytest.raises(ValueError, match=words):
            resolve("grpo", **bad)
    with pytest.raises(ValueError, match="did you mean epsilon"):
        resolve("grpo", loss_options={"epsilom": 1})
    with pytest.raises(ValueError, match="did you mean grpo"):
        resolve("grppo")


@pytest.mark.parametrize("name", ["rloo", "reinforce", "remax"])
def test_whole_completions_are_one_action(name):
    # arXiv:2402.14740, Eq. 8: A ∇ log π(y), log π(y) = Σ_t log π_t, so that a token's slope is its completion's A whatever the length
    algorithm, lengths = replace(ALGORITHMS[name], kl_coef=0.0), torch.tensor([2, 5, 1])
    samples = [Sample([3] * n, [0.0] * n, [0.0] * n) for n in lengths.tolist()]
    advantages = torch.tensor([0.5, -1.0, 2.0])
    (chunk,) = build_chunks(Rollout([[1, 2]], [samples]), advantages, algorithm, budget=8, max_tokens=100)
    logp = torch.randn(8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    micro_batch(chunk, algorithm).objective(logp, torch.zeros(8), slice(0, 8))[0].backward()
    torch.testing.assert_close(logp.grad, -advantages.repeat_interleave(lengths) / (3 * 8))


def test_one_epsilon_is_both_bounds_where_the_loss_has_two():
    def options(**flags):
        return resolved(build("grpo", flags)).loss_options

    assert options(loss="gmpo", epsilon=0.3) == {"epsilon": 0.3}
    assert options(loss="gspo", epsilon=0.3) == {"epsilon": 0.3, "epsilon_high": None}
    assert options(algorithm="dapo", epsilon=0.3) == {"epsilon": 0.3, "epsilon_high": None}
    with pytest.raises(ValueError, match="reinforce has no option 'epsilon'"):
        options(loss="reinforce", epsilon=0.3)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_resolves(name):
    assert resolve(name) == ALGORITHMS[name]


def test_gspo_token_has_the_sequences_ratio_and_its_own_gradient():
    logp, old, adv, cu = off_policy(5)
    logp.requires_grad_()
    loss = gspo_token(logp, old, adv, cu, epsilon=0.1, epsilon_high=0.2)
    torch.testing.assert_close(loss, gspo(logp, old, adv, cu, epsilon=0.1, epsilon_high=0.2))
    loss.sum().backward()
    for a, b in itertools.pairwise(cu):
        if a == b:
            continue
        s = math.exp(sum(float(x) for x in (logp - old).detach()[a:b]) / int(b - a))
        for i in range(a, b):
            clipped = s > 1.2 if adv[i] > 0 else s < 0.9
            assert math.isclose(float(logp.grad[i]), 0.0 if clipped else -s * float(adv[i]), rel_tol=1e-12)


def test_sapo_equals_the_equation_and_is_the_ratio_on_policy():
    logp, old, adv, cu = off_policy(6)
    got = sapo(logp, old, adv, cu, tau_positive=1.5, tau_negative=2.0)
    for i in range(len(logp)):
        r, a = math.exp(logp[i] - old[i]), float(adv[i])
        tau = 1.5 if a > 0 else 2.0
        assert math.isclose(float(got[i]), -a * 4 / tau / (1 + math.exp(-tau * (r - 1))), rel_tol=1e-12)
    leaf = old.clone().requires_grad_()
    sapo(leaf, old, adv, cu, tau_positive=1.5, tau_negative=2.0).sum().backward()
    torch.testing.assert_close(leaf.grad, -adv)


def test_gmpo_equals_the_equation():
    logp, old, adv, cu = off_policy(7)
    got = gmpo(logp, old, adv, cu, epsilon=0.2)
    for a, b in itertools.pairwise(cu):
        product = 1.0
        for i in range(a, b):
            r, sign = math.exp(logp[i] - old[i]), 1 if adv[i] >= 0 else -1
            product *= min(r**sign, min(max(r, math.exp(-0.2)), math.exp(0.2)) ** sign) ** sign
        for i in range(a, b):
            assert math.isclose(float(got[i]), -float(adv[i]) * product ** (1 / int(b - a)), rel_tol=1e-12)


def test_positive_only_losses_leave_the_others_alone():
    logp, old, adv, cu = off_policy(8)
    logp.requires_grad_()
    rows = {name: row for name, row in POLICY.items() if row.positive_only}
    assert set(rows) == {"raft", "raft_pp", "self_imitation"}
    for row in rows.values():
        loss = row.function(logp, old, adv, cu)
        (grad,) = torch.autograd.grad(loss.sum(), logp)
        assert (loss[adv <= 0] == 0).all()
        assert (grad[adv <= 0] == 0).all()
        assert (grad[(adv > 0) & (logp - old < math.log(1.2))] < 0).all()
    torch.testing.assert_close(rows["raft"].function(logp, old, adv, cu), torch.where(adv > 0, -logp, 0.0))
    torch.testing.assert_close(rows["self_imitation"].function(logp, old, adv, cu), -logp * adv.clamp(min=0))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loss_options": {"epsilon": "foo"}}, r"--loss.epsilon: expected a number, as in 0.2; got 'foo'"),
        ({"advantage": "passk", "advantage_options": {"k": 2.5}}, r"--advantage.k: expected a whole number, as in \d+; got 2.5"),
    ],
)
def test_options_of_the_wrong_type_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        resolve("grpo", **given)
