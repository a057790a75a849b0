"""Reward functions found by name."""

import random
import sys

import pytest

from trl.cli.rewards import RequiredRewards, RewardArguments, find_reward
from trl.errors import ConfigError
from trl.rewards import accuracy_reward

FILE = """
from beside import LETTERS
from collections.abc import Sequence

def short(completions, **_):
    return [-len(c) for c in completions]

def wrong(text):
    return 0.0

class Count:
    def __init__(self, letter, times=1):
        self.letter, self.times = letter, times

    def __call__(self, completions):
        return [c.count(self.letter) * self.times for c in completions]
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """A folder with a module, as the current one, which Python does not search by itself."""
    (tmp_path / "my_rewards.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("LETTERS = 'ab'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in ("my_rewards", "my_rewards_py", "beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("my_rewards", "my_rewards_py", "beside"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name", ["my_rewards.py:short", "./my_rewards.py:short", "my_rewards:short", "my_rewards.short"]
)
def test_functions(rewards, name):
    assert find_reward(name)(["ab", "c"]) == [-2, -1]


def test_registered_names():
    assert find_reward("accuracy_reward") is accuracy_reward
    assert find_reward("trl.rewards:accuracy_reward") is accuracy_reward


def test_functions_made_from_options(rewards):
    assert find_reward("get_length_reward(target=10)")(completion_ids=[[0] * 5]) == [-0.5]
    assert find_reward("get_repetition_penalty_reward").ngram_size == 3
    assert find_reward("my_rewards.py:Count('a')")(["aab"]) == [2]
    assert find_reward("my_rewards:Count('a', times=3)")(["aab"]) == [6]


def test_a_file_hides_no_module(rewards, tmp_path):
    (tmp_path / "random.py").write_text("def reward(completions): return [0.5]")
    assert find_reward("random.py:reward")(["a"]) == [0.5]
    assert sys.modules["random"] is random


def test_models_are_left_to_the_trainer(rewards, tmp_path):
    (tmp_path / "model").mkdir()
    assert find_reward("org/reward-model") == "org/reward-model"
    assert find_reward("model") == "model"


REFUSED = {
    "my_rewards.py:shrot": r"my_rewards.py has no function 'shrot'. Did you mean 'short'\? It has .*short, wrong, Count",
    "my_rewards:LETTERS": "my_rewards.py has no function 'LETTERS'",
    "my_reward.py:short": r"there is no file 'my_reward.py'. Did you mean 'my_rewards.py'\?",
    "my_rewards.py": "names a file: give my_rewards.py:FUNCTION. It has .*short",
    "nowhere.short": "reward_funcs='nowhere.short': there is no module 'nowhere'",
    "trl.nowhere:short": "there is no module 'trl.nowhere'",
    "acuracy_reward": r"Unknown reward function 'acuracy_reward'. Did you mean 'accuracy_reward'.*your own function, write file.py",
    "my_rewards.py:wrong": "Reward function 'wrong' takes none of prompts, completions, completion_ids",
    "get_length_reward": r"get_length_reward needs the argument target: write 'get_length_reward\(target=…\)'",
    "get_length_reward(tarhet=3)": "Unknown argument of get_length_reward 'tarhet'. Did you mean 'target'",
    "get_length_reward(target=print)": r"write arguments as in get_length_reward\(target=100\)",
    "get_length_reward(target=)": "with plain values",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(rewards, name):
    with pytest.raises(ConfigError, match=REFUSED[name]):
        find_reward(name)


def test_arguments_become_a_keyword(rewards):
    arguments = RewardArguments(["my_rewards:short"], "org/reward-model")
    model, function = arguments.keywords()["reward_funcs"]
    assert (function(["a"]), model) == ([-1], "org/reward-model")
    with pytest.raises(ConfigError, match="reward_funcs is missing"):
        RequiredRewards()
