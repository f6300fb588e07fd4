"""Several rewards as one number: values against plain sums, missing rewards, and the number that advantages are taken of."""

import math

import pytest
import torch
from preference_runs import rows_of
from test_recipes import arguments, task  # noqa: F401  (a fixture)

from fastalign.recipes import online
from fastalign.rewards import load_rewards
from fastalign.rewards.combinations import COMBINATIONS

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
