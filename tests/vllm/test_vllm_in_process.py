"""vLLM in the trainer's process: run where TRL_TEST_VLLM names the program `vllm` of an environment that has trl's
libraries too."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.processes import TOGETHER

PROGRAM = os.environ.get("TRL_TEST_VLLM")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PROGRAM, reason="TRL_TEST_VLLM names no program vllm")]


def run(program, *words, launcher=()):
    """A script of this folder, by the Python beside `vllm`."""
    command = [Path(PROGRAM).with_name("python"), *launcher, Path(__file__).with_name(program), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=environment, check=True, timeout=900)


def test_vllm_reads_what_is_packed():
    run("unpack_weights.py")


@pytest.mark.parametrize(("temperature", "mode"), [(1.0, "raw_logprobs"), (0.7, "processed_logprobs")])
def test_weights_arrive_and_samples_are_the_policys(temperature, mode, tmp_path):
    run("sample_in_process.py", tmp_path, temperature)
    found = json.loads((tmp_path / "found-0.json").read_text())
    assert found["mode"] == mode
    assert max(found["differences"]) < 1e-4
    assert (
        [exact for exact, _ in found["modes"]] == [True] * 5 if mode == "raw_logprobs" else [True, True, *[False] * 4]
    )
    for exact, off in found["modes"]:
        assert off < 1e-4 if exact else off > 1e-3
    assert found["metrics"]["engine/sync_logp_difference"] < 1e-4


@pytest.mark.parametrize(
    ("family", "most"),
    [
        ("llava", 1e-4),
        ("idefics3", 2e-3),
        ("llava_next", 5e-3),
        ("qwen2_vl", 1e-4),
        ("qwen2_5_vl", 1e-4),
        ("gemma3", 0.1),
    ],
)
def test_images(family, most, tmp_path):
    """vLLM needs torchvision for models that read them, and the trainer transformers 5.20 or later.

    On a CPU it reads the images of Gemma 3 token by token, of which the model sees all at once.
    """
    run("sample_images_in_process.py", tmp_path, family)
    assert max(json.loads((tmp_path / "found.json").read_text())) < most


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_two_processes(tensor_parallel_size, tmp_path):
    """With a copy of the weights each, and with one that they share."""
    run("sample_in_process.py", tmp_path, 1.0, tensor_parallel_size, launcher=TOGETHER)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert max(found["differences"]) < 1e-4
