"""Checkpoints whose weights have other names than the model's own: runs that go on from them, and the best of them,
have all of it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.conftest import make_tokenizer
from tests.stops.runs import texts
from tests.vision.support import llava
from trl.trainers.sft import SFTConfig, SFTTrainer
from trl.training.renamed_weights import are_renamed, load_renamed


def mixture() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config)


MODELS = {"images": lambda: llava().model, "experts": mixture}


def moved(model: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    return other


def assert_equal(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    for (name, value), wanted in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shards", [False, True])
def test_what_is_stored_is_read_in_whole(name, dtype, shards, tmp_path):
    model = MODELS[name]().to(dtype)
    moved(model).save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert are_renamed(model, tmp_path)
    load_renamed(model, tmp_path)
    assert_equal(model, moved(MODELS[name]().to(dtype)))


@pytest.mark.parametrize("best", [False, True])
def test_a_trainer_reads_what_it_wrote(best, tmp_path):
    """To go on from a checkpoint, and the best one at the end."""
    args = SFTConfig(str(tmp_path / "out"), use_cpu=True, report_to="none", html_report=False, disable_tqdm=True)
    trainer = SFTTrainer(mixture(), args, train_dataset=texts(), processing_class=make_tokenizer())
    moved(trainer.model).save_pretrained(tmp_path / "stored")
    expected = moved(trainer.model)
    if best:
        trainer.state.best_model_checkpoint = str(tmp_path / "stored")
        trainer._load_best_model()
    else:
        trainer._load_from_checkpoint(str(tmp_path / "stored"))
    assert_equal(trainer.model, expected)
