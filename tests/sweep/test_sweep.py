"""Sweeps: what is drawn, what is refused, and that Ray and this process give the same table."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from trl.cli.commands import tools
from trl.cli.main import main
from trl.cli.parser import read_yaml
from trl.errors import ConfigError
from trl.sweep.plan import Plan, Tuning
from trl.sweep.reporting import listening, report
from trl.sweep.space import STRATEGIES, Parameter, trials_of
from trl.sweep.trial import Trial, metrics_of

run = tools()["sweep"].start

SCRIPT = """
from trl.sweep.reporting import report

def main(hparams):
    for step in range(3):
        report({"reward/mean": hparams["lr"] * step - hparams["method.kl"], "text": "no number"})
    if hparams["method.kl"] > 0.9:
        raise RuntimeError("too much")
    return {"last": 1.0}
"""
SWEEP = {
    "tune_config": {"metric": "reward/mean", "mode": "max", "num_samples": 2, "seed": 3},
    "lr": {"strategy": "uniform", "values": [0.0, 1.0]},
    "method.kl": {"strategy": "grid", "values": [0.0, 0.5]},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def write(folder: Path, changes=None, script="script.py", **options) -> list[str]:
    content = {**SWEEP, **(changes or {})}
    (folder / "sweep.yml").write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return [
        "--config",
        "sweep.yml",
        script,
        *(w for k, v in options.items() for w in (f"--{k}", *([] if v is True else [v]))),
    ]


def table(folder: Path) -> list[dict]:
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    return [{k: v for k, v in trial.items() if k != "seconds"} for trial in trials]


# ---- what is drawn ----


@pytest.mark.parametrize(
    ("strategy", "values", "holds"),
    [
        ("uniform", [2, 3], lambda x: 2 <= x <= 3),
        ("quniform", [2.0, 3.0, 0.25], lambda x: 2 <= x <= 3 and x * 4 == round(x * 4)),
        ("loguniform", [1e-5, 1e-3], lambda x: 1e-5 <= x <= 1e-3),
        ("qloguniform", [1.0, 100.0, 0.5], lambda x: x * 2 == round(x * 2)),
        ("randn", [5.0, 0.001], lambda x: abs(x - 5) < 0.1),
        ("qrandn", [5.0, 0.001, 1.0], lambda x: x == 5.0),
        ("randint", [3, 6], lambda x: x in (3, 4, 5)),
        ("qrandint", [10, 40, 10], lambda x: x in (10, 20, 30, 40)),
        ("lograndint", [1, 100], lambda x: isinstance(x, int) and 1 <= x < 100),
        ("qlograndint", [10, 1000, 10], lambda x: isinstance(x, int) and x % 10 == 0),
        ("choice", ["a", "b"], lambda x: x in ("a", "b")),
    ],
)
def test_draws_lie_where_they_should(strategy, values, holds):
    parameter = Parameter.read("p", {"strategy": strategy, "values": values})
    drawn = [parameter.draw(np.random.RandomState(i)) for i in range(200)]
    assert all(map(holds, drawn))
    assert len(set(drawn)) > 1 or strategy == "qrandn"


def test_a_log_uniform_draw_is_as_often_below_its_middle():
    """The middle of 1e-5 and 1e-3 is 1e-4: of 400 draws 200 ± 10 σ lie below it."""
    parameter = Parameter.read("p", {"strategy": "loguniform", "values": [1e-5, 1e-3]})
    numbers = np.random.RandomState(0)
    below = sum(parameter.draw(numbers) < 1e-4 for _ in range(400))
    assert abs(below - 200) < 100


def test_every_draw_goes_through_the_grid():
    parameters = [Parameter("a", "grid", [1, 2]), Parameter("b", "uniform", [0, 1]), Parameter("c", "grid", ["x", "y"])]
    trials = trials_of(parameters, count=2, seed=0)
    assert [(t["a"], t["c"]) for t in trials] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")] * 2
    assert len({t["b"] for t in trials}) == 8
    assert list(trials[0]) == ["a", "b", "c"]
    assert trials_of(parameters, count=2, seed=0) == trials
    assert trials_of(parameters, count=2, seed=1) != trials


def test_every_strategy_is_known():
    names = "uniform quniform loguniform qloguniform randn qrandn randint qrandint lograndint qlograndint choice grid"
    assert set(STRATEGIES) == set(names.split())


def test_numbers_with_an_exponent(folder):
    Path("numbers.yaml").write_text("{a: [1e-5, 1E3, .5e1, e5, 1-5], b: 2}")
    assert read_yaml("numbers.yaml", "--config") == {
        "a": [1e-5, 1e3, 5.0, "e5", "1-5"],
        "b": 2,
    }


# ---- one after the other ----


def test_one_after_the_other(folder, capsys):
    assert run([*write(folder, output_dir="out"), "--sequential"]) == 0
    out = capsys.readouterr().out
    assert "4 trials, one after another in this process: --sequential." in out
    trials = table(folder / "out")
    assert [t["settings"]["method.kl"] for t in trials] == [0.0, 0.5, 0.0, 0.5]
    for trial in trials:
        lr, kl = trial["settings"]["lr"], trial["settings"]["method.kl"]
        assert [r["reward/mean"] for r in trial["reports"][:3]] == pytest.approx([-kl, lr - kl, 2 * lr - kl])
        assert trial["reports"][3] == {"last": 1.0}
    page = (folder / "out" / "report.html").read_text()
    assert 'class="plot"' in page
    best = max(trials, key=lambda t: t["reports"][2]["reward/mean"])
    assert f'<tr class="best"><th scope="row">{best["number"]}</th>' in page


def test_it_is_said_that_ray_is_not_there(folder, monkeypatch, capsys):
    monkeypatch.setattr("trl.cli.sweep.is_available", lambda module: False)
    assert main(["sweep", *write(folder)]) == 0
    assert 'Ray is not installed (pip install "trl[sweep]")' in capsys.readouterr().out


def test_a_trial_that_fails_is_a_row(folder, capsys):
    kl = {"strategy": "grid", "values": [0.0, 1.0]}
    assert run([*write(folder, {"method.kl": kl}), "--sequential"]) == 0
    assert [bool(t["error"]) for t in table(folder / "sweep")] == [False, True, False, True]
    assert "failed: RuntimeError: too much" in (folder / "sweep" / "report.html").read_text()
    assert run([*write(folder, {"method.kl": {"strategy": "grid", "values": [1.0]}}), "--sequential"]) == 1


def test_a_minimum(folder):
    tune = {"tune_config": {"metric": "reward/mean", "mode": "min"}}
    run([*write(folder, tune), "--sequential"])
    trials = table(folder / "sweep")
    lowest = min(trials, key=lambda t: t["reports"][2]["reward/mean"])
    assert f'<tr class="best"><th scope="row">{lowest["number"]}</th>' in (folder / "sweep" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune_config": None}, "no section tune_config"),
        ({"tune_config": {"mode": "max"}}, "tune_config.metric is missing"),
        ({"tune_config": {"metric": "m", "num_sample": 2}}, "no option 'num_sample'. Did you mean 'num_samples'"),
        ({"tune_config": {"metric": "m", "mode": "maximum"}}, "Unknown tune_config.mode 'maximum'"),
        ({"tune_config": {"metric": "m", "search_alg": "bohb"}}, "search_alg='bohb' is not available: use 'random'"),
        ({"tune_config": {"metric": "m", "scheduler": "hyperband"}}, "'hyperband' compares trials .* which needs Ray"),
        ({"tune_config": {"metric": "m", "num_samples": 0}}, "num_samples=0: give at least 1"),
        ({"lr": {"strategy": "unifrom", "values": [0, 1]}}, "Unknown strategy of lr 'unifrom'. Did you mean 'uniform'"),
        (
            {"lr": {"strategy": "uniform", "values": [0]}},
            "lr: values of uniform must be a list of 2 numbers, found .0.",
        ),
        ({"lr": {"strategy": "uniform", "values": ["a", "b"]}}, "lr: values of uniform must be numbers"),
        ({"lr": {"strategy": "loguniform", "values": [0, 1]}}, "lr: the lower limit of loguniform must be above zero"),
        ({"lr": 1e-3}, "lr: a parameter needs exactly the keys strategy and values, found 0.001"),
        ({"lr": None, "method.kl": None}, "The sweep's file has no parameters"),
        (
            {"tune_config": {"metric": "loss"}},
            "No trial reported tune_config.metric='loss'. Reported: last, reward/mean",
        ),
    ],
)
def test_sweeps_that_cannot_be(folder, changes, words):
    with pytest.raises(ConfigError, match=words):
        run([*write(folder, changes), "--sequential"])


def test_scripts_and_options_that_cannot_be(folder):
    with pytest.raises(ConfigError, match=r"There is no script 'none.py'"):
        run([*write(folder, script="none.py"), "--sequential"])
    (folder / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"empty.py has no function main\(hparams\)"):
        run([*write(folder, script="empty.py"), "--sequential"])
    with pytest.raises(ConfigError, match="--accelerate_config is not available: a trial is one process"):
        run(write(folder, accelerate_config="config.yml"))
    with pytest.raises(ConfigError, match="--server_address needs Ray"):
        run([*write(folder, server_address="there"), "--sequential"])


def test_metrics_of_what_main_returns():
    class State:
        log_history = ({"loss": 2.0, "step": 1}, {"loss": 1.0, "note": "x"})

    class Trainer:
        state = State

    class Front:
        trainer = Trainer

    assert metrics_of({"a": 1, "b": "x"}) == {"a": 1.0}
    assert metrics_of(Trainer) == metrics_of(Front) == {"loss": 1.0, "step": 1.0}
    assert metrics_of(None) == {}
    assert Trial(0, {}, [{"a": 1.0}, {"b": 2.0}]).value("a") == 1.0


def test_nobody_listens_outside_of_a_sweep():
    heard = []
    with listening(heard.append):
        report({"a": 1, "b": "x", "c": math.pi})
    report({"a": 2})
    assert heard == [{"a": 1.0, "c": math.pi}]


def test_a_plan(folder):
    plan = Plan.read("script.py", SWEEP)
    assert plan.script == folder / "script.py"
    assert plan.tuning == Tuning("reward/mean", num_samples=2, seed=3)
    assert len(plan.trials) == 4


# ---- on Ray ----

PPO = """
from pathlib import Path

import trlx
from trlx.data.default_configs import TRLConfig, default_ppo_config

HERE = Path(__file__).parent


def main(hparams):
    tiny = {
        "model": {"model_path": str(HERE / "tiny"), "num_layers_unfrozen": -1},
        "tokenizer.tokenizer_path": str(HERE / "tiny"),
        "train": {
            "seq_length": 16, "batch_size": 8, "total_steps": 4, "eval_interval": 2, "checkpoint_interval": 100,
            "checkpoint_dir": str(HERE / "ckpts" / str(hparams)), "tracker": None, "save_best": False,
        },
        "method": {"num_rollouts": 8, "chunk_size": 8, "ppo_epochs": 2},
        "method.gen_kwargs.max_new_tokens": 4,
    }
    config = TRLConfig.update(TRLConfig.update(default_ppo_config(), tiny), hparams)
    trlx.logging.set_verbosity(trlx.logging.ERROR)
    return trlx.train(
        reward_fn=lambda outputs, **kwargs: [float(output.count("a")) for output in outputs],
        prompts=["b", "c", "d", "e"],
        config=config,
    )
"""


PATIENT = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""How long Ray waits for its own processes, where the machine has others to run."""


@pytest.mark.slow
def test_ray_and_this_process_give_the_same_table(folder):
    """A learning rate and a KL coefficient of a tiny PPO: two trials at once, and one after the other."""
    pytest.importorskip("ray")
    import torch

    from tests.conftest import MODELS, make_tokenizer

    torch.manual_seed(0)
    MODELS["gpt2"]().save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    (folder / "ppo.py").write_text(PPO)
    changes = {
        "tune_config": {"metric": "reward/mean", "max_concurrent_trials": 2},
        "lr": None,
        "method.kl": None,
        "optimizer.kwargs.lr": {"strategy": "loguniform", "values": ["1e-4", "1e-2"]},
        "method.init_kl_coef": {"strategy": "grid", "values": [0.0, 0.1]},
    }
    words = write(folder, changes, script="ppo.py")
    on_ray = [*words, "--num_cpus", "1", "--num_gpus", "0", "--output_dir", "on-ray"]
    environment = {**os.environ, **PATIENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "trlx.sweep", *on_ray]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert run([*words, "--sequential", "--output_dir", "here"]) == 0
    on_ray, here = table(folder / "on-ray"), table(folder / "here")
    assert len(here) == 2
    for one, other in zip(on_ray, here, strict=True):
        assert one["settings"] == other["settings"]
        values = [[r["reward/mean"] for r in trial["reports"]] for trial in (one, other)]
        assert len(values[0]) >= 3
        assert values[0] == pytest.approx(values[1])
