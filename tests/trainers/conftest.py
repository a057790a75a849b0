"""Fixtures of the tests of trainers."""

from __future__ import annotations

import pytest
import torch

from trl.models.heads import with_value_head
from trl.trainers.ppo import PPOConfig, PPOTrainer


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
        options = {"batch_size": 4, "ppo_epochs": epochs, **config}
        optimizer = torch.optim.SGD(trained, lr=rate)
        return PPOTrainer(PPOConfig(**options), model, ref_model, tokenizer, optimizer=optimizer, **(keywords or {}))

    return make
