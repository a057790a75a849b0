"""The table of a run in a notebook."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("IPython")

from transformers import ProgressCallback
from transformers.utils.notebook import NotebookProgressCallback

from trl.callbacks.notebook import TableCallback, show_table


@pytest.fixture
def table(monkeypatch):
    """`table(eval_strategy)`: the callback at the beginning of a run, and its state."""
    monkeypatch.setattr("transformers.utils.notebook.disp.display", lambda *_, **__: SimpleNamespace(update=print))

    def begin(eval_strategy):
        args = SimpleNamespace(eval_strategy=eval_strategy)
        state = SimpleNamespace(global_step=0, max_steps=4, epoch=0.0, log_history=[])
        callback = TableCallback()
        callback.on_train_begin(args, state, None)
        return callback, args, state

    return begin


def log(callback, args, state, step, **logs):
    state.global_step = step
    state.log_history.append(logs)
    callback.on_log(args, state, None, logs=logs)


def test_reward_and_kl_stand_beside_the_loss(table):
    callback, args, state = table("no")
    log(callback, args, state, 1, loss=0.5, reward=0.1, kl=0.0, learning_rate=1e-5)
    log(callback, args, state, 2, loss=0.4, reward=0.3, kl=0.2)
    log(callback, args, state, 2, train_runtime=3.0)
    assert callback.training_tracker.inner_table == [
        ["Step", "Training Loss", "reward", "KL"],
        [1, 0.5, 0.1, 0.0],
        [2, 0.4, 0.3, 0.2],
    ]


def test_an_evaluation_fills_the_row_of_its_step(table):
    callback, args, state = table("steps")
    log(callback, args, state, 1, loss=0.5, reward=0.1)
    metrics = {"eval_loss": 0.6, "eval_reward": 0.2, "eval_runtime": 3.0}
    callback.on_evaluate(args, state, None, metrics=metrics)
    names, row = callback.training_tracker.inner_table
    assert dict(zip(names, row, strict=True)) == {
        "Step": 1,
        "Training Loss": 0.5,
        "Validation Loss": 0.6,
        "reward": 0.1,
        "Validation reward": 0.2,
    }
    assert len(metrics) == 3


def test_it_takes_the_place_of_the_other_table_alone():
    class Trainer:
        def __init__(self, *callbacks):
            self.callbacks = list(callbacks)

        def pop_callback(self, kind):
            found = [callback for callback in self.callbacks if type(callback) is kind]
            self.callbacks = [callback for callback in self.callbacks if callback not in found]
            return found[0] if found else None

        def add_callback(self, callback):
            self.callbacks.append(callback)

    trainer = Trainer(NotebookProgressCallback())
    show_table(trainer)
    assert trainer.callbacks == [TableCallback]
    bars = Trainer(ProgressCallback())
    show_table(bars)
    assert [type(callback) for callback in bars.callbacks] == [ProgressCallback]
