"""Fixtures of the tests of trainers."""

from __future__ import annotations

import pytest
import torch

from tests.trainers.ppo_support import PROMPTS, wanted
from trl.models.value_heads.auto_models import with_value_head
from trl.trainers.ppo.trainer import PPOConfig, PPOTrainer


@pytest.fixture
def make_ppo(make_model, tokenizer):
    """`make_ppo("llama", optimizer=..., **config)`: on one batch of four triplets, by plain gradient descent."""

    def make(model="llama", *, rate=0.1, ref_model="another", epochs=1, keywords=None, **config):
        if isinstance(model, str):
            torch.manual_seed(7)
            model = with_value_head(make_model(model))
        if ref_model == "another":
            name = "t5" if model.config.is_encoder_decoder else "llama"
            ref_model = make_model(name, seed=1) if model.config.model_type == name else None
        trained = [p for p in model.parameters() if p.requires_grad]
        options = {"batch_size": 4, "ppo_epochs": epochs, "bf16": False, **config}
        optimizer = torch.optim.SGD(trained, lr=rate)
        return PPOTrainer(PPOConfig(**options), model, ref_model, tokenizer, optimizer=optimizer, **(keywords or {}))

    return make


@pytest.fixture
def make_loop(make_model, tokenizer, tmp_path):
    """`make_loop("llama", **config)`: four steps of PPO on prompts of two letters, rewarded for one token."""

    def make(model="llama", *, reward_funcs=wanted, head=True, folder="out", keywords=None, **config):
        torch.manual_seed(7)
        model = make_model(model) if isinstance(model, str) else model
        options = {
            "output_dir": str(tmp_path / folder),
            "batch_size": 8,
            "mini_batch_size": 4,
            "ppo_epochs": 2,
            "max_completion_length": 5,
            "max_steps": 4,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "generation_kwargs": {"ignore_eos": True},
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
        }
        return PPOTrainer(
            args=PPOConfig(**{**options, **config}),
            model=with_value_head(model) if head else model,
            reward_funcs=reward_funcs,
            train_dataset=PROMPTS,
            processing_class=tokenizer,
            **(keywords or {}),
        )

    return make


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Classic scripts name no folder to write to."""
    monkeypatch.chdir(tmp_path)
