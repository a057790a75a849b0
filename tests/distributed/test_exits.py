"""A process that loses another one says so in one line."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from trl.training.parallel import explain_waits, has_exited, tell_exits_shortly

PAIR = SimpleNamespace(process_index=1, world_size=2, ddp_timeout=9)
PEER = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3301"
OTHERS = [RuntimeError(words) for words in ("out of memory", "DataLoader timed out", "hub: connection reset by peer")]


@pytest.fixture
def hook(monkeypatch):
    """The hook of uncaught errors, which is put back."""
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(error))
    tell_exits_shortly(PAIR)
    once = sys.excepthook
    tell_exits_shortly(PAIR)
    assert sys.excepthook is once
    return SimpleNamespace(call=once, told=told)


def test_a_lost_process_is_told_in_one_line(hook, capsys):
    hook.call(RuntimeError, RuntimeError(PEER), None)
    assert capsys.readouterr().err.startswith("Process 1 of 2 ends, since another process has failed")
    assert hook.told == []


@pytest.mark.parametrize("error", [*OTHERS, ValueError(PEER)])
def test_other_errors_are_told_as_they_were(hook, error):
    hook.call(type(error), error, None)
    assert hook.told == [error]


def test_a_lost_process_in_training_is_one_too():
    words = "Process 1 of 2 waited .* one of them has exited"
    with pytest.raises(RuntimeError, match=words) as found, explain_waits(PAIR, lambda: 3):
        raise RuntimeError(PEER)
    assert has_exited(found.value)


@pytest.mark.parametrize("error", OTHERS)
def test_other_errors_in_training_stay_what_they_are(error):
    with pytest.raises(RuntimeError) as found, explain_waits(PAIR, lambda: 3):
        raise error
    assert found.value is error


def test_a_process_alone_keeps_its_hook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", before := sys.excepthook)
    tell_exits_shortly(SimpleNamespace(process_index=0, world_size=1))
    assert sys.excepthook is before
