"""`trl serve` as a program: it says where it serves, answers, and ends when it is told to."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest
import requests
import torch

from tests.conftest import MODELS, make_tokenizer
from tests.processes import environment, fast_python
from trl.cli.main import main
from trl.cli.vllm_serve import VLLMServeArguments, command_of, environment_of
from trl.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.slow
def test_serving_until_a_signal(folder, tmp_path):
    command = [fast_python(), "-m", "trl", "serve", str(folder), "--port", "0", "--served_model_name", "tiny"]
    with subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as program:
        try:
            line = program.stdout.readline()
            assert line.startswith("Serving tiny at http://127.0.0.1:")
            url = line.split()[-1]
            body = {"prompt": "ab", "max_tokens": 4, "temperature": 0, "return_token_ids": True}
            (choice,) = requests.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
            assert 1 <= len(choice["token_ids"]) <= 4
        finally:
            program.send_signal(signal.SIGTERM)
        assert program.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


def test_what_the_command_line_refuses(capsys):
    assert main(["serve"]) == 2
    assert "trl serve takes a model" in capsys.readouterr().err
    assert main(["serve", "nowhere", "--request_timeout", "-1"]) == 2
    assert "request_timeout=-1" in capsys.readouterr().err


def test_the_flags_of_vllm(capsys):
    command = command_of(VLLMServeArguments(model="m", max_lora_rank=8, enforce_eager=True))
    assert command[:3] == ["vllm", "serve", "m"]
    text = " ".join(command)
    for words in (
        "--logprobs-mode processed_logprobs",
        "--max-lora-rank 8",
        "--enable-lora",
        "--generation-config vllm",
    ):
        assert words in text
    assert "--enforce-eager" in command
    assert "weight-transfer" not in text
    over_nccl = command_of(VLLMServeArguments(model="m", nccl=True))
    assert json.loads(over_nccl[over_nccl.index("--weight-transfer-config") + 1]) == {"backend": "nccl"}
    assert environment_of(VLLMServeArguments(model="m")) == {"VLLM_SERVER_DEV_MODE": "1"}
    with pytest.raises(ConfigError, match="data_parallel_size=2: start that many servers"):
        command_of(VLLMServeArguments(model="m", data_parallel_size=2))
    assert main(["vllm-serve", "--model", "m", "--vllm", "nowhere/vllm"]) == 2
    assert "There is no program 'nowhere/vllm'" in capsys.readouterr().err
