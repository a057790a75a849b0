"""What an accident may do to a run: damaged checkpoints and caches, changed settings, second runs, broken streams."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tests.processes import fast_python
from tests.stops.runs import LORA, RUNS, StopAt, made_by, pairs, texts
from trl.callbacks.completions import table_of, write_completions
from trl.callbacks.stop import stop_on_signal
from trl.errors import ConfigError, DataError
from trl.report.page import write_report
from trl.trainers.sft import SFTTrainer
from trl.training import streams
from trl.training.checkpoint import MANIFEST, checkpoints, newest_checkpoint, publish, rotate, why_not_resumable
from trl.training.lock import LOCK_FILE, acquire, check_free, release
from trl.training.nonfinite import NonFiniteError, last_sound_step
from trl.training.run_settings import SETTINGS_FILE, check_rows_alike, describe_rows
from trl.training.state import fingerprint

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    RUNS["sft"](folder, **SAVING).train()
    return folder


@pytest.fixture
def run(written, tmp_path) -> Path:
    """A run with two whole checkpoints."""
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.INFO, "trl")
    return caplog


# ---- checkpoints that are none ----


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << (place % 8)
    file.write_bytes(content)


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE = {
    "a flipped bit of the weights": (lambda f: flip(f / "model.safetensors", -5), "model.safetensors has changed"),
    "zeros for weights": (lambda f: zero(f / "model.safetensors"), "model.safetensors has changed"),
    "zeros for the optimizer": (lambda f: zero(f / "optimizer.pt"), "optimizer.pt has changed"),
    "another learning rate": (lambda f: flip(f / "scheduler.pt", 100), "scheduler.pt has changed"),
    "a manifest that is null": (lambda f: (f / MANIFEST).write_text("null"), "manifest.json is incomplete"),
    "a manifest that is a list": (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json is incomplete"),
    "a manifest of lists": (lambda f: (f / MANIFEST).write_text('{"files": {"a": []}}'), "manifest.json is incomplete"),
    "a manifest of zeros": (lambda f: zero(f / MANIFEST), "manifest.json is incomplete"),
    "a manifest without hashes": (lambda f: (f / MANIFEST).write_text('{"files": {"rng_state.pth": {}}}'), "KeyError"),
    "a folder in place of a file": (lambda f: swap(f / "scheduler.pt"), "scheduler.pt is missing"),
    "a state of zeros, no manifest": (lambda f: [(f / MANIFEST).unlink(), zero(f / "trainer_state.json")], "be read"),
    "a state that is null": (lambda f: bare(f, "null"), "AttributeError"),
    "a state without a step": (lambda f: bare(f, "{}"), "does not say at which step"),
}


def swap(file: Path) -> None:
    file.unlink()
    file.mkdir()


def bare(folder: Path, state: str) -> None:
    (folder / MANIFEST).unlink()
    (folder / "trainer_state.json").write_text(state)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_skipped(run, name, logged):
    damage, reason = DAMAGE[name]
    damage(run / "checkpoint-2")
    assert reason in why_not_resumable(run / "checkpoint-2")
    assert newest_checkpoint(run) == run / "checkpoint-1"
    assert f"Skipping {run / 'checkpoint-2'}: " in logged.text


@pytest.mark.parametrize("seed", range(20))
def test_any_byte_of_any_file(run, seed):
    rng = random.Random(seed)
    files = [path for path in sorted((run / "checkpoint-2").iterdir()) if path.name != MANIFEST]
    flip(rng.choice(files), rng.randrange(10**6))
    assert newest_checkpoint(run) == run / "checkpoint-1"


def test_what_only_has_the_name_of_a_checkpoint(run, logged):
    (run / "checkpoint-7").write_text("a file")
    (run / "checkpoint-8").symlink_to("nowhere")
    (run / "checkpoint-9").symlink_to("checkpoint-9")
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-٣").mkdir()
    assert newest_checkpoint(run) == run / "checkpoint-2"
    assert [p.name for p in checkpoints(run)][:4] == [f"checkpoint-{n}" for n in (10, 9, 8, 7)]
    for reason in ("it is not a folder", "it is a broken link", "trainer_state.json is missing"):
        assert reason in logged.text
    trainer = RUNS["sft"](run, **{**SAVING, "max_steps": 3})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_a_file_in_the_place_of_a_checkpoint_is_replaced(tmp_path):
    for occupied in ("checkpoint-1", "checkpoint-2", "checkpoint-3"):
        (tmp_path / f"partial-{occupied}").mkdir()
    (tmp_path / "checkpoint-1").write_text("a file")
    (tmp_path / "checkpoint-2").symlink_to("nowhere")
    (tmp_path / "replaced-checkpoint-3").write_text("a file")
    (tmp_path / "checkpoint-3").mkdir()
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3"):
        (tmp_path / f"partial-{name}").mkdir(exist_ok=True)
        publish(tmp_path / f"partial-{name}", tmp_path / name)
        assert (tmp_path / name / MANIFEST).is_file()


def test_files_do_not_count_for_rotation(tmp_path):
    for k in (2, 4, 6):
        (tmp_path / f"checkpoint-{k}").mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    rotate(tmp_path / "checkpoint-6", 2, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


# ---- losses that diverge ----


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([3.0, 2.0, 2.5, 1.0], None),
        ([3.0, 2.0, 9.0, 1.0], None),
        ([3.0, 2.0, 9.0, float("nan")], 2),
        ([3.0, 2.0, 1.5, float("inf")], 3),
        ([float("nan")], 0),
        ([-0.1, 0.1, -0.2, 0.3], None),
        ([-3.0, -2.0], None),
        ([1.0, 2.5, 5.0], 2),
        ([], None),
    ],
)
def test_when_a_loss_has_diverged(losses, step):
    log = [{"loss": loss, "step": i} for i, loss in enumerate(losses, 1)]
    assert last_sound_step([{"eval_loss": 1.0, "step": 1}, *log]) == step


def test_a_checkpoint_from_before_is_kept(tmp_path):
    for k in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{k}").mkdir()
    rotate(tmp_path / "checkpoint-8", 1, None, sound=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]


class Break(TrainerCallback):
    """Weights that become NaN after step 2."""

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == 2:
            next(model.parameters()).data[0, 0] = float("nan")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = RUNS["sft"](tmp_path, [Break()], **{**SAVING, "max_steps": 4, "save_total_limit": 1})
    with pytest.raises(
        NonFiniteError, match=r"checkpoint-2 is not saved: its weights are not finite \(transformer.wte"
    ):
        trainer.train()
    assert not why_not_resumable(tmp_path / "checkpoint-1")
    with pytest.raises(NonFiniteError, match="The model is not saved"):
        trainer.save_model(str(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_are_blamed_where_they_are_to_blame(tmp_path):
    trainer = RUNS["sft"](tmp_path, [Break()], max_steps=4, max_skipped_steps=1)
    with pytest.raises(NonFiniteError, match=r"Weights of the model are not finite \(transformer.wte.weight\)"):
        trainer.train()


# ---- what differs on resuming ----


def test_settings_that_differ_are_named(run, logged):
    options = {**SAVING, "max_steps": 3, "learning_rate": 1e-3, "seed": 7, "per_device_train_batch_size": 4}
    RUNS["sft"](run, **options).train(resume_from_checkpoint=True)
    assert "learning_rate was 0.01, and is 0.001 now, which has no effect" in logged.text
    assert "seed was 42, and is 7 now" in logged.text
    assert "per_device_train_batch_size was 2, and is 4 now" in logged.text
    assert "train_dataset" not in logged.text


def test_nothing_is_said_where_nothing_differs(run, logged):
    RUNS["sft"](run, **SAVING).train(resume_from_checkpoint=True)
    assert "checkpoint-2: " not in logged.text  # the beginning of a warning


def test_other_rows_in_another_process_are_an_error():
    rows = Dataset.from_dict({"text": ["a", "b", "c"]})
    described = [describe_rows(each) for each in (rows, rows.select([2, 1, 0]), rows.select([0]))]
    check_rows_alike([described[0], described[0]])
    check_rows_alike([{}, {}])
    for other in described[1:]:
        with pytest.raises(ConfigError, match="train_dataset is not the same in all processes.* process 1"):
            check_rows_alike([described[0], other])


@pytest.mark.parametrize(
    "rows", [lambda: texts().select(range(8)), lambda: texts().map(lambda r: {"text": r["text"] + "a"})]
)
def test_other_rows_are_named(run, rows, logged):
    made_by(SFTTrainer, rows)(run, **SAVING).train(resume_from_checkpoint=True)
    assert "train_dataset is not the one that the run started with" in logged.text


def test_another_optimizer_or_trainer_is_an_error(run, tmp_path):
    with pytest.raises(ConfigError, match="optim was 'adamw_torch.*', and is 'sgd' now"):
        RUNS["sft"](run, **SAVING, optim="sgd").train(resume_from_checkpoint=True)
    RUNS["dpo"](tmp_path / "dpo", **{**SAVING, "max_steps": 1}).train()
    with pytest.raises(ConfigError, match="trainer was 'DPOTrainer', and is 'CPOTrainer' now"):
        RUNS["cpo"](tmp_path / "dpo", **SAVING).train(resume_from_checkpoint=True)


def adapted(folder: Path, **options):
    return made_by(SFTTrainer, texts, peft=LoraConfig(**{**LORA, **options}))(folder, **SAVING)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"r": 4}, "of another shape: .*lora_A"), ({"target_modules": ["c_proj"]}, "only in the checkpoint: .*c_attn")],
)
@pytest.mark.parametrize("is_ours", [True, False])
def test_another_adapter_is_an_error(tmp_path, options, words, is_ours):
    """Also where the checkpoint comes from another library, and holds no settings."""
    adapted(tmp_path).train()
    if not is_ours:
        for name in (SETTINGS_FILE, MANIFEST):
            (tmp_path / "checkpoint-2" / name).unlink()
    with pytest.raises(ConfigError, match=f"other parameters are trained .*{words}"):
        adapted(tmp_path, **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("place", [0, 12345, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_fingerprints_read_every_number(place, dtype):
    tensor = (torch.arange(200_001) % 251).to(dtype)
    before = fingerprint([("x", tensor)])
    assert before == fingerprint([("x", tensor.clone())])
    tensor[place] += 1
    assert before != fingerprint([("x", tensor)])


def test_a_reference_that_differs_in_one_number(tmp_path):
    options = {"beta": 0.1, "max_steps": 2}
    RUNS["dpo"](tmp_path, [StopAt(1)], **options).train()
    again = RUNS["dpo"](tmp_path, **options)
    again.states.shared["reference"] = type(again.states.shared["reference"])(
        "the reference policy",
        fingerprint((n, p + (torch.arange(p.numel()).view(p.shape) == 3)) for n, p in again.model.named_parameters()),
    )
    with pytest.raises(ConfigError, match="the reference policy is not the one with which this run started"):
        again.train(resume_from_checkpoint=True)


# ---- one run per folder ----

HOLDER = "import os, sys, time; from pathlib import Path; from trl.training.lock import acquire\nlock = acquire(Path(sys.argv[1]))\nprint(os.getpid(), flush=True); time.sleep(600)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `run`, and its number."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen([fast_python(), "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path, holder, logged):
    process, number = holder
    trainer = RUNS["sft"](tmp_path / "run", max_steps=1)
    with pytest.raises(ConfigError, match=rf"is used by another run \(process {number} on "):
        trainer.train()
    with pytest.raises(ConfigError, match="is used by another run"):
        check_free(tmp_path / "run")
    os.kill(number, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists(), "left over by a run that was killed"
    trainer.train()
    assert f"was killed or crashed (process {number} on " in logged.text
    assert not (tmp_path / "run" / LOCK_FILE).exists()


@pytest.mark.parametrize("content", ["", "{", "null", '{"pid": 1}', "\x00" * 100])
def test_locks_that_are_left_over_are_taken(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    lock = acquire(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    release(tmp_path, lock)
    assert not list(tmp_path.iterdir())


# ---- beside a run ----

BESIDE = {
    "a README in Latin-1": lambda f: (f / "README.md").write_bytes("café".encode("latin-1")),
    "a page that is a folder": lambda f: (f / "report.html").mkdir(),
    "a log that is a folder": lambda f: (f / "run.json").mkdir(),
    "a card that is a folder": lambda f: (f / "README.md").mkdir(),
    "samples that are cut": lambda f: samples(f).write_bytes(samples(f).read_bytes()[:-20]),
    "samples of zeros": lambda f: zero(samples(f)),
    "a log of mixed types": lambda f: (f / "log_history.jsonl").write_text('1\n{"step": "x", "loss": []}\nnull\n{'),
    "comparisons without sides": lambda f: (f / "before_after.jsonl").write_text('{"prompt": "a"}\n[]\n{"before": 1}'),
    "a config that is a list": lambda f: (f / "config.json").write_text("[1]"),
}


def samples(folder: Path) -> Path:
    file = folder / "completions" / "completions_00001.parquet"
    if not file.exists():
        file.parent.mkdir()
        pq.write_table(pa.table({"step": [1], "prompt": ["p"], "completion": ["c"]}), file)
    return file


@pytest.mark.parametrize("name", BESIDE)
def test_a_run_ends_well_beside(tmp_path, name):
    BESIDE[name](tmp_path)
    trainer = RUNS["sft"](tmp_path, max_steps=1, html_report=True, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert not why_not_resumable(tmp_path / "checkpoint-1")


DAMAGED = {
    "run.json": ["", "null", "[1]", '{"log_history": 3}', '{"log_history": [1, {"step": "x", "loss": 1e999}]}', "{"],
    "log_history.jsonl": ['{"step": 1, "loss": NaN}\nx', "\udcff", '{"step": 1e400}', "[" * 100_000],
    "before_after.jsonl": ["{}", '{"prompt": 1, "before": {}, "after": {}}', '{"prompt": 1, "before": 2, "after": 3}'],
    "README.md": ["", "\udcff", "## Options\n| `a` | b |"],
    "config.json": ["[]", '{"architectures": "x"}', '{"architectures": [1], "model_type": {}}'],
}


@pytest.mark.parametrize(("file", "content"), [(f, c) for f, contents in DAMAGED.items() for c in contents])
def test_reports_show_what_is_whole(tmp_path, file, content):
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 3, "loss": 1.25}], "max_steps": 3})
    )
    (tmp_path / file).write_text(content, errors="surrogateescape")
    page = write_report(tmp_path).read_text()
    assert "loss" in page
    if content in ("null", "{", "[" * 100_000):
        assert f"Damaged files, whose unreadable parts are left out: {file}" in page


def test_a_page_is_not_replaced_by_an_empty_one(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"log_history": [{"step": 3, "loss": 1.25}]}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    before = write_report(tmp_path).read_text()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="is not replaced.*Damaged: run.json"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == before


def test_completions_of_mixed_types(tmp_path):
    rows = [
        {"prompt": "a", "completion": "\ud800", "extra": 1, "advantage": 0.5},
        {"prompt": "b", "completion": "c", "extra": "x", "advantage": 10**400},
        {"prompt": "b", "completion": "c", "extra": object(), "advantage": None},
    ]
    write_completions(rows, tmp_path, 3)
    found = pq.read_table(tmp_path / "completions_00003.parquet").to_pylist()
    assert [row["completion"] for row in found] == ["?", "c", "c"]
    assert [row["extra"] for row in found][:2] == ["1", "x"]
    assert table_of([{"a": 1}, {"a": 2.5}])["a"].to_pylist() == [1, 2.5]


# ---- caches ----


def test_damaged_caches_are_made_again(tmp_path, logged):
    rows = Dataset.from_dict(pairs().to_dict())
    rows.save_to_disk(str(tmp_path / "rows"))

    def trained() -> float:
        trainer = made_by(
            type(RUNS["dpo"](tmp_path / "x")), lambda: Dataset.load_from_disk(str(tmp_path / "rows")),
            precompute_ref_log_probs=True,
        )(tmp_path / "out", max_steps=2)  # fmt: skip
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    before = trained()
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:-200]), zero):
        from datasets.config import HF_DATASETS_CACHE

        made = [*(tmp_path / "rows").glob("cache-*.arrow"), *Path(HF_DATASETS_CACHE).glob("trl_reference/*/*.arrow")]
        assert len(made) >= 2
        for file in made:
            damage(file)
        logged.clear()
        assert trained() == before
        assert "is damaged" in logged.text


# ---- signals and streams ----


class Raise(TrainerCallback):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGXCPU", "SIGUSR1", "SIGQUIT"])
def test_signals_of_clusters_and_terminals(tmp_path, name):
    number = getattr(signal, name)
    trainer = RUNS["sft"](tmp_path, [Raise(number)], max_steps=5)
    with stop_on_signal(trainer) as stop:
        trainer.train()
    assert stop.signal == number
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_hangup_that_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = RUNS["sft"](tmp_path, [Raise(signal.SIGHUP)], max_steps=3)
        with stop_on_signal(trainer) as stop:
            trainer.train()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stop.signal is None
    assert trainer.state.global_step == 3


WRITER = """
import sys
from pathlib import Path
from trl.training.streams import steady_streams
with steady_streams():
    for i in range(20_000):
        print("é…", i)
        print("é…", i, file=sys.stderr)
Path(sys.argv[1]).write_text("ended")
"""
SHELLS = {
    "standard output closed": "{} >&-",
    "standard error closed": "{} 2>&-",
    "all closed": "{} <&- >&- 2>&-",
    "a reader that leaves": "{} 2>&1 | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}",
    "a full disk": "{} >/dev/full 2>/dev/full",
    "ASCII alone": "PYTHONIOENCODING=ascii {} >/dev/null 2>/dev/null",
}


@pytest.mark.parametrize("name", SHELLS)
def test_streams_that_cannot_be_written_to(tmp_path, name):
    if "full" in SHELLS[name] and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    (tmp_path / "writer.py").write_text(WRITER)
    words = f"{sys.executable} {tmp_path}/writer.py {tmp_path}/result"
    assert subprocess.run(["bash", "-c", SHELLS[name].format(words)]).returncode == 0
    assert (tmp_path / "result").read_text() == "ended"


def test_streams_are_put_back(capsys):
    before = sys.stdout, sys.stderr
    with streams.steady_streams():
        print("\ud800 and more")
    assert (sys.stdout, sys.stderr) == before
    assert "and more" in capsys.readouterr().out
