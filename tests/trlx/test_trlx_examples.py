"""The scripts of examples/trlx run as they are, for two steps; random walks are learned."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import datasets
import pytest
import torch

import trlx

ROOT = Path(__file__).parents[2] / "examples" / "trlx"
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/*_*.py") if path.parent.name != "randomwalks")
SHORT = {"train": {"total_steps": 2, "eval_interval": 2, "checkpoint_interval": 100, "save_best": False}}


@pytest.fixture(autouse=True)
def quiet():
    trlx.logging.set_verbosity(trlx.logging.ERROR)
    trlx.logging.disable_progress_bar()
    yield
    trlx.logging.enable_progress_bar()
    trlx.logging.disable_default_handler()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def run(folder, monkeypatch):
    """`run("hh/ppo_hh.py", hparams)`: the trainer that a script's `main` returns."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ROOT / "randomwalks"), *sys.path])

    def call(script, hparams):
        spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main(hparams)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs(run, script):
    trainer = run(script, SHORT)
    assert trainer.trainer.state.global_step == 2
    assert trainer.evaluation.last


def test_no_script_is_left_out():
    assert len(SCRIPTS) == 10


# ---- random walks ----

QUICK = {"train": {"checkpoint_interval": 10000, "eval_interval": 10000, "save_best": False}}


@pytest.fixture
def model(monkeypatch):
    """A smaller GPT-2 does for the tests: two layers, 64 wide."""
    monkeypatch.syspath_prepend(str(ROOT / "randomwalks"))
    import randomwalks

    plain = randomwalks.model_config

    def smaller(*args, **kwargs):
        config = plain(*args, **kwargs)
        config.n_layer, config.n_embd, config.n_head = 2, 64, 4
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return config

    monkeypatch.setattr(randomwalks, "model_config", smaller)
    return smaller


def test_the_task(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "randomwalks"))
    from randomwalks import generate_random_walks

    metric_fn, prompts, walks, mask = generate_random_walks()
    assert prompts == list("bcdefghijklmnopqrstu")
    assert len(walks) == 1000
    assert max(map(len, walks)) == 10
    scores = metric_fn(walks)["optimality"]
    assert 0.25 < sum(scores) / 1000 < 0.4
    assert max(scores) == 1.0
    near = next(prompt for prompt in prompts if not mask[ord(prompt) - 97, 0])
    far = next(prompt for prompt in prompts if mask[ord(prompt) - 97, 0])
    assert metric_fn([f"{near}a|", f"{near}a", f"{far}a", near])["optimality"] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.long
@pytest.mark.parametrize("seed", [1000, 1001])
def test_ilql_learns_the_shortest_walks_from_random_ones(run, model, seed):
    torch.manual_seed(seed)
    hparams = {
        **QUICK,
        "train.seed": seed,
        "model.model_path": model(),
        "train.total_steps": 240,
        "optimizer.kwargs.lr": 2e-3,
        "scheduler.kwargs.T_max": 240,
        "method.gen_kwargs.beta": [0, 100],
    }
    found = run("randomwalks/ilql_randomwalks.py", hparams).evaluation.last
    assert found["metrics/optimality@beta=0"] < 0.6
    assert found["metrics/optimality@beta=100"] >= 0.95
