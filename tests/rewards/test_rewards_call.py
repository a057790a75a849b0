"""Calling reward functions: what they may be, and what is said of those that fail."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from functools import partial

import pytest
import torch

from trl.errors import ConfigError
from trl.rewards.call import Rewarded, RewardError, call_rewards, warn_of_none
from trl.rewards.pictures import PictureSamples
from trl.rewards.reward import Samples, check_columns, make_rewards

SAMPLES = Samples(["p", "q", "r"], ["aa", "b", "ccc"], {"answer": [1, 2, 3]}, {"step": 7})


def rewards_of(*functions, **options):
    return call_rewards(make_rewards(list(functions)), SAMPLES, **options)


def lengths(completions, **_):
    return [len(c) for c in completions]


def test_columns_and_extras_come_by_name():
    def reward(prompts, completions, answer, step):
        return [a * step + len(c) for a, c in zip(answer, completions, strict=True)]

    assert rewards_of(reward).values.tolist() == [[9.0], [15.0], [24.0]]


def test_an_error_of_a_function_that_stays_here_is_named(caplog):
    """A lock cannot be sent to a process of its own."""
    lock = threading.Lock()

    def locked(completions, **_):
        with lock:
            raise ValueError("mine")

    with pytest.raises(RewardError, match="'locked' raised ValueError: mine"):
        rewards_of(locked, timeout=60.0)
    assert "'locked'" in caplog.text


def test_samples_without_any_reward_are_said_once(caplog):
    """One of four: another has a reward of one function, and a third one failed."""
    rewards, nan = make_rewards([lengths, lengths]), math.nan
    values = torch.tensor([[nan, nan], [nan, 1.0], [nan, nan], [1.0, 1.0]])
    failed = torch.tensor([[False, False], [False, False], [True, False], [False, False]])
    warn_of_none(rewards, Rewarded(values[1:], failed[1:]))
    assert not caplog.text
    for _ in range(2):
        warn_of_none(rewards, Rewarded(values, failed))
    assert caplog.text.count("1 of 4 samples got no reward: lengths, lengths_2") == 1


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
        (
            lambda completions, anwser: [],
            "'<lambda>' has the argument 'anwser', which is not a column .* Did you mean 'answer'",
        ),
        (lambda x, /: [], "'<lambda>' takes 'x' by position only, but arguments are passed by name"),
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


def exits(completions, **_):
    if "b" in completions:
        sys.exit(0)
    return lengths(completions)


async def exits_later(**_):
    raise SystemExit(0)


def interrupts(**_):
    raise KeyboardInterrupt


class Own(BaseException):
    pass


def raises_own(**_):
    raise Own(1)


class Shy:
    def __repr__(self):
        raise RuntimeError("no")


FAILURES = {
    "raises": (
        fragile,
        r"'fragile' raised ZeroDivisionError: division by zero. Sample 2 of 3: prompt 'q', completion 'b'",
    ),
    "length": (lambda **_: [1.0], "gave 1 reward for 3 samples: it has to give one each"),
    "nan": (lambda **_: [0, 0, float("nan")], r"gave nan .*Sample 3 of 3: prompt 'r'"),
    "infinite": (lambda **_: [0, float("inf"), 0], "gave inf .*Sample 2 of 3"),
    "text": (lambda **_: ["high", 0, 0], r"gave a str \('high'\) where a number belongs. Sample 1"),
    "digits": (lambda **_: "123", "gave a str: it has to give a list"),
    "a number": (lambda **_: torch.tensor(1.0), "gave a Tensor: it has to give a list"),
    "mapping": (lambda **_: {0: 1.0, 1: 1.0, 2: 1.0}, "gave a dict: it has to give a list"),
    "a digit": (lambda **_: ["1", 0, 0], r"gave a str \('1'\) where a number belongs. Sample 1"),
    "large": (lambda **_: [0, 10**400, 0], r"gave 1000.*, which float32 cannot hold. Sample 2 of 3: prompt 'q'"),
    "very large": (lambda **_: [10**5000, 0, 0], "which float32 cannot hold. Sample 1 of 3"),
    "beyond float32": (lambda **_: [0, 0, -1e39], r"gave -1e\+39, which float32 cannot hold. Sample 3"),
    "complex": (lambda **_: [0, 1j, 0], r"gave a complex \(1j\) where a number belongs. Sample 2"),
    "vectors": (lambda **_: torch.zeros(3, 2), "gave a Tensor .* where a number belongs. Sample 1"),
    "generator": (lambda completions, **_: (1.0 for _ in completions), "gave a generator: it has to give a list"),
    "exits": (exits, "'exits' raised SystemExit: 0. Sample 2 of 3: prompt 'q', completion 'b'"),
    "exits, async": (exits_later, "'exits_later' raised SystemExit: 0. Sample 1 of 3, as 2 of the others"),
    "interrupts": (interrupts, "'interrupts' raised KeyboardInterrupt: . Sample 1"),
    "an exception of its own": (raises_own, "'raises_own' raised Own: 1. Sample 1"),
    "a text that cannot be shown": (lambda **_: [Shy(), 0, 0], r"gave a Shy \(Shy \(no\)\) where a number belongs"),
    "nothing": (lambda **_: None, "gave a NoneType: it has to give a list"),
    "slow": (lambda **_: time.sleep(5), "took longer than 0.2 s. Sample 1 of 3"),
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


def test_columns_do_not_stand_for_what_was_sampled(caplog):
    """A dataset may have answers of its own in a column `completions`."""
    columns = {"completions": ["theirs"], "prompts": ["other"], "log_metric": [0]}
    given = Samples(["p"], ["sampled"], columns, {"log_metric": print}).keywords
    assert (given["prompts"], given["completions"], given["log_metric"]) == (["p"], ["sampled"], print)
    drawn = PictureSamples.of(["p"], torch.zeros(1, 3, 2, 2), [], {"images": ["theirs"]}, {}).keywords["images"]
    assert drawn.shape == (1, 3, 2, 2)
    check_columns(make_rewards(lengths), ["completions", "answer"])
    assert "not passed the columns ['completions'] of the dataset" in caplog.text


def test_the_first_failure_that_is_dropped_is_said(caplog):
    reward, samples = make_rewards(fragile), Samples(["p"] * 2, ["aa", "b"])
    call_rewards(reward, samples, on_error="drop")
    call_rewards(reward, samples, on_error="drop")
    assert caplog.text.count("Reward function 'fragile' raised") == 1
    assert "completion 'b'" in caplog.text
    assert "counted in failed_rewards" in caplog.text


@pytest.mark.parametrize(
    "function", [exits, lambda completions, **_: [10**400 if c == "b" else 1 for c in completions]]
)
def test_whatever_fails_can_be_dropped(function):
    found = rewards_of(function, on_error="drop")
    assert found.failed.flatten().tolist() == [False, True, False]
    assert found.values[[0, 2]].isfinite().all()


def test_a_signal_is_no_failure_of_a_function():
    """Ctrl-C while a reward function runs ends the program, as it does anywhere else."""
    with pytest.raises(KeyboardInterrupt):
        rewards_of(lambda **_: signal.raise_signal(signal.SIGINT), on_error="drop")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- with a limit, in processes of their own ----


def backtracks(completions, **_):
    """A regular expression that takes longer than the universe has, and holds the interpreter's lock meanwhile."""
    return [float(bool(re.match(r"(a+)+$", "a" * 60 + "b" if c == "b" else "a"))) for c in completions]


async def blocks(completions, **_):
    return backtracks(completions)


def leaves(completions, **_):
    if "b" in completions:
        os._exit(7)
    return lengths(completions)


@pytest.mark.parametrize("function", [backtracks, blocks])
def test_limits_hold_for_code_that_never_yields(function):
    with pytest.raises(RewardError, match=rf"{function.__name__!r} took longer than 2 s. Sample 2 of 3: prompt 'q'"):
        rewards_of(function, timeout=2)


def test_what_hangs_or_ends_its_process_can_be_dropped():
    found = rewards_of(backtracks, leaves, timeout=2, on_error="drop")
    assert found.failed.tolist() == [[False, False], [True, True], [False, False]]
    assert found.values[2].tolist() == [1, 3]
    with pytest.raises(RewardError, match="'leaves' ended its process with status 7. Sample 2 of 3"):
        rewards_of(leaves, timeout=60)


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, completions, log_metric, **_):
        self.calls += 1
        log_metric("calls", self.calls)
        return [self.calls] * len(completions)


def test_a_process_is_kept_and_its_logs_come_back():
    rewards, logged = make_rewards([Counter()]), []
    samples = Samples(["p"], ["a"], {}, {"log_metric": lambda *given: logged.append(given)})
    for _ in range(2):
        call_rewards(rewards, samples, timeout=60)
    assert logged == [("calls", 1), ("calls", 2)]
    worker = rewards[0].worker
    pid = worker._process.pid
    worker.end()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_errors_of_other_processes_tell_where():
    with pytest.raises(
        RewardError, match="'fragile' raised ZeroDivisionError: division by zero. Sample 2 of 3"
    ) as error:
        rewards_of(fragile, timeout=60)
    assert "in fragile" in error.value.__cause__.__notes__[0]


def test_what_cannot_be_sent_stays_and_is_told_of(caplog):
    lock = threading.Lock()

    def reward(completions, **_):
        with lock:
            return lengths(completions)

    with caplog.at_level(logging.WARNING, "trl"):
        assert rewards_of(reward, timeout=60).values.flatten().tolist() == [2, 1, 3]
    assert "'reward' runs in the trainer's process, where reward_timeout cannot stop code" in caplog.text
    with pytest.raises(RewardError, match="took longer than 0.2 s"):
        rewards_of(lambda **_: (lock, time.sleep(5)), timeout=0.2)


def test_what_is_no_reward_function():
    with pytest.raises(ConfigError, match="reward_funcs holds a int"):
        make_rewards(3)
    with pytest.raises(ConfigError, match="reward_funcs is missing"):
        make_rewards([])
    with pytest.raises(ConfigError, match="reward_processing_classes has 2 values for 1 reward function:"):
        make_rewards([lengths], processing_classes=[None, None])
    with pytest.raises(ConfigError, match="Unknown on_reward_error 'skip'"):
        rewards_of(lengths, on_error="skip")
