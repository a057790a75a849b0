"""How the demo's value model learns."""

from __future__ import annotations

import pytest
from torch import nn

from trl.demo.steps import value_first
from trl.trainers.ppo.config import PPOConfig


@pytest.mark.parametrize(
    ("steps", "at", "rates"),
    [
        (52, 0, [0.0, 1e-3]),
        (52, 3, [0.0, 1e-3]),
        (52, 4, [3e-4, 1e-3]),
        (52, 28, [1.5e-4, 5e-4]),
        (52, 52, [0.0, 0.0]),
        (2, 0, [3e-4, 1e-3]),
        (2, 1, [1.5e-4, 5e-4]),
    ],
)
def test_values_learn_alone_at_first(steps, at, rates, tmp_path):
    policy, value = nn.Linear(2, 2), nn.Linear(2, 1)
    args = PPOConfig(output_dir=str(tmp_path), max_steps=steps, learning_rate=3e-4)
    optimizer, schedule = value_first(policy, value, args)
    for _ in range(at):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx(rates)
    assert [group["params"] for group in optimizer.param_groups] == [
        list(policy.parameters()),
        list(value.parameters()),
    ]
