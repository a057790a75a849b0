"""What is said where another engine would run than was asked for. Engines themselves: see tests/distributed."""

from __future__ import annotations

import atexit
import time
from datetime import timedelta

import pytest
import torch
from accelerate import Accelerator

from trl.errors import ConfigError
from trl.models.value_heads.storage import without_copies
from trl.trainers.sft import SFTConfig, SFTTrainer
from trl.training.parallel import accumulating, check_parallelism, check_processes, explain_waits, processes_on_cpu


@pytest.fixture
def args(tmp_path):
    return SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", ddp_timeout=7)


def test_an_engine_that_does_not_run(args, monkeypatch):
    accelerator = Accelerator(cpu=True)
    check_parallelism(args, accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="requests FSDP, but NO would run, with all weights on every device"):
        check_parallelism(args, accelerator)


def test_processes_that_would_train_alone(args, monkeypatch):
    check_processes(args)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, but this one would train in a group of 1"):
        check_processes(args)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerators talk otherwise")
def test_processes_on_cpus_wait_as_long_as_is_said_and_end_after_their_threads(args, monkeypatch):
    """The interpreter aborts where a thread of gloo lets go of a tensor while it ends: there is a pause before."""
    place = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    at_exit, slept = [], []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(time, "sleep", slept.append)
    try:
        with processes_on_cpu(args):
            group = torch.distributed.distributed_c10d._get_default_group()
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)
    finally:
        torch.distributed.destroy_process_group()
    for function in at_exit:
        function()
    assert slept


def test_gradients_are_exchanged_again_after_accumulating():
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(1, 1)
    with accumulating(accelerator, model):
        assert not accelerator.sync_gradients
        with accumulating(accelerator, model):
            assert not accelerator.sync_gradients
        assert not accelerator.sync_gradients
    assert accelerator.sync_gradients


def test_a_wait_that_failed_says_who_waited(args, make_model, tokenizer):
    trainer = SFTTrainer(make_model("llama"), args, tokenizer=tokenizer)
    with pytest.raises(RuntimeError, match="Process 0 of 1 waited for the others in step 1: .* ddp_timeout=7 s"):  # noqa: SIM117
        with explain_waits(trainer.args, lambda: trainer.state.global_step):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Timed out waiting 7000ms for recv operation to complete")
    with (
        pytest.raises(RuntimeError, match="^another error$"),
        explain_waits(trainer.args, lambda: trainer.state.global_step),
    ):
        raise RuntimeError("another error")


def test_tied_weights_are_written_once(make_model):
    model = make_model("llama", tie_word_embeddings=True)
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(gathered) - set(without_copies(model, gathered)) == {"lm_head.weight"}
    assert without_copies(make_model("llama"), gathered).keys() == gathered.keys()
