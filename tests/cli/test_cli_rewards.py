"""Reward functions found by name."""

import pytest

from trl.cli.rewards import RewardArguments, find_reward, reward_keywords
from trl.errors import ConfigError


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def short(completions, **_):\n    return [-len(c) for c in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)


@pytest.mark.parametrize(
    "name", ["my_rewards.py:short", "./my_rewards.py:short", "my_rewards:short", "my_rewards.short"]
)
def test_functions(rewards, name):
    assert find_reward(name)(["ab", "c"]) == [-2, -1]


def test_models_are_left_to_the_trainer(rewards, tmp_path):
    (tmp_path / "model").mkdir()
    assert find_reward("org/reward-model") == "org/reward-model"
    assert find_reward("model") == "model"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_rewards.py:shrot",
            r"reward_funcs='my_rewards.py:shrot': my_rewards has no 'shrot'. Did you mean 'short'\?",
        ),
        ("nowhere.py:short", "reward_funcs: there is no file 'nowhere.py'"),
        ("nowhere.short", "reward_funcs='nowhere.short': there is no module 'nowhere'"),
        ("shrot", "trl.rewards has no 'shrot'"),
    ],
)
def test_refused(rewards, name, message):
    with pytest.raises(ConfigError, match=message):
        find_reward(name)


def test_arguments_become_a_keyword(rewards):
    arguments = RewardArguments(["my_rewards:short"], "org/reward-model")
    function, model = reward_keywords(arguments)["reward_funcs"]
    assert (function(["a"]), model) == ([-1], "org/reward-model")
    with pytest.raises(ConfigError, match="reward_funcs is missing"):
        reward_keywords(RewardArguments())
