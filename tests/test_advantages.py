"""Advantages against loops over the papers' equations in Python floats."""

import itertools
import math
import statistics

import pytest
import torch

from fastalign.advantages import ADVANTAGES, dr_grpo, grpo, reinforce_pp, reinforce_pp_baseline, rloo

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


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_square_and_flat_agree(name):
    torch.manual_seed(1)
    rewards = torch.rand(3, 4)
    flat = ADVANTAGES[name](rewards.view(-1), torch.tensor([0, 4, 8, 12]))
    assert torch.equal(ADVANTAGES[name](rewards).view(-1), flat)


@pytest.mark.parametrize("value", [0.1, 0.7, 1.1])
def test_reinforce_pp_constant_batch_is_exactly_zero(value):
    assert torch.equal(reinforce_pp(torch.full((3, 8), value)), torch.zeros(3, 8))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
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
