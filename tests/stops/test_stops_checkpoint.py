"""Checkpoints: whole or not at all, found again, cleared away; and what a full disk leaves."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from tests.stops.runs import RUNS, StopAt, texts
from trl.errors import ConfigError
from trl.training.checkpoint import (
    MANIFEST,
    CheckpointError,
    checkpoints,
    explain_full_disk,
    newest_checkpoint,
    publish,
    rotate,
    sweep,
    why_not_resumable,
)
from trl.training.state import StateFunctions, StateRegistry

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A run of three steps and three checkpoints."""
    folder = tmp_path_factory.mktemp("written")
    RUNS["sft"](folder, **SAVING).train()
    return folder


@pytest.fixture
def run(written, tmp_path) -> Path:
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


# ---- what is in one ----


def test_an_interval_of_no_steps_saves_at_the_end_alone(tmp_path):
    RUNS["sft"](tmp_path, **{**SAVING, "save_steps": 0, "max_steps": 2}).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_checkpoint_holds_all_that_changes(tmp_path):
    RUNS["ppo"](tmp_path, **{**SAVING, "sync_ref_model": True, "max_steps": 1}).train()
    folder = tmp_path / "checkpoint-1"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model.safetensors", "value_head.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json", "trl_state.pt", "trl_state_0.pt", MANIFEST,
    }  # fmt: skip
    shared = torch.load(folder / "trl_state.pt", weights_only=True)
    assert shared.keys() == {"reference", "algorithm", "steps"}
    assert shared["algorithm"]["moments"]["count"] == 4
    own = torch.load(folder / "trl_state_0.pt", weights_only=True)
    assert own.keys() >= {"rollouts", "completions", "metrics", "loss"}
    assert own["rollouts"]["cursor"] == 4
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["processes"] == 1
    assert manifest["files"]["optimizer.pt"]["bytes"] == (folder / "optimizer.pt").stat().st_size
    assert set(manifest["files"]) == names - {MANIFEST}


class Glance(TrainerCallback):
    """What the folder of a run looks like while a checkpoint is written."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.args = None

    def on_step_begin(self, args, state, control, **_):
        self.args = args

    def state_dict(self):
        self.seen.append(sorted(path.name for path in Path(self.args.output_dir).glob("*checkpoint*")))
        return {}

    def load_state_dict(self, state):
        pass


def test_it_has_its_name_when_it_is_whole(tmp_path):
    glance = Glance()
    trainer = RUNS["sft"](tmp_path, [glance], **SAVING)
    trainer.states.register("glance", glance)
    trainer.train()
    assert glance.seen == [
        ["partial-checkpoint-1"],
        ["checkpoint-1", "partial-checkpoint-2"],
        ["checkpoint-1", "checkpoint-2", "partial-checkpoint-3"],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "_run.json",
        *(f"checkpoint-{k}" for k in (1, 2, 3)),
    ]


# ---- which one is resumed ----


def test_the_newest_good_one_is_found(run):
    assert [path.name for path in checkpoints(run)] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    assert newest_checkpoint(run) == run / "checkpoint-3"
    assert newest_checkpoint(run / "nowhere") is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt has "),
        (lambda folder: cut(folder / "model.safetensors"), "bytes, but was written with "),
        (lambda folder: cut(folder / MANIFEST), "manifest.json is incomplete"),
        (
            lambda folder: _edit(folder / MANIFEST, {"../../elsewhere": {"bytes": 1, "hash": ""}}),
            "'../../elsewhere', which is outside of its folder",
        ),
    ],
)
def test_a_damaged_one_is_passed_over(run, damage, reason, caplog):
    damage(run / "checkpoint-3")
    assert reason in why_not_resumable(run / "checkpoint-3")
    assert newest_checkpoint(run) == run / "checkpoint-2"
    assert f"Skipping {run / 'checkpoint-3'}: " in caplog.text


def _edit(manifest: Path, files: dict) -> None:
    manifest.write_text(json.dumps({"processes": 1, "files": files}))


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("trainer_state.json", "trainer_state.json is missing, so writing it was interrupted"),
        ("model.safetensors", "it holds no weights"),
        ("optimizer.pt", "it holds no optimizer state"),
    ],
)
def test_one_from_elsewhere_is_judged_by_its_files(run, lost, reason):
    (run / "checkpoint-3" / MANIFEST).unlink()
    assert not why_not_resumable(run / "checkpoint-3")
    (run / "checkpoint-3" / lost).unlink()
    assert why_not_resumable(run / "checkpoint-3") == reason


def test_weights_alone_are_no_checkpoint(tmp_path):
    RUNS["sft"](tmp_path, **SAVING, save_only_model=True).train()
    assert why_not_resumable(tmp_path / "checkpoint-3") == "it holds no optimizer state (save_only_model was set)"


def test_a_run_that_resumes_logs_and_saves_as_it_is_told(run, caplog, monkeypatch):
    """Of a model whose head is its embeddings, and so not in the checkpoint."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    trainer = RUNS["sft"](run, **{**SAVING, "save_steps": 7, "logging_steps": 3})
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert (trainer.state.logging_steps, trainer.state.save_steps) == (3, 7)
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [3]
    assert "missing keys" not in caplog.text
    trainer._issue_warnings_after_load(trainer.model.load_state_dict({}, strict=False))
    assert "missing keys" in caplog.text
    assert "lm_head" not in caplog.text


def test_what_to_go_on_from(run, tmp_path):
    trainer = RUNS["sft"](tmp_path / "empty", **SAVING)
    with pytest.raises(ConfigError, match="there is no complete checkpoint in .*empty'. Start from the beginning"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="checkpoint-4': there is no such folder. Did you mean .*checkpoint-3"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    with pytest.raises(ConfigError, match="run' is the output folder of a run. Did you mean .*checkpoint-3'"):
        trainer.train(resume_from_checkpoint=str(run))
    cut(run / "checkpoint-3" / "optimizer.pt")
    with pytest.raises(ConfigError, match="checkpoint-3' cannot be resumed: optimizer.pt has "):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    trainer = RUNS["sft"](run, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history] == [2, 3, 3]


def test_a_finished_run_is_not_trained_further(run):
    trainer = RUNS["sft"](run, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    saved = torch.load(run / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert trainer.state.global_step == 3
    assert {int(state["step"]) for state in saved["state"].values()} == {3}
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {3}


# ---- parts ----


def test_a_part_comes_back(tmp_path):
    registry, kept = StateRegistry(), {"x": torch.tensor(1.0), "names": ["a"]}
    registry.register("shared", StateFunctions(lambda: kept, lambda state: kept.update(state)))
    registry.register("own", StateFunctions(lambda: kept, lambda state: kept.update(state)), per_rank=True)
    registry.save(tmp_path, rank=0, is_main=True)
    kept.update(x=None, names=None)
    registry.load(tmp_path, rank=0, processes=1, written_by=1)
    assert kept == {"x": torch.tensor(1.0), "names": ["a"]}


def test_parts_that_a_checkpoint_does_not_hold(tmp_path, caplog):
    registry, nothing = StateRegistry(), StateFunctions(dict, lambda state: None)
    registry.register("metrics", nothing, per_rank=True, optional=True)
    registry.load(tmp_path, rank=0, processes=1, written_by=2)
    assert "was written by 2 processes, and here are 1: random states and metrics" in caplog.text
    registry.register("rounds", nothing, per_rank=True)
    with pytest.raises(
        ConfigError, match=r"does not hold the state of rounds for this process \(it was written by 2 processes, and"
    ):
        registry.load(tmp_path, rank=0, processes=1, written_by=2)
    with pytest.raises(
        ConfigError, match="does not hold the state of rounds .*written by another trainer, or by an earlier version"
    ):
        registry.load(tmp_path, rank=0, processes=2, written_by=2)


@pytest.mark.parametrize("name", ["dpo", "grpo", "dpo, computed beforehand", "dpo, an adapter"])
def test_the_reference_is_the_one_that_the_run_began_with(tmp_path, name):
    options = {"beta": 0.1, "sync_ref_model": False, "max_steps": 2}
    RUNS[name](tmp_path, [StopAt(1)], **options).train()
    again = RUNS[name](tmp_path, shift=1e-3, **options)
    with pytest.raises(
        ConfigError, match="cannot be resumed: the .* is not the one with which this run started. Give the same model"
    ):
        again.train(resume_from_checkpoint=True)


# ---- replacing and clearing away ----


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "file").write_text(name)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_of_the_same_name_is_replaced(tmp_path):
    make(tmp_path, "checkpoint-4", "replaced-checkpoint-4", "partial-checkpoint-4")
    publish(tmp_path / "partial-checkpoint-4", tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "file").read_text() == "partial-checkpoint-4"
    assert left(tmp_path) == ["checkpoint-4"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux which file a descriptor is")
def test_all_of_it_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    make(tmp_path, "partial-checkpoint-4")
    (tmp_path / "partial-checkpoint-4" / "shards").mkdir()
    (tmp_path / "partial-checkpoint-4" / "shards" / "1").write_text("some")
    publish(tmp_path / "partial-checkpoint-4", tmp_path / "checkpoint-4", 2)
    assert not [each for each in Path("/proc/self/fd").iterdir() if tmp_path in Path(os.path.realpath(each)).parents]
    inside = ("", "/file", f"/{MANIFEST}", "/shards", "/shards/1")
    assert {*synced[:-1]} == {f"partial-checkpoint-4{path}" for path in inside}
    assert synced[-1] == ".", "the name itself"
    manifest = json.loads((tmp_path / "checkpoint-4" / MANIFEST).read_text())
    sizes = {name: written["bytes"] for name, written in manifest["files"].items()}
    assert (manifest["processes"], sizes) == (2, {"file": len("partial-checkpoint-4"), "shards/1": 4})


def test_what_was_left_of_an_earlier_try_is_no_part_of_it(tmp_path):
    make(tmp_path, "partial-checkpoint-1")
    RUNS["sft"](tmp_path, **{**SAVING, "max_steps": 1}).train()
    assert not (tmp_path / "checkpoint-1" / "file").exists()
    assert not why_not_resumable(tmp_path / "checkpoint-1")


def test_one_that_was_about_to_be_replaced_still_counts(run):
    (run / "checkpoint-3").rename(run / "replaced-checkpoint-3")
    assert newest_checkpoint(run) == run / "replaced-checkpoint-3"
    sweep(run)
    assert newest_checkpoint(run) == run / "replaced-checkpoint-3"
    trainer = RUNS["sft"](run, **{**SAVING, "max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_leftovers_are_swept(tmp_path):
    make(tmp_path, "checkpoint-4", "replaced-checkpoint-4", "partial-checkpoint-8", "replaced-checkpoint-2", "mine")
    sweep(tmp_path)
    assert left(tmp_path) == ["checkpoint-4", "mine", "replaced-checkpoint-2"]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [2, 4, 6, 8]),
        (0, None, [2, 4, 6, 8]),
        (3, None, [4, 6, 8]),
        (1, None, [8]),
        (2, 4, [4, 8]),
        (1, 4, [4, 8]),
        (2, 8, [6, 8]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, kept):
    make(tmp_path, *(f"checkpoint-{k}" for k in (2, 4, 6, 8)))
    rotate(tmp_path / "checkpoint-8", limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert left(tmp_path) == [f"checkpoint-{k}" for k in kept]


def test_the_best_model_of_transformers(tmp_path):
    """`load_best_model_at_end` with a limit: the best one stays, its path is right, also once the run is elsewhere, and its
    weights come back."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
    options |= {**SAVING, "max_steps": 4, "learning_rate": 5.0}
    trainer = RUNS["sft"](tmp_path / "run", evaluation=texts(), **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert best.name == f"checkpoint-{1 + losses.index(min(losses))}"
    assert trainer.evaluate()["eval_loss"] == min(losses)
    assert {path.name for path in checkpoints(tmp_path / "run")} == {best.name, "checkpoint-4"}
    (tmp_path / "run").rename(tmp_path / "moved")
    again = RUNS["sft"](tmp_path / "moved", evaluation=texts(), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "moved" / best.name)
    assert again.evaluate()["eval_loss"] == min(losses)


# ---- full disks ----


class Limit(TrainerCallback):
    """No file may grow beyond some bytes, from a step on."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [20_000, 150_000], ids=["the model", "the optimizer"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, size):
    trainer = RUNS["sft"](tmp_path, [Limit(2, size)], **SAVING)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError) as error:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    words = str(error.value)
    assert words.startswith(
        f"No space left on the disk of '{tmp_path}' while checkpoint-2 was written: that needs about 0."
    )
    assert f"MB are free. {tmp_path}/checkpoint-1 is complete: make room, then resume with --resume." in words
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-1"]
    again = RUNS["sft"](tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("I/O error: File too large (os error 27)"), True),
        (SafetensorError("I/O error: No such file (os error 280)"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("size mismatch"), False),
    ],
)
@pytest.mark.parametrize("place", ["itself", "its cause", "its context"])
def test_errors_of_a_full_disk(tmp_path, error, is_full, place):
    raised = error if place == "itself" else RuntimeError("unable to save")
    if place == "its cause":
        raised.__cause__ = error
    elif place == "its context":
        raised.__context__ = error
    with pytest.raises(CheckpointError if is_full else type(raised)), explain_full_disk(tmp_path, "checkpoint-1"):
        raise raised


def test_a_full_disk_in_numbers(run, monkeypatch):
    """1.5 MB of a checkpoint are written, and freed again; the one before has less than that, or more."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000))

    def said(folder: Path) -> str:
        beside = folder / "partial-checkpoint-4"
        beside.mkdir(parents=True, exist_ok=True)
        (beside / "weights").write_bytes(bytes(1_500_000))
        with pytest.raises(CheckpointError) as error, explain_full_disk(folder, "checkpoint-4", beside):
            raise OSError(errno.ENOSPC, "No space left on device")
        return str(error.value)

    unknown, complete = "needs more than 1.5 MB, and 3.5 MB are free. ", f"{run}/checkpoint-3 is complete: "
    assert f"{unknown}There is no complete checkpoint. " in said(run / "first")
    assert unknown + complete in said(run)
    (run / "checkpoint-3" / "more").write_bytes(bytes(4_000_000))
    size = sum(path.stat().st_size for path in (run / "checkpoint-3").iterdir()) / 1e6
    assert f"needs about {size:.1f} MB, and 3.5 MB are free. {complete}" in said(run)


def test_what_else_fails_is_not_called_a_full_disk(tmp_path):
    trainer = RUNS["sft"](tmp_path, [StopAt(1)])

    def broken():
        raise RuntimeError("the state of this part is odd")

    trainer.states.register("odd", StateFunctions(broken, lambda state: None))
    with pytest.raises(RuntimeError, match="the state of this part is odd"):
        trainer.train()
    assert not list(tmp_path.glob("*checkpoint*"))
