"""Advantages against loops over the papers' equations in Python floats."""

import itertools
import math
import statistics

import pytest
import torch

from fastalign.advantages import ADVANTAGES, dr_grpo, grpo, lite_ppo, maxrl, opo, passk, reinforce_pp, reinforce_pp_baseline, remax, rloo

NAN = math.nan


def ragged():
    torch.manual_seed(0)
    return torch.rand(9), torch.tensor([0, 4, 5, 9])


def by_group(rewards, cu, f):
    out = []
    for a, b in itertools.pairwise(cu):
        out += f([float(r) for r in rewards[a:b]])
    return torch.tensor(out)


def test_grpo_equals_the_equation_on_ragged_groups():
    rewards, cu = ragged()
    expected = by_group(
        rewards, cu, lambda g: [0.0] if len(g) == 1 else [(r - statistics.mean(g)) / (statistics.stdev(g) + 1e-4) for r in g]
    )
    torch.testing.assert_close(grpo(rewards, cu), expected, atol=1e-5, rtol=1e-5)


def test_dr_grpo_and_rloo_equal_their_equations():
    rewards, cu = ragged()
    mean = by_group(rewards, cu, lambda g: [r - statistics.mean(g) for r in g])
    torch.testing.assert_close(dr_grpo(rewards, cu), mean, atol=1e-6, rtol=1e-5)
    others = by_group(rewards, cu, lambda g: [0.0 if len(g) == 1 else r - (sum(g) - r) / (len(g) - 1) for r in g])
    torch.testing.assert_close(rloo(rewards, cu), others, atol=1e-6, rtol=1e-5)


def test_reinforce_pp_normalizes_over_the_batch():
    rewards, cu = ragged()
    values = rewards.tolist()
    expected = torch.tensor([(r - statistics.mean(values)) / statistics.stdev(values) for r in values])
    torch.testing.assert_close(reinforce_pp(rewards, cu), expected, atol=1e-5, rtol=1e-5)
    centred = by_group(rewards, cu, lambda g: [r - statistics.mean(g) for r in g]).tolist()
    expected = torch.tensor([(c - statistics.mean(centred)) / statistics.stdev(centred) for c in centred])
    torch.testing.assert_close(reinforce_pp_baseline(rewards, cu), expected, atol=1e-5, rtol=1e-5)


def test_lite_ppo_divides_by_the_deviation_of_all_rewards():
    rewards, cu = ragged()
    deviation = statistics.stdev(rewards.tolist())
    expected = by_group(rewards, cu, lambda g: [(r - statistics.mean(g)) / (deviation + 1e-4) for r in g])
    torch.testing.assert_close(lite_ppo(rewards, cu), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(lite_ppo(rewards, cu), reinforce_pp_baseline(rewards, cu), rtol=0.01)  # another deviation


def test_opo_baseline_weighs_by_length():
    rewards, cu = ragged()
    lengths = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])
    expected = []
    for a, b in itertools.pairwise(cu.tolist()):
        r, n = rewards[a:b].tolist(), lengths[a:b].tolist()
        baseline = sum(x * y for x, y in zip(r, n, strict=True)) / sum(n)
        expected += [0.0] if len(r) == 1 else [x - baseline for x in r]
    torch.testing.assert_close(opo(rewards, cu, lengths), torch.tensor(expected), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(opo(rewards, cu), dr_grpo(rewards, cu), atol=1e-6, rtol=1e-5)
    assert not opo(rewards, cu, torch.zeros(9)).isnan().any()


def test_remax_subtracts_the_greedy_reward():
    rewards, cu = ragged()
    got = remax(rewards, cu, torch.tensor([0.5, 0.25, NAN]))
    torch.testing.assert_close(got, torch.cat([rewards[:4] - 0.5, rewards[4:5] - 0.25, torch.zeros(4)]))
    with pytest.raises(ValueError, match="one greedy reward a group, 3, got 2"):
        remax(rewards, cu, torch.zeros(2))


def test_maxrl_divides_by_the_mean_and_is_the_gradient_of_the_truncated_likelihood():
    rewards, cu = ragged()
    expected = by_group(rewards, cu, lambda g: [0.0] if len(g) == 1 else [(r - statistics.mean(g)) / statistics.mean(g) for r in g])
    torch.testing.assert_close(maxrl(rewards, cu), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(maxrl(torch.zeros(1, 4)), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="expected rewards >= 0"):
        maxrl(torch.tensor([[1.0, -1.0]]))
    # over all groups of G draws of a success of probability p: the gradient of Σ_{k < G} -(1 - p)^k / k
    p, size, total = 0.3, 4, 0.0
    for draws in itertools.product([0.0, 1.0], repeat=size):
        chance = math.prod(p if d else 1 - p for d in draws)
        score = [1 / p if d else -1 / (1 - p) for d in draws]
        total += chance * sum(a * s for a, s in zip(maxrl(torch.tensor([draws]))[0].tolist(), score, strict=True)) / size
    assert total == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, size)), abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("group", [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0, 0, 1]])
def test_passk_is_the_mean_over_all_subsets(k, group):
    size, k_here = len(group), min(k, len(group))
    subsets = list(itertools.combinations(range(size), k_here))
    reward = {s: float(any(group[i] for i in s)) for s in subsets}
    mean, deviation = statistics.mean(reward.values()), statistics.pstdev(reward.values())
    expected = []
    for i in range(size):
        own = [(reward[s] - mean) / deviation if deviation else 0.0 for s in subsets if i in s]
        expected.append(statistics.mean(own))
    got = passk(torch.tensor([group], dtype=torch.float32), k=k)
    torch.testing.assert_close(got[0], torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_passk_options_are_checked():
    with pytest.raises(ValueError, match="k must be >= 0, got -1"):
        passk(torch.rand(1, 4), k=-1)
    assert torch.equal(passk(torch.eye(6)[:2]), passk(torch.eye(6)[:2], k=3))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_square_and_flat_agree(name):
    torch.manual_seed(1)
    rewards = torch.rand(3, 4)
    flat = ADVANTAGES[name](rewards.view(-1), torch.tensor([0, 4, 8, 12]))
    assert torch.equal(ADVANTAGES[name](rewards).view(-1), flat)


@pytest.mark.parametrize("value", [0.1, 0.7, 1.1])
def test_reinforce_pp_constant_batch_is_exactly_zero(value):
    assert torch.equal(reinforce_pp(torch.full((3, 8), value)), torch.zeros(3, 8))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "opo", "maxrl", "passk"])
def test_advantages_constant_group_is_exactly_zero(name):
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.3, 0.3, 0.3]])
    assert torch.equal(ADVANTAGES[name](rewards), torch.zeros(2, 3))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_missing_reward_is_skipped_and_zero(name):
    with_missing = ADVANTAGES[name](torch.tensor([1.0, NAN, 0.0, 0.5, NAN]), torch.tensor([0, 3, 5]))
    without = ADVANTAGES[name](torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 2, 3]))
    assert with_missing[1] == 0
    assert with_missing[4] == 0
    torch.testing.assert_close(with_missing[[0, 2, 3]], without)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_all_missing_group_of_one_and_empty_give_no_nan(name):
    assert not ADVANTAGES[name](torch.tensor([NAN, NAN, 1.0]), torch.tensor([0, 2, 2, 3])).isnan().any()
    assert ADVANTAGES[name](torch.zeros(0), torch.tensor([0])).numel() == 0


def test_advantages_report_bad_input():
    with pytest.raises(ValueError, match="without cu_groups"):
        grpo(torch.rand(4))
    with pytest.raises(ValueError, match="from 0 to 4 rewards"):
        grpo(torch.rand(4), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="got inf"):
        grpo(torch.tensor([[1.0, math.inf]]))
