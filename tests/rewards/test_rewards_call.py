"""Calling reward functions: what they may be, and what is said of those that fail."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import pytest
import torch

from trl.errors import ConfigError
from trl.rewards.call import RewardError, Samples, call_rewards, check_columns, make_rewards

SAMPLES = Samples(["p", "q", "r"], ["aa", "b", "ccc"], {"answer": [1, 2, 3]}, {"step": 7})


def rewards_of(*functions, **options):
    return call_rewards(make_rewards(list(functions)), SAMPLES, **options)


def lengths(completions, **_):
    return [len(c) for c in completions]


def test_columns_and_extras_come_by_name():
    def reward(prompts, completions, answer, step):
        return [a * step + len(c) for a, c in zip(answer, completions, strict=True)]

    assert rewards_of(reward).values.tolist() == [[9.0], [15.0], [24.0]]


def test_a_function_is_given_what_it_names():
    def reward(completions, answer=None):
        return [len(c) + a for c, a in zip(completions, answer, strict=True)]

    async def other(prompts, missing=5):
        return [missing] * len(prompts)

    class Letters:
        def __call__(self, completions):
            return lengths(completions)

    found = rewards_of(reward, other, Letters(), partial(lengths))
    assert found.values.tolist() == [[3, 5, 2, 2], [3, 5, 1, 1], [6, 5, 3, 3]]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda completions, anwser: [], "'<lambda>' asks for 'anwser', which is no column .* Did you mean 'answer'"),
        (lambda x, /: [], "'<lambda>' takes 'x' by position, but arguments come by name"),
        (lambda texts=(): [], r"takes none of prompts, .* write it as \(completions, \*\*columns\)"),
    ],
)
def test_functions_that_cannot_be_called(function, words):
    check_columns(make_rewards([lengths, lambda completions, answer: []]), ["answer"])
    with pytest.raises(ConfigError, match=words):
        check_columns(make_rewards([lengths, function]), ["answer"])


def test_calls_that_fail_before_they_are_awaited():
    async def reward(completions, answer, more):
        return []

    with pytest.raises(
        RewardError, match=r"'reward' raised TypeError: .*missing 1 required positional argument: 'more'"
    ):
        rewards_of(reward)


def test_names_are_given_once():
    assert [r.name for r in make_rewards([lengths, lengths, slow, partial(lengths)])] == [
        "lengths",
        "lengths_2",
        "slow",
        "lengths_3",
    ]


def test_none_does_not_apply():
    found = rewards_of(lengths, lambda **_: [None, 1, None])
    assert found.values[:, 0].tolist() == [2, 1, 3]
    assert found.values[:, 1].isnan().tolist() == [True, False, True]
    assert not found.failed.any()


def test_tensors_and_booleans_are_numbers():
    found = rewards_of(lambda **_: torch.tensor([1, 2, 3]), lambda **_: [True, False, True])
    assert found.values.tolist() == [[1, 1], [2, 0], [3, 1]]


def test_async_functions_run_at_the_same_time():
    both = threading.Barrier(2, timeout=60)

    async def wait(completions, **_):
        await asyncio.to_thread(both.wait)
        return lengths(completions)

    class Judge:
        async def __call__(self, completions, **_):
            return await wait(completions)

    rewards = make_rewards([wait, Judge(), lengths])
    assert [reward.name for reward in rewards] == ["wait", "Judge", "lengths"]
    assert call_rewards(rewards, SAMPLES).values.tolist() == [[2, 2, 2], [1, 1, 1], [3, 3, 3]]


def test_async_functions_in_a_running_loop():
    async def reward(completions, **_):
        return lengths(completions)

    async def notebook():
        return rewards_of(reward)

    assert asyncio.run(notebook()).values.flatten().tolist() == [2, 1, 3]


def fragile(completions, **_):
    return [1 / (len(c) - 1) for c in completions]


async def slow(completions, **_):
    await asyncio.sleep(5)


FAILURES = {
    "raises": (
        fragile,
        r"'fragile' raised ZeroDivisionError: division by zero. Sample 1 of 3: prompt 'q', completion 'b'",
    ),
    "length": (lambda **_: [1.0], "gave 1 rewards for 3 samples: it has to give one each"),
    "nan": (lambda **_: [0, 0, float("nan")], r"gave nan .*Sample 2 of 3: prompt 'r'"),
    "infinite": (lambda **_: [0, float("inf"), 0], "gave inf .*Sample 1 of 3"),
    "text": (lambda **_: ["high", 0, 0], r"gave a str \('high'\) where a number belongs. Sample 0"),
    "digits": (lambda **_: "123", "gave a str: it has to give a list"),
    "a number": (lambda **_: torch.tensor(1.0), "gave a Tensor: it has to give a list"),
    "mapping": (lambda **_: {0: 1.0, 1: 1.0, 2: 1.0}, "gave a dict: it has to give a list"),
    "a digit": (lambda **_: ["1", 0, 0], r"gave a str \('1'\) where a number belongs. Sample 0"),
    "nothing": (lambda **_: None, "gave a NoneType: it has to give a list"),
    "slow": (lambda **_: time.sleep(5), "took longer than 0.2 s. Sample 0 of 3, as 2 of the others"),
    "async": (slow, "'slow' took longer than 0.2 s"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failures_name_function_and_sample(kind):
    function, words = FAILURES[kind]
    with pytest.raises(RewardError, match=words):
        rewards_of(lengths, function, timeout=0.2 if kind in ("slow", "async") else None)


def test_failures_can_be_dropped():
    for function in (fragile, lambda completions, **_: [c != "b" or float("nan") for c in completions]):
        found = rewards_of(lengths, function, on_error="drop")
        assert found.failed.tolist() == [[False, False], [False, True], [False, False]]
        assert found.values[:, 1].isnan().tolist() == [False, True, False]
    assert rewards_of(fragile, on_error="drop").values[2].item() == 0.5
    assert rewards_of(lambda **_: [], on_error="drop").failed.all()


def test_what_is_no_reward_function():
    with pytest.raises(ConfigError, match="reward_funcs holds a int"):
        make_rewards(3)
    with pytest.raises(ConfigError, match="reward_funcs is missing"):
        make_rewards([])
    with pytest.raises(ConfigError, match="reward_processing_classes has 2 entries for 1 reward functions"):
        make_rewards([lengths], processing_classes=[None, None])
    with pytest.raises(ConfigError, match="Unknown on_reward_error 'skip'"):
        rewards_of(lengths, on_error="skip")
