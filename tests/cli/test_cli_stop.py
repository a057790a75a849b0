"""Stopping by a signal, going on from the newest good checkpoint, and full disks: the real command in a process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import TrainerCallback

from tests.processes import fast_python
from trl.callbacks.signals import SIGNALS
from trl.callbacks.stop import stop_on_signal
from trl.cli import train
from trl.cli.main import main
from trl.errors import ConfigError
from trl.trainers.sft import SFTConfig, SFTTrainer
from trl.training.checkpoint import checkpoints, why_not_resumable

WORDS = "sft --model_name_or_path tiny --dataset_name rows.jsonl --use_cpu --report_to none --logging_steps 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from tests.conftest import MODELS, make_tokenizer

    folder = tmp_path_factory.mktemp("stop")
    MODELS["llama"]().save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    rows = [{"text": "abc def " * (1 + i % 5) + str(i)} for i in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def start(folder: Path, words: str, *before: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    return subprocess.Popen(
        [*before, sys.executable if before else fast_python(), "-u", "-m", "trl", *WORDS.split(), *words.split()],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, text: str) -> None:
    assert any(text in line for line in process.stdout), process.stderr.read()


def written_losses(checkpoint: Path) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.long), (signal.SIGTERM, 143)]
)
def test_a_signal_writes_a_checkpoint_from_which_training_goes_on(folder, number, status):
    """The run that was stopped and went on has the losses of one that was never stopped."""
    output = f"out-{status}"
    process = start(folder, f"--output_dir {output} --num_train_epochs 10000 --save_strategy no")
    wait_for(process, "'loss'")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == status, stderr
    assert "Finishing this step" in stderr
    assert "Traceback" not in stderr
    assert re.search(rf"To resume:\n\n    trl sft .*--output_dir {output} .* --resume\n", stderr)
    (checkpoint,) = checkpoints(folder / output)
    stopped = int(checkpoint.name.removeprefix("checkpoint-"))
    assert not why_not_resumable(checkpoint)
    assert not (folder / output / "model.safetensors").exists()
    if number == signal.SIGINT:
        return
    more = f"--max_steps {stopped + 2} --save_strategy steps --save_steps {stopped + 2} --lr_scheduler_type constant"
    process = start(folder, f"--output_dir {output} {more} --resume")
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert f"Resuming from {output}/checkpoint-{stopped}." in stderr
    assert len(written_losses(folder / output / f"checkpoint-{stopped + 2}")) == stopped + 2


class Impatience(TrainerCallback):
    """Sends two signals in the second step, further apart than one that is delivered twice."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6)
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_signal_stops_at_once(folder, tmp_path, capfd):
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=3, report_to="none", disable_tqdm=True)
    trainer = SFTTrainer(str(folder / "tiny"), config, train_dataset=rows, callbacks=[Impatience()])
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(KeyboardInterrupt), stop_on_signal(trainer) as stop:
        trainer.train()
    assert stop.signal is None
    assert trainer.state.global_step == 1
    assert not checkpoints(tmp_path)
    assert "Once more stops at once" in capfd.readouterr().err
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.fixture
def run(folder, tmp_path) -> Path:
    """A folder with two checkpoints, 2 and 4, of a run of four steps."""
    if not (folder / "whole").exists():
        rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
        config = SFTConfig(output_dir=str(folder / "whole"), **saving, **quiet)
        SFTTrainer(str(folder / "tiny"), config, train_dataset=rows).train()
    shutil.copytree(folder / "whole", tmp_path / "run")
    return tmp_path / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_checkpoint_by_name_has_to_be_whole(run, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    words = [*WORDS.split(), "--output_dir", "none", "--resume_from_checkpoint"]
    cut(run / "checkpoint-4" / "optimizer.pt")
    assert main([*words, str(run / "checkpoint-4")]) == 2
    assert "cannot be resumed: optimizer.pt has " in capsys.readouterr().err
    assert main([*words, str(run / "checkpoint-3")]) == 2
    assert "there is no such folder. Did you mean" in capsys.readouterr().err


def test_nothing_to_resume_is_said_before_rows_are_read(run, folder, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(train, "build_trainer", lambda run: (_ for _ in ()).throw(ConfigError("building")))
    words = [
        "sft",
        "--model_name_or_path",
        str(folder / "tiny"),
        "--dataset_name",
        str(folder / "rows.jsonl"),
        "--use_cpu",
    ]
    assert main([*words, "--output_dir", "runn", "--resume"]) == 2
    said = capsys.readouterr().err
    assert "Nothing to resume: output_dir='runn' holds no checkpoint. Did you mean 'run'?" in said
    assert "building" in said
    assert main([*words, "--output_dir", "runn", "--resume_from_checkpoint", "true"]) == 2
    assert "resume_from_checkpoint=true: output_dir='runn' holds no checkpoint." in capsys.readouterr().err
    assert main([*words, "--output_dir", "runn", "--resume_from_checkpoint", "runn"]) == 2
    assert "'runn' is an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("dpo", [], "trainer 'SFTTrainer' there, 'DPOTrainer' here"),
        ("sft", ["--learning_rate", "3e-4"], "learning_rate 2e-05 there, 0.0003 here"),
        ("sft", [], "building"),
    ],
)
def test_a_folder_of_another_run_is_refused_before_rows_are_read(
    run, folder, capsys, monkeypatch, method, options, told
):
    monkeypatch.setattr(train, "build_trainer", lambda run: (_ for _ in ()).throw(ConfigError("building")))
    words = [method, "--model_name_or_path", str(folder / "tiny"), "--dataset_name", str(folder / "rows.jsonl")]
    run_as_before = ["--use_cpu", "--max_steps", "4", "--report_to", "none", "--output_dir", str(run)]
    assert main([*words, *run_as_before, *options]) == 2
    assert told in capsys.readouterr().err


def test_a_full_disk_is_a_message_and_earlier_checkpoints_stay(folder):
    """A file system of its own, in a namespace of its own, with room for one checkpoint and a half."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    probe = f"mount -t tmpfs -o size=4k none {folder}/tiny"
    if not shutil.which("unshare") or subprocess.run([*unshare, probe], capture_output=True, check=False).returncode:
        pytest.skip("no namespace to mount a file system in")
    disk = folder / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=450k none {disk}; "$@"; status=$?; ls {disk}/out/checkpoint-*; exit $status'
    words = "--output_dir disk/out --max_steps 9 --save_strategy steps --save_steps 1"
    process = start(folder, words, *unshare, script, "sh")
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 1, stderr
    assert (
        "trl: error: No space left on the disk of 'disk/out' while checkpoint-2 was written: that needs about" in stderr
    )
    assert "disk/out/checkpoint-1 is complete: make room, then resume with --resume" in stderr
    assert "Traceback" not in stderr
    assert "trainer_state.json" in stdout.split("checkpoint-2")[0]
