"""Reward-model losses against the papers' equations, written out in fp64, and their gradients."""

import math
from itertools import combinations, permutations

import pytest
import torch

from fastalign import catalogue
from fastalign.losses.reward import (
    REWARD,
    aggregate_steps,
    attributes,
    bradley_terry,
    outcome,
    plackett_luce,
    process,
)

SIZES = [2, 5, 1, 3, 2]


def ranked(seed: int = 0, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return scale * torch.randn(sum(SIZES), dtype=torch.float64), torch.tensor([0, *SIZES]).cumsum(0)


def groups(scores, cu):
    return [scores[b:e].tolist() for b, e in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]


def test_reward_rows_agree_with_the_catalogue():
    assert set(REWARD) == set(catalogue.REWARD_LOSSES)
    assert {row.reads for row in REWARD.values()} == {"rankings", "outcomes", "steps", "attributes"}


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_is_the_mean_over_all_pairs_of_a_ranking(coefficient, with_margin, soft):
    scores, cu = ranked()
    margin = torch.tensor([0.5, 1.0, 2.0, 0.0, -1.0], dtype=torch.float64) if with_margin else None
    probability = torch.tensor([0.7, 1.0, 0.5, 0.0, 0.9], dtype=torch.float64) if soft else None
    got = bradley_terry(scores, cu, margin=margin, probability=probability, center_rewards_coefficient=coefficient)
    for p, rewards in enumerate(groups(scores, cu)):
        m, sure = 0.0 if margin is None else float(margin[p]), 1.0 if probability is None else float(probability[p])
        terms = [
            sure * math.log1p(math.exp(-(w - l - m))) + (1 - sure) * math.log1p(math.exp(-(l - w - m))) + coefficient * (w + l) ** 2
            for w, l in combinations(rewards, 2)
        ]
        assert abs(float(got[p]) - (sum(terms) / len(terms) if terms else 0.0)) < 1e-12


def test_a_soft_label_is_learned_as_its_own_log_odds():
    scores = torch.tensor([math.log(0.8 / 0.2), 0.0], dtype=torch.float64, requires_grad=True)
    bradley_terry(scores, torch.tensor([0, 2]), probability=torch.tensor([0.8], dtype=torch.float64)).sum().backward()
    assert scores.grad.abs().max() < 1e-15


def test_plackett_luce_is_the_probability_of_the_ranking():
    scores, cu = ranked(1)
    got = plackett_luce(scores, cu)
    for p, rewards in enumerate(groups(scores, cu)):
        probability = 1.0
        for i in range(len(rewards)):
            probability *= math.exp(rewards[i]) / sum(math.exp(r) for r in rewards[i:])
        assert abs(float(got[p]) + math.log(probability)) < 1e-12
    three = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    total = sum(math.exp(-float(plackett_luce(three[list(order)], torch.tensor([0, 3])))) for order in permutations(range(3)))
    assert abs(total - 1.0) < 1e-12  # the probabilities of all rankings


def test_plackett_luce_of_pairs_is_bradley_terry():
    scores = torch.randn(12, dtype=torch.float64)
    cu = torch.arange(0, 13, 2)
    assert (plackett_luce(scores, cu) - bradley_terry(scores, cu)).abs().max() < 1e-12


@pytest.mark.parametrize("function", [outcome, process])
def test_label_losses_are_the_binary_cross_entropy(function):
    scores, labels = 3 * torch.randn(20, dtype=torch.float64), (torch.rand(20) < 0.5).double()
    labels[3] = 0.25
    p = 1 / (1 + torch.exp(-scores))
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log())
    assert (function(scores, labels) - expected).abs().max() < 1e-12


def test_attributes_are_the_squared_error_of_what_is_stated():
    scores = 3 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    nan = math.nan
    labels = torch.tensor([[4.0, 0.0, 2.0], [nan, 1.5, nan], [3.0, nan, -1.0], [nan, nan, nan]], dtype=torch.float64)
    got = attributes(scores.requires_grad_(), labels)
    for b in range(4):
        terms = [(float(scores[b, k]) - float(labels[b, k])) ** 2 for k in range(3) if not math.isnan(labels[b, k])]
        assert abs(float(got[b].detach()) - (sum(terms) / len(terms) if terms else 0.0)) < 1e-12
    got.sum().backward()
    assert torch.equal(scores.grad == 0, labels.isnan())
    assert torch.isfinite(scores.grad).all()
    assert attributes(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("name", list(REWARD))
def test_reward_gradients(name):
    scores, cu = ranked(2)
    labels = (torch.rand(scores.numel()) < 0.5).double()
    row = REWARD[name]
    given = cu if row.reads == "rankings" else labels
    if row.reads == "attributes":
        scores, given = (
            scores[:12].view(4, 3),
            labels[:12].view(4, 3).index_put((torch.tensor([1]), torch.tensor([2])), torch.tensor(math.nan).double()),
        )
    numbers = torch.full((5,), 0.4).double()
    options = {"margin": numbers, "probability": numbers, "center_rewards_coefficient": 0.2} if "margin" in row.options else {}
    assert torch.autograd.gradcheck(lambda s: row.function(s, given, **options), scores.requires_grad_())


def test_bradley_terry_gradient_is_minus_the_probability_of_the_wrong_order():
    scores = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)
    bradley_terry(scores, torch.tensor([0, 2])).sum().backward()
    wrong = 1 / (1 + math.exp(2.0))
    assert (scores.grad - torch.tensor([-wrong, wrong], dtype=torch.float64)).abs().max() < 1e-15


@pytest.mark.parametrize("function", [bradley_terry, plackett_luce])
def test_a_ranking_of_one_ties_and_huge_scores_stay_finite(function):
    scores = torch.tensor([7.0, 1e4, -1e4, -1e4, 1e4, 0.5, 0.5, 0.5], requires_grad=True)
    cu = torch.tensor([0, 1, 3, 5, 8])
    loss = function(scores, cu)
    loss.sum().backward()
    tie = math.log(2.0) if function is bradley_terry else math.log(6.0)
    assert torch.allclose(loss, torch.tensor([0.0, 0.0, 2e4, tie]))
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[0] == 0
    assert torch.equal(scores.grad[3:5], torch.tensor([-1.0, 1.0]))


def test_losses_of_nothing_are_empty():
    nothing = torch.zeros(0)
    for function in (bradley_terry, plackett_luce):
        assert function(nothing, torch.tensor([0])).shape == (0,)
        assert torch.equal(function(torch.ones(1), torch.tensor([0, 1])), torch.zeros(1))
    assert outcome(nothing, nothing).shape == (0,)


def test_label_losses_of_huge_scores_stay_finite():
    scores = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    loss = outcome(scores, torch.tensor([1.0, 0.0, 0.0, 1.0]))
    loss.sum().backward()
    assert torch.equal(loss.detach(), torch.tensor([0.0, 0.0, 1e4, 1e4]))
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("product", [0.5 * 0.8 * 0.9, 0.3]), ("min", [0.5, 0.3]), ("last", [0.9, 0.3]), ("sum", [2.2, 0.3])],
)
def test_steps_are_aggregated(aggregation, expected):
    values = torch.tensor([0.5, 0.8, 0.9, 0.3], dtype=torch.float64)
    got = aggregate_steps(values, torch.tensor([0, 3, 4, 4]), aggregation)
    assert torch.allclose(got[:2], torch.tensor(expected, dtype=torch.float64))
    assert got[2].isnan()


def test_an_unknown_aggregation_names_the_valid_ones():
    with pytest.raises(ValueError, match="expected one of product, min, last, sum; got 'mean'"):
        aggregate_steps(torch.ones(2), torch.tensor([0, 2]), "mean")
