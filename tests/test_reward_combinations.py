"""Several rewards as one number: values against plain sums, missing rewards, and the number that advantages are taken of."""

import math

import pytest
import torch
from plain_rewards import halves, known_below_four
from preference_runs import rows_of
from test_recipes import arguments, task  # noqa: F401  (a fixture)

from fastalign.algorithms import resolve
from fastalign.data import Prompt
from fastalign.recipes import online
from fastalign.recipes.online_arguments import OnlineArguments
from fastalign.recipes.online_rewards import check_combination
from fastalign.recipes.scored_rollouts import score
from fastalign.rewards import load_rewards
from fastalign.rewards.combinations import COMBINATIONS
from fastalign.rollout import Rollout, Sample

NAN = math.nan
GROUP = [
    {"format": 1.0, "right": 0.0, "short": 0.3},
    {"format": 0.0, "right": 1.0, "short": 0.2},
    {"format": 1.0, "right": 1.0, "short": NAN},
]
WEIGHTS = {"format": 1.0, "right": 2.0, "short": 0.5}


def test_sum_gate_and_normalize_are_what_they_say():
    assert COMBINATIONS["sum"](GROUP, WEIGHTS) == pytest.approx([1.15, 2.1, 3.0])
    assert COMBINATIONS["gate"](GROUP, WEIGHTS) == pytest.approx([0.15, 0.0, 2.0])
    columns = {name: torch.tensor([rewards[name] for rewards in GROUP], dtype=torch.float64) for name in WEIGHTS}
    expected = torch.zeros(3, dtype=torch.float64)
    for name, values in columns.items():
        there = ~values.isnan()
        mean, deviation = values[there].mean(), values[there].std()
        expected += WEIGHTS[name] * torch.where(there, (values - mean) / (deviation + 1e-4), 0.0)
    assert COMBINATIONS["normalize"](GROUP, WEIGHTS) == pytest.approx(expected.tolist())


def test_missing_and_constant_rewards():
    missing = [{"a": NAN, "b": 1.0}, {"a": 1.0, "b": NAN}, {"a": NAN, "b": NAN}, {"a": 0.5, "b": 4.0}]
    weights = {"a": 1.0, "b": 1.0}
    assert COMBINATIONS["sum"](missing, weights) == pytest.approx([1.0, 1.0, NAN, 4.5], nan_ok=True)
    assert COMBINATIONS["gate"](missing, weights) == pytest.approx([NAN, NAN, NAN, 2.0], nan_ok=True)
    alike = [{"a": 2.0, "b": 1.0}, {"a": 2.0, "b": 3.0}]
    got = COMBINATIONS["normalize"](alike, weights)
    assert got[1] == pytest.approx(-got[0])
    assert got[1] == pytest.approx(1.0 / (math.sqrt(2.0) + 1e-4))
    assert COMBINATIONS["normalize"](alike[:1], weights) == [3.0], "a group of one is added up"
    assert COMBINATIONS["normalize"](missing[2:3] * 2, weights) == pytest.approx([NAN, NAN], nan_ok=True)


def test_what_does_not_combine_is_named():
    with pytest.raises(ValueError, match="expected one of sum, gate, normalize; got 'product'"):
        load_rewards(["length:target=4"], combination="product")
    with pytest.raises(ValueError, match="the first reward is the gate of the others, got one"):
        load_rewards(["length:target=4"], combination="gate")


def test_training_takes_the_combined_number(task, tmp_path):  # noqa: F811
    rewards = [f"{task / 'reward.py'}:parity", "length:target=3"]
    args = arguments(task, tmp_path, "grpo", online={"reward": rewards, "reward_combination": "gate"}, optim={"max_steps": 2})
    online.run(args)
    row = next(row for row in rows_of(tmp_path) if "loss" in row)
    assert row["rewards/parity/mean"] + row["rewards/length/mean"] > row["reward"] + 0.05
    assert row["reward"] <= min(row["rewards/parity/mean"], row["rewards/length/mean"]) + 1e-9


def judged(rewards, lengths, beside):
    """Samples of one prompt with these lengths, an environment's reward each, and what `rewards` give them."""
    samples = [Sample([1] * n, [0.0] * n, [0.0] * n, text="a" * n, rewards={"environment/E": 3.0}) for n in lengths]
    rollout = Rollout([[5]], [samples], [{}])
    with rewards:
        score(rewards, [Prompt([5], "p", {}, 0)], rollout, beside=beside)
    return samples


def test_what_an_environment_gave_is_added_to_what_the_others_come_to():
    for combination, own in (("gate", [1.0, 1.5, 0.0]), ("sum", [2.0, 2.5, 2.0])):
        rewards = load_rewards([known_below_four, halves], combination=combination)
        samples = judged(rewards, [2, 3, 4], {"environment/E": 2.0})
        weights = rewards.weights | {"environment/E": 2.0}
        assert [s.reward(weights) for s in samples] == pytest.approx([6.0 + part for part in own])


def test_shaping_is_added_last_and_is_no_reward_of_its_own():
    """DAPO's punishment: neither a factor of a gate, nor what makes a missing reward a 0, nor what makes a group's samples differ."""
    shaping = ["overlong:max_length=4,buffer=2"]
    rewards = load_rewards([known_below_four, halves], combination="gate", shaping=shaping)
    samples = judged(rewards, [2, 3, 4], {})
    assert [s.reward(rewards.weights) for s in samples] == pytest.approx([1.0, 1.5 - 0.5, NAN], nan_ok=True)
    assert [s.unshaped_reward(rewards.weights) for s in samples] == pytest.approx([1.0, 1.5, NAN], nan_ok=True)
    rewards = load_rewards([known_below_four], shaping=shaping)
    samples = judged(rewards, [1, 3, 4], {})
    assert [s.reward(rewards.weights) for s in samples] == pytest.approx([1.0, 0.5, NAN], nan_ok=True)
    assert {s.unshaped_reward(rewards.weights) for s in samples[:2]} == {1.0}
    with pytest.raises(ValueError, match="the first reward is the gate of the others, got one"):
        load_rewards([halves], combination="gate", shaping=shaping)


@pytest.mark.parametrize("name", ["remax", "maxrl", "xpo", "nash_md", "prime"])
def test_relative_rewards_are_refused_where_they_are_compared_beyond_their_group(name):
    with pytest.raises(ValueError, match="normalize: rewards become relative to their own group, and this algorithm compares them"):
        check_combination(OnlineArguments(reward=["a"], reward_combination="normalize"), resolve(name))
    check_combination(OnlineArguments(reward=["a", "b"], reward_combination="gate"), resolve(name))


def test_nothing_to_combine_is_an_error():
    with pytest.raises(ValueError, match="--reward_combination gate: there is no --reward to combine"):
        check_combination(OnlineArguments(reward_combination="gate"), resolve("grpo"))


def test_dapo_leaves_out_what_has_no_reward(task, tmp_path):  # noqa: F811
    source = "def some(completions, **k):\n    return [float(i % 2) if i % 4 else None for i in range(len(completions))]\n"
    (tmp_path / "some.py").write_text(source)
    own = {"reward": [f"{tmp_path / 'some.py'}:some"], "algorithm": "dapo"}
    online.run(arguments(task, tmp_path / "out", "grpo", online=own, optim={"max_steps": 1}))
    row = next(row for row in rows_of(tmp_path / "out") if "loss" in row)
    assert row["rewards/some/missing"] > 0
    assert row["reward"] > row["rewards/some/mean"] - 1 - 1e-6, "the mean of those that have a reward: a punishment alone is none"
