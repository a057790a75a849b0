"""Several processes: which configurations there are, what is refused, and that two processes train like one."""

import json
import os
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import is_deepspeed_available

from trl.cli.commands import methods
from trl.cli.launch import LAUNCHED, SHIPPED, check_devices, find_config, needs_launcher
from trl.cli.main import main
from trl.errors import ConfigError


@pytest.fixture
def parse(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return lambda *words: methods()["sft"].parser().parse(words)


@pytest.mark.parametrize(
    ("words", "launched"),
    [
        ([], False),
        (["--num_processes", "1"], False),
        (["--accelerate_config", "single"], False),
        (["--accelerate_config", "single_gpu"], False),
        (["--accelerate_config", "multi_gpu"], True),
        (["--num_processes", "2"], True),
        (["--accelerate_config", "zero2"], True),
    ],
)
def test_one_process_needs_no_launcher(words, launched, parse):
    assert needs_launcher(parse(*words)) is launched


@pytest.mark.parametrize("name", ["LOCAL_RANK", LAUNCHED])
def test_a_process_that_was_launched_launches_none(parse, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert not needs_launcher(parse("--num_processes", "2"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("single", "NO"),
        ("ddp", "MULTI_GPU"),
        ("fsdp2", "FSDP"),
        ("zero1", "DEEPSPEED"),
        ("zero2", "DEEPSPEED"),
        ("zero3", "DEEPSPEED"),
    ],
)
def test_shipped_configurations_are_read_by_accelerate(name, kind):
    config = load_config_from_file(str(find_config(name)))
    assert config.distributed_type == kind
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    assert len(list(SHIPPED.glob("*.yaml"))) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_processes", "0"], "num_processes=0: give 1 or more."),
        (["--num_processes", "2", "--accelerate_config", "single"], "accelerate_config='single' means one process"),
        (["--accelerate_config", "zero4"], "'zero4' is neither a file nor one of ddp, fsdp2, single, zero1, zero2"),
    ],
)
def test_refused(words, message, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["sft", "--dataset_name", "imdb", "--model_name_or_path", "gpt2", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_file_for_one_process_launches_one(tmp_path):
    """Accelerate starts a single process without torchrun; the process fails, since there is no such dataset."""
    (tmp_path / "one.yaml").write_text("distributed_type: 'NO'\nnum_machines: 1\nnum_processes: 1\nuse_cpu: true\n")
    words = ["--accelerate_config", str(tmp_path / "one.yaml"), "--model_name_or_path", str(tmp_path / "none")]
    ended = subprocess.run(
        [sys.executable, "-m", "trl", "sft", *words, "--dataset_name", str(tmp_path / "none.jsonl")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
    )
    assert ended.returncode == 1
    assert ended.stderr.count("trl: error:") == 1
    assert "Traceback" not in ended.stderr


def test_devices_are_counted(monkeypatch):
    monkeypatch.setattr("trl.imports.is_available", lambda module: True)
    with pytest.raises(ConfigError, match="num_processes=3, but this machine has 2 devices"):
        check_devices("ddp", 3, 2)
    check_devices("ddp", 3, 0)
    check_devices("fsdp2", 3, 0)
    check_devices("zero3", None, 2)


def losses(folder, *words):
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    command = "sft --model_name_or_path tiny --dataset_name rows.jsonl --use_cpu --max_steps 3 --logging_steps 1"
    command += " --save_strategy steps --save_steps 3 --learning_rate 1e-2 --report_to none"
    done = subprocess.run(
        [sys.executable, "-m", "trl", *command.split(), *words],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    state = json.loads((folder / words[-1] / "checkpoint-3" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.long
def test_two_processes_train_like_one(tmp_path):
    from tests.conftest import MODELS, make_tokenizer

    MODELS["llama"]().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    rows = [{"text": "abc def " * (1 + i % 5) + str(i)} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    alone = losses(tmp_path, "--per_device_train_batch_size", "4", "--output_dir", "one")
    both = losses(tmp_path, "--per_device_train_batch_size", "2", "--num_processes", "2", "--output_dir", "two")
    assert len(alone) == 3
    assert both == pytest.approx(alone, abs=1e-5)
    assert alone[2] < alone[0] - 0.1
    for engine in ("fsdp2", "zero3") if is_deepspeed_available() else ("fsdp2",):
        words = ["--per_device_train_batch_size", "2", "--num_processes", "2", "--accelerate_config", engine]
        assert losses(tmp_path, *words, "--output_dir", engine) == pytest.approx(alone, abs=1e-5)
        assert (tmp_path / engine / "model.safetensors").exists()
