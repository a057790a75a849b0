"""What is said where another engine would run than was asked for. Engines themselves: see tests/distributed."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from trl.errors import ConfigError
from trl.models.value_heads.storage import without_copies
from trl.trainers.sft import SFTConfig, SFTTrainer
from trl.training.parallel import accumulating, check_parallelism, check_processes, explain_waits


@pytest.fixture
def args(tmp_path):
    return SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", ddp_timeout=7)


def test_an_engine_that_does_not_run(args, monkeypatch):
    accelerator = Accelerator(cpu=True)
    check_parallelism(args, accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="asks for FSDP, and NO would run, with whole weights on every device"):
        check_parallelism(args, accelerator)


def test_processes_that_would_train_alone(args, monkeypatch):
    check_processes(args)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, and this one would train in 1"):
        check_processes(args)


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
            raise RuntimeError("[pair.cc:1] Timed out waiting 7000ms for recv operation to complete")
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
